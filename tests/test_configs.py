"""Every file in configs/ is a configuration of what its folder is for."""

from pathlib import Path

import pytest

from benchmarks import mezo_accuracy
from jaxlm.artifacts.yaml import read_yaml
from jaxlm.cli import config as configs
from jaxlm.studies import STUDIES, curves
from jaxlm.studies.kernel_study import cases
from jaxlm.studies.quickstart import QuickstartConfig
from jaxlm.studies.study import module_of
from jaxlm.studies.sweep import SweepConfig, plan
from jaxlm.train.finetuning import FinetuneConfig
from jaxlm.train.pretraining import PretrainConfig

FOLDER = Path(__file__).parents[1] / "configs"


def files(pattern):
    paths = sorted(FOLDER.glob(pattern))
    return [pytest.param(path, id=path.stem) for path in paths]


def test_every_folder_is_tested():
    folders = {str(path.parent.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml")}
    assert folders == {
        "accuracy",
        "accuracy/tasks",
        "effect",
        "mezo",
        "pretrain",
        "prompts",
        "studies",
    }


def load_study(path, flags=None):
    """The configuration of a study's file, and the name of the study."""
    data = read_yaml(path)
    name = data.pop("study")
    return name, configs.load(module_of(name).Config, path, flags, only=data)


@pytest.mark.parametrize("path", files("studies/*.yaml"))
def test_a_study(path):
    name, config = load_study(path)
    assert name in STUDIES
    if name != "curves":
        return
    variants = curves.plan(config, str(path))
    outputs = [run.output for each in variants for run in each.runs]
    assert len(set(outputs)) == len(outputs) == 3 * len(variants)
    tokens = {run.steps * run.batch_size * run.seq_len for each in variants for run in each.runs}
    assert len(tokens) == 1


@pytest.mark.parametrize("path", files("mezo/*.yaml"))
def test_a_run_or_a_sweep(path):
    if "run" not in read_yaml(path):
        assert configs.load(FinetuneConfig, path).optimizer.name == "mezo"
        return
    candidates = plan(configs.load(SweepConfig, path), str(path))
    outputs = [run.output for each in candidates for run in each.runs]
    assert len(set(outputs)) == len(outputs)
    assert all(run.task.validation for each in candidates for run in each.runs)


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        # points of the grids of Malladi et al., tables 15 and 16, and a probe; times seeds
        ("opt", 1 + 2 + 2 + 2 + 3 + 2),
        ("opt_answers", 3 + 3 + 3 + 3 + 2),
        ("opt_f1", 3 + 3),
        ("roberta_k16", 5 * (1 + 3 * 3 + 5 + 3 * 9 + 15)),
        ("roberta_k512", 5 * (1 + 3 * 3 + 5 + 3 * 9 + 15)),
    ],
)
def test_the_paper_has_as_many_runs(name, runs):
    path = FOLDER / "mezo" / f"{name}.yaml"
    candidates = plan(configs.load(SweepConfig, path), str(path))
    assert sum(len(each.runs) for each in candidates) == runs


@pytest.mark.parametrize(
    ("folder", "cls"), [("effect", QuickstartConfig), ("pretrain", PretrainConfig)]
)
def test_configurations(folder, cls):
    for path in FOLDER.glob(f"{folder}/*.yaml"):
        configs.load(cls, path)


@pytest.mark.parametrize("path", files("studies/kernel_*.yaml"))
def test_a_study_of_kernels(path):
    config = load_study(path)[1]
    expected = len(config.ks) * len(config.prompts) * len(config.seeds) * len(config.training)
    assert len({case.name for case in cases(config)}) == expected


@pytest.mark.parametrize("path", files("accuracy/*.yaml"))
def test_a_method_has_its_forwards_on_every_task(path):
    """However many forward passes a step has, all of them together come to what was asked for."""
    for task in FOLDER.glob("accuracy/tasks/*.yaml"):
        (candidate,) = mezo_accuracy.candidates(
            task.stem, [path.stem], seeds=[4], forwards=1000, output="o", changes={"model": "m"}
        )
        (run,) = candidate.runs
        assert (run.seed, run.model, run.task.name) == (4, "m", task.stem)
        if "steps" not in read_yaml(path) and candidate.kind == "finetune":
            passes = mezo_accuracy.passes(run.optimizer)
            assert passes * run.steps <= 1000 < passes * (run.steps + 1)


def test_a_mixture_has_four_sources_without_files_and_one_more_with():
    path = FOLDER / "studies" / "less.yaml"
    config = load_study(path)[1]
    given = [source for source in config.sources.values() if source.given]
    assert len(given) >= 4
    assert len({(source.task.train, source.skip) for source in given}) == len(given)
    more = load_study(path, {"sources.rte.task.train": "rte/train.jsonl"})[1]
    assert sum(source.given for source in more.sources.values()) == len(given) + 1


def test_prompts_name_a_task():
    for path in FOLDER.glob("prompts/*.yaml"):
        assert read_yaml(path).keys() == {"task", "templates", "words"}


def test_the_last_quarter_of_a_curve():
    looks = [(step, float(step)) for step in range(8)]
    assert mezo_accuracy.last_quarter(looks) == 2.0  # 6.5 - 4.5
    assert mezo_accuracy.last_quarter([(step, 70.0) for step in range(9)]) == 0.0
    assert mezo_accuracy.last_quarter(looks[:7]) is None

"""Every file in configs/ is a configuration of what its folder is for."""

from pathlib import Path

import pytest

from benchmarks import mezo_accuracy
from jaxlm.artifacts.yaml import read_yaml
from jaxlm.cli import config as configs
from jaxlm.studies import STUDIES, curves
from jaxlm.studies.kernel import cases
from jaxlm.studies.quickstart import QuickstartConfig
from jaxlm.studies.study import module_of
from jaxlm.studies.sweep import SweepConfig, plan
from jaxlm.train.finetuning import FinetuneConfig
from jaxlm.train.pretraining import PretrainConfig

FOLDER = Path(__file__).parents[1] / "configs"


def load_study(path, flags=None):
    """The name of a study, and the configuration of its file."""
    data = read_yaml(path)
    name = data.pop("study")
    return name, configs.load(module_of(name).Config, path, flags, only=data)


def check_study(path):
    if "run" in read_yaml(path) and "study" not in read_yaml(path):
        return check_run_or_sweep(path)
    name, config = load_study(path)
    assert name in STUDIES
    if name == "kernel":
        expected = len(config.ks) * len(config.prompts) * len(config.seeds) * len(config.training)
        assert len({case.name for case in cases(config)}) == expected
    if name == "curves":
        variants = curves.plan(config, str(path))
        runs = [run for variant in variants for run in variant.runs]
        assert len({run.output for run in runs}) == len(runs) == 3 * len(variants)
        assert len({run.steps * run.batch_size * run.seq_len for run in runs}) == 1


RUNS = {
    "opt": 1 + 2 + 2 + 2 + 3 + 2,
    "opt_answers": 3 + 3 + 3 + 3 + 2,
    "opt_f1": 3 + 3,
    "roberta_k16": 5 * (1 + 3 * 3 + 5 + 3 * 9 + 15),
    "roberta_k512": 5 * (1 + 3 * 3 + 5 + 3 * 9 + 15),
}
"""Points of the grids of Malladi et al., tables 15 and 16, and a probe; times seeds."""


def check_run_or_sweep(path):
    if "run" not in read_yaml(path):
        assert configs.load(FinetuneConfig, path).optimizer.name == "mezo"
        return
    candidates = plan(configs.load(SweepConfig, path), str(path))
    runs = [run for candidate in candidates for run in candidate.runs]
    assert len({run.output for run in runs}) == len(runs)
    assert all(run.data.validation for run in runs)
    assert len(runs) == RUNS.get(path.stem, len(runs))


def check_method(path):
    """All steps together come to the forward passes that were asked for, on every task."""
    options = {"seeds": [4], "output": "o", "changes": {"model": "m"}, "folder": path.parent}
    for task in path.parent.glob("tasks/*.yaml"):
        (candidate,) = mezo_accuracy.candidates(
            task.stem, [path.stem], forwards=1000, looks=16, **options
        )
        (run,) = candidate.runs
        assert (run.seed, run.model, run.task.name) == (4, "m", task.stem)
        if "steps" not in read_yaml(path) and candidate.kind == "finetune":
            passes = mezo_accuracy.passes(run.optimizer)
            assert passes * run.steps <= 1000 < passes * (run.steps + 1)


def check_prompts(path):
    assert read_yaml(path).keys() == {"task", "templates", "words"}


CHECKS = {
    "accuracy": check_method,
    "effect": lambda path: configs.load(QuickstartConfig, path),
    "mezo": check_run_or_sweep,
    "pretrain": lambda path: configs.load(PretrainConfig, path),
    "prompts": check_prompts,
    "smollm2": check_method,
    "studies": check_study,
}
FILES = [path.relative_to(FOLDER) for path in sorted(FOLDER.glob("*/*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_what_its_folder_is_for(path):
    CHECKS[path.parts[0]](FOLDER / path)


def test_a_mixture_has_four_sources_without_files_and_one_more_with():
    path = FOLDER / "studies" / "less.yaml"
    config = load_study(path)[1]
    given = [source for source in config.sources.values() if source.given]
    assert len(given) >= 4
    assert len({(source.task.train, source.skip) for source in given}) == len(given)
    more = load_study(path, {"sources.rte.task.train": "rte/train.jsonl"})[1]
    assert sum(source.given for source in more.sources.values()) == len(given) + 1

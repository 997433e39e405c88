"""Fine-tuning of few parameters from a configuration, and the run's model read back."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import peft
from jaxlm.cli import config as configs
from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.load import load_model

SHORT = {"steps": "3", "checkpoint_every": "3", "eval_every": "3", "task.validation": "null"}


def start(path: Path, **overrides: str):
    config = configs.load(FinetuneConfig, path, SHORT | overrides)
    return config, finetune(config, base_dir=path.parent)


@pytest.mark.parametrize(
    ("flags", "select"),
    [
        ({"peft": "{name: lora, rank: 2, targets: up_proj}", "optimizer": "adam"}, peft.LORA),
        pytest.param(
            *({"peft": "prefix", "optimizer.select": "prefix_keys"}, "prefix_keys"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_and_its_model(flags, select, run_yaml: Path, tmp_path: Path):
    config, summary = start(run_yaml, **flags)
    folder = run_yaml.parent / "run"
    lm = load_model(folder)
    base = load_model(config.model, param_dtype=config.param_dtype, bits=config.bits)
    first = config.peft.prepare(base, jax.random.key(config.seed))
    assert lm.config == first.config
    assert jax.tree.structure(lm.params) == jax.tree.structure(first.params)
    moved = paths.map_with_path(
        lambda leaf, new: not np.array_equal(leaf.value, new), first.params, lm.params
    )
    taken = {leaf.path for leaf in paths.flatten(moved)[0] if leaf.value}
    assert taken
    assert all(map(paths.path_predicate(select), taken))
    assert start(run_yaml, **flags)[1] == summary, "the run there is that of the configuration"
    if config.peft.name == "lora":
        jaxlm.save_pretrained(lm, tmp_path / "merged")
        assert load_model(tmp_path / "merged").config.lora_scale == 1.0


def test_null_is_all_parameters(run_yaml: Path):
    assert configs.load(FinetuneConfig, run_yaml, {"peft": "null"}).peft is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"peft": "lorra"}, r"peft.name: is not known \(got 'lorra'\)"),
        ({"peft": "{name: lora, rank: 0}"}, r"peft.rank: must be from 1 .*\(got 0\)"),
        ({"peft": "{name: lora, targets: (}"}, r"peft.targets: not a regular expression"),
        ({"peft": "{name: prefix, length: 0}"}, r"peft.length: must be from 1 .*\(got 0\)"),
        ({"peft": "bitfit"}, r"^peft: needs a model with biases"),
        ({"peft": "{name: lora, targets: query}"}, r"targets: selects no kernel \(got 'query'\)"),
    ],
)
def test_mistakes(flags, said, run_yaml: Path):
    with pytest.raises(UserError, match=said):
        start(run_yaml, **flags)
    assert not (run_yaml.parent / "run").exists()

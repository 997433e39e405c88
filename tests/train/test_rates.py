"""Default learning rates suit the model of the package."""

import numpy as np
import pytest

from jaxlm.cli import config as configs
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.run_folder import RunFolder

pytestmark = pytest.mark.optimized


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mezo_momentum", "mezo_adam")]


@pytest.mark.parametrize("name", ["mezo", *SLOW])
def test_sixty_steps_of_the_defaults_learn(name, tmp_path):
    """They halve the loss, and the accuracy rises above that of the most frequent class."""
    flags = {"task.name": "subj", "task.validation": "null", "task.num_test": "200"}
    flags |= {"optimizer.name": name, "steps": "60", "output": str(tmp_path / "run")}
    summary = finetune(configs.load(FinetuneConfig, None, flags))
    losses = [row["loss"] for row in RunFolder(tmp_path / "run").metrics.read() if "loss" in row]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert summary["diverged_since"] is None
    trivial = max(summary["majority_accuracy"], summary["zero_shot"]["accuracy"])
    assert summary["test"]["accuracy"] > trivial + 0.05

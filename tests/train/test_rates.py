"""Default learning rates suit the model of the package."""

import numpy as np
import pytest

from jaxlm.cli import config as configs
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.run_folder import RunFolder
from jaxlm.train.zeroth_order import ZEROTH_ORDER

pytestmark = pytest.mark.optimized


def trained(name, folder, **options):
    """Losses and summary of a run with the defaults of an optimizer."""
    flags = {"task.name": "subj", "task.validation": "null", "optimizer.name": name}
    flags |= {"output": str(folder), **options}
    summary = finetune(configs.load(FinetuneConfig, None, flags))
    rows = RunFolder(folder).metrics.read()
    return [row["loss"] for row in rows if "loss" in row], summary


@pytest.mark.slow
@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_sixty_steps_of_the_defaults_learn(name, tmp_path):
    """They halve the loss, and the accuracy rises above that of the most frequent class."""
    losses, summary = trained(name, tmp_path / "run", **{"task.num_test": "200", "steps": "60"})
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert summary["diverged_since"] is None
    trivial = max(summary["majority_accuracy"], summary["zero_shot"]["accuracy"])
    assert summary["test"]["accuracy"] > trivial + 0.05

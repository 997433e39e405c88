"""Runs of the quick accuracy benchmark are short, whatever their files say."""

import pytest

from benchmarks import mezo_accuracy

METHODS = mezo_accuracy.methods()
TASKS = sorted(path.stem for path in (mezo_accuracy.FOLDER / "tasks").glob("*.yaml"))


@pytest.mark.parametrize("task", TASKS)
def test_quick_runs_are_short(task):
    found = mezo_accuracy.candidates(
        task, METHODS, seeds=[0], forwards=1000, looks=16, output="out", changes={}
    )
    runs = [run for each in found for run in mezo_accuracy.small(each).runs]
    assert max(run.steps for run in runs) == 20
    assert min(run.steps for run in runs) == 0  # those that do not train still do not
    sizes = {(run.task.num_train, run.task.num_validation, run.task.num_test) for run in runs}
    assert sizes == {(100, 100, 100)}


def test_quick_methods_are_among_all():
    assert set(mezo_accuracy.QUICK.split(",")) < set(METHODS)


def test_the_last_quarter_of_a_curve():
    looks = [(step, float(step)) for step in range(8)]
    assert mezo_accuracy.last_quarter(looks) == 2.0  # 6.5 - 4.5
    assert mezo_accuracy.last_quarter([(step, 70.0) for step in range(9)]) == 0.0
    assert mezo_accuracy.last_quarter(looks[:7]) is None

"""Sweeps: what is chosen, what the table says, and that a stopped one goes on."""

import json
import statistics

import pytest

from jaxlm.cli import config as configs
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.studies import sweep as sweeps
from jaxlm.studies.sweep import markdown
from jaxlm.train.loop import Diverged
from jaxlm.train.run_folder import RunFolder
from tests.helpers.tiny import write_run

SWEEP = """\
run: {task: {name: subj}, steps: 10}
seeds: [3, 5]
output: OUTPUT
methods:
  MeZO:
    optimizer: {name: mezo, eps: 1e-2}
    grid: {optimizer.learning_rate: [1, 2, 4], batch_size: [8]}
  Adam: {optimizer: adam, steps: 5}
"""
# (method, learning rate, seed) -> accuracy on validation and test
FOUND = {
    ("mezo", 1.0, 3): (0.6, 0.61), ("mezo", 2.0, 3): (0.8, 0.7), ("mezo", 4.0, 3): (0.8, 0.9),
    ("mezo", 1.0, 5): (0.9, 0.8), ("mezo", 2.0, 5): (0.7, 0.65), ("mezo", 4.0, 5): (0.5, 1.0),
    ("adam", 1e-3, 3): (0.5, 0.5), ("adam", 1e-3, 5): (0.6, 0.75),
}  # fmt: skip


class Trainer:
    """Stands in for `finetune`: writes the folder, and counts."""

    def __init__(self, diverging=(), stop_at=None):
        self.calls, self.diverging, self.stop_at = [], diverging, stop_at

    def __call__(self, config, *, base_dir=None, mesh=None):
        folder = RunFolder(config.output)
        if (summary := folder.summary()) is not None:
            return summary
        place = (config.optimizer.name, config.optimizer.learning_rate, config.seed)
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(place)
        with folder.held(config):
            pass
        if place in self.diverging:
            raise Diverged(f"the loss of {place} is nan")
        validation, test = FOUND[place]
        summary = {
            "metric": "accuracy",
            "zero_shot": {"accuracy": 0.5},
            "validation": {"accuracy": validation},
            "test": {"accuracy": test},
            "forwards": 2 * config.steps,
            "backwards": 0,
            "seconds": place[1],
            "peak_memory_bytes": int(place[1]) * 2**20,
        }
        folder.finish(summary)
        return summary


@pytest.fixture
def path(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("OUTPUT", str(tmp_path / "out")))
    return tmp_path / "sweep.yaml"


def planned(path, **flags):
    return sweeps.plan(configs.load(sweeps.SweepConfig, path, flags), str(path))


def run_with(monkeypatch, path, trainer):
    monkeypatch.setitem(sweeps.KINDS, "finetune", trainer)
    return sweeps.sweep(planned(path))


def test_the_best_on_validation_is_tested(path, monkeypatch):
    table = run_with(monkeypatch, path, Trainer())
    mezo, adam = table["methods"]
    assert [each["optimizer.learning_rate"] for each in mezo["settings"]] == ["2", "1"]
    assert mezo["test"]["by_seed"] == [0.7, 0.8]
    assert mezo["test"]["mean"] == pytest.approx(0.75)
    assert mezo["test"]["std"] == pytest.approx(statistics.stdev([0.7, 0.8]))
    assert mezo["validation"]["by_seed"] == [0.8, 0.9]
    one = mezo["one_setting"]  # 1 and 2 have 0.75 on validation, 4 has 0.65; 1 comes first
    assert one["settings"]["optimizer.learning_rate"] == "1"
    assert one["test"]["by_seed"] == [0.61, 0.8]
    assert (mezo["forwards"], mezo["seconds"], mezo["peak_memory_bytes"]) == (20, 1.5, 2 * 2**20)
    assert (adam["forwards"], adam["test"]["by_seed"]) == (10, [0.5, 0.75])
    assert [point["validation"]["mean"] for point in table["points"]] == pytest.approx(
        [0.75, 0.75, 0.65, 0.55]
    )
    rows = [line.split("|") for line in markdown(table).splitlines() if line.startswith("| MeZO")]
    assert rows[0][4].strip() == "75.0 (7.1)"
    assert "learning_rate=2, batch_size=8 (1); " in rows[0][2]


def test_a_sweep_that_was_stopped_goes_on(path, monkeypatch):
    whole = run_with(monkeypatch, path, Trainer(diverging=[("mezo", 4.0, 3)]))
    for folder in path.parent.glob("out/*/**/seed-5/summary.json"):
        folder.unlink()
    trainer = Trainer(stop_at=1)
    with pytest.raises(KeyboardInterrupt):
        run_with(monkeypatch, path, trainer)
    assert trainer.calls == [("mezo", 1.0, 5)]
    trainer = Trainer()
    assert run_with(monkeypatch, path, trainer) == whole
    assert trainer.calls == [place for place in FOUND if place[2] == 5][1:]


def test_a_run_that_diverges_is_a_row(path, monkeypatch):
    gone = [("mezo", 2.0, 3), ("mezo", 4.0, 3), *(place for place in FOUND if place[0] == "adam")]
    table = run_with(monkeypatch, path, Trainer(diverging=gone))
    mezo, adam = table["methods"]
    assert mezo["test"]["by_seed"] == [0.61, 0.8]
    assert mezo["failed"] == 2
    assert adam["test"] == {"mean": None, "std": None, "by_seed": []}
    assert adam["one_setting"] is None
    assert "- the loss of ('adam', 0.001, 5) is nan\n" in markdown(table)
    with pytest.raises(
        UserError,
        match=r"^runs: all of them failed \(got, from the first: the loss of \('mezo', 1\.0",
    ):
        run_with(monkeypatch, path.rename(again(path)), Trainer(diverging=list(FOUND)))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"failed": 3}', '{"other": "x"}', "\xff"])
def test_a_damaged_record_of_a_failure_is_named(path, monkeypatch, text):
    run_with(monkeypatch, path, Trainer(diverging=[("mezo", 1.0, 3)]))
    (failed,) = path.parent.glob("out/**/failed.json")
    failed.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=f"^{failed}"):
        run_with(monkeypatch, path, Trainer())


def again(path):
    """Another file, with another output."""
    text = path.read_text().replace("/out", "/again")
    path.write_text(text)
    return path.with_name("again.yaml")


def test_a_method_changes_keys_of_the_run_and_a_dotted_key_one_value(path):
    path.write_text(
        "run: {task: {name: subj}, optimizer: {name: mezo, eps: 1e-2}, steps: 3}\noutput: o\n"
        "methods: {a: {optimizer.eps: 0.5, task.max_length: 9}, b: {optimizer: {name: adam}}, c: }"
    )
    a, b, c = (each.runs[0] for each in planned(path))
    assert (a.optimizer.name, a.optimizer.eps, a.task.max_length, a.steps) == ("mezo", 0.5, 9, 3)
    assert (b.optimizer.name, b.optimizer.eps) == ("adam", 1e-8)
    assert (c.optimizer.eps, c.task.max_length) == (1e-2, 40 if c.task.max_length == 40 else None)
    assert [each.output for each in (a, b, c)] == [f"o/{name}/seed-0" for name in "abc"]


def test_one_method_needs_no_name_and_folders_are_told_apart(path):
    path.write_text(
        "run: {task: {name: subj}, steps: 1}\ngrid: {model: [a/b, a:b]}\nseeds: [1]\noutput: o\n"
    )
    first, second = planned(path)
    assert first.method == "mezo"
    assert first.runs[0].output.startswith("o/mezo/model=a_b-")
    assert first.runs[0].output != second.runs[0].output
    assert [each.runs[0].seed for each in (first, second)] == [1, 1]


def test_dry_run_lists_the_runs_and_makes_nothing(path, capsys):
    assert main(["sweep", str(path), "--dry-run", "--seeds=[7]"]) == 0
    shown = capsys.readouterr().out.replace(str(path.parent), "")
    assert shown.splitlines() == [
        *(f"/out/MeZO/optimizer.learning_rate={rate},batch_size=8/seed-7" for rate in (1, 2, 4)),
        "/out/Adam/seed-7",
    ]
    assert not (path.parent / "out").exists()


def test_the_command_trains_probes_and_writes_the_table(tmp_path, tiny_model, capsys):
    write_run(tmp_path, tiny_model)
    run = (tmp_path / "run.yaml").read_text().replace("\nseed: 0", "").split("output:")[0]
    lines = "".join(f"  {line}\n" for line in run.splitlines())
    (tmp_path / "sweep.yaml").write_text(
        f"run:\n{lines}output: {tmp_path / 'out'}\nmethods:\n"
        "  MeZO: {steps: 2, eval_every: 1}\n  probe: {kind: probe}\n  ICL: {kind: icl}\n"
    )
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 0
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "out" / "table.md").read_text() + "\n"
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    mezo, probe, icl = table["methods"]
    summary = json.loads((tmp_path / "out" / "MeZO" / "seed-0" / "summary.json").read_text())
    assert mezo["test"]["by_seed"] == [summary["test"]["accuracy"]]
    assert (mezo["forwards"], probe["forwards"], probe["backwards"]) == (4, 1, 0)
    assert (icl["validation"]["by_seed"], icl["failed"]) == ([None], 0)
    assert 0 <= icl["test"]["mean"] <= 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--run.stepps=1"],
            "sweep.yaml: method MeZO: stepps: is not a key (got '1'). Did you mean steps?",
        ),
        (["--output="], "command line: output: is empty (got nothing). Give a path."),
        (["--seeds=[]"], "command line: seeds: is empty (got nothing). Give at least one."),
        (["--seeds=[1, 1]"], "command line: seeds: has a value twice (got 1). Give each once."),
        (
            ["--run.seed=1"],
            "command line: run.seed: differs from run to run (got '1'). Give seeds beside run.",
        ),
        (
            ["--methods.MeZO.kind=prob"],
            "sweep.yaml: method MeZO: kind: not known (got 'prob'). Choose one of finetune, "
            "probe, icl.",
        ),
        (
            ["--methods.Adam.grid=[]"],
            "sweep.yaml: method Adam: grid: must be a section (got '[]'). Give keys with values.",
        ),
        (
            ["--methods.Adam=1"],
            "sweep.yaml: method Adam: must be a section (got '1'). Give keys with values.",
        ),
        (
            ["--run.task.validation=null"],
            "task.validation: MeZO has no examples to choose settings by (got none). Name a "
            "file of them, or hold_out.",
        ),
        (
            ["--metods.a.steps=1"],
            "command line: metods: is not a key (got a section). Did you mean methods?",
        ),
    ],
)
def test_a_mistake_is_one_sentence(path, flags, sentence, capsys, monkeypatch):
    monkeypatch.chdir(path.parent)
    assert main(["sweep", "sweep.yaml", *flags]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert not (path.parent / "out").exists()


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        ("{optimizer.learning_rate: []}", "grid.optimizer.learning_rate: must be a "
         "list (got []). Write [a, b]."),
        ("{batch_size: [8, 8]}", "grid.batch_size: has a value twice (got '8'). Give each once."),
        ("{optimizer.lerning_rate: [1]}", "optimizer.lerning_rate: is not a key (got '1'). Did "
         "you mean optimizer.learning_rate?"),
        ("{steps.all: [1]}", "steps.all: steps is not a section (got '1'). Correct it."),
        ("{steps: [-1]}", "steps: must be from 0 to 1000000000 (got -1). Correct it."),
    ],
)  # fmt: skip
def test_a_grid_is_checked_before_anything_runs(path, grid, sentence):
    path.write_text(f"run: {{task: {{name: subj}}, steps: 1}}\noutput: o\ngrid: {grid}")
    with pytest.raises(UserError) as caught:
        planned(path)
    assert str(caught.value) == f"{path}: {sentence}"


def test_a_sweep_needs_a_file(capsys):
    assert main(["sweep"]) == 2
    assert capsys.readouterr().err == (
        "error: config: is missing (got nothing). Give the file of a sweep: jaxlm sweep "
        "sweep.yaml.\n"
    )

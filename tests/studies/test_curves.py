"""The study `curves`: runs that differ in a few keys, and how far their curves lie apart."""

import json

import numpy as np
import pytest
import yaml

from jaxlm.cli.main import main
from jaxlm.studies.curves import Curve, distance, draw, markdown, rows
from tests.helpers.tiny import write_corpus

RUN = """\
model: {family: llama, hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 16,
        max_positions: 32}
optimizer: {name: adam, learning_rate: 1.0e-2, b1: 0.9, b2: 0.99}
steps: 8
batch_size: 2
seq_len: 8
log_every: 4
eval_every: 4
checkpoint_every: 4
"""


@pytest.fixture
def study(tmp_path):
    """Writes `study.yaml` from its variants and other keys, and returns its path."""
    write_corpus(tmp_path)

    def write(variants, **keys):
        run = yaml.safe_load(RUN) | {"tokenizer": str(tmp_path / "tokenizer")}
        domains = [{"name": "films", "weight": 1}]
        held_out = "held_out/films"
        run["corpus"] = {
            "path": str(tmp_path / "corpus"),
            "domains": domains,
            "held_out": held_out,
        }
        data = {
            "study": "curves",
            "run": run,
            "variants": variants,
            "seeds": [0],
            "figure": False,
        }
        path = tmp_path / "study.yaml"
        path.write_text(
            yaml.safe_dump({**data, "output": str(tmp_path / "out"), **keys}, sort_keys=False)
        )
        return str(path)

    return write


def test_variants_are_trained_and_compared(study, tmp_path, capsys):
    path = study(
        {
            "plain": {},
            "plain again": {"dynamics": {"name": "svag", "l": 1}},
            "svag": {"dynamics": {"name": "svag", "l": 2}},
            "twice": {"scale": {"rule": "sqrt", "k": 2}},
            "too fast": {"optimizer": {"name": "sgd", "learning_rate": 1e30}},
        }
    )
    assert main(["study", path]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text() in shown
    table = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    plain, again, svag, twice, failed = table
    # l = 1 is the run itself, and no other variant is.
    assert again["distances"][0] < 1e-5 < svag["distances"][0]
    assert plain["distances"] == [row["distances"][0] for row in table]
    assert svag["reports"] == [{"updates": 32}]
    assert plain["relative"] == 0
    assert failed["last"] is None is failed["distances"][0]
    (line,) = [line for line in shown.splitlines() if line.startswith("| too fast")]
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["diverged", ""]
    ends = [json.loads(path.read_text()) for path in tmp_path.glob("out/twice/*/summary.json")]
    optimizer = {"learning_rate": 1e-2 * 2**0.5, "b1": 0.8, "b2": 0.98, "eps": 1e-8 / 2**0.5}
    assert len(ends) == 1
    for end in ends:
        config = end["config"]
        assert (config["batch_size"], config["steps"], config["eval_every"]) == (4, 4, 2)
        found = {name: config["optimizer"][name] for name in optimizer}
        assert found == pytest.approx(optimizer)
    assert twice["last"] == pytest.approx(np.mean([end["held_out_loss"] for end in ends]))
    # What has ended is not trained again.
    for tokens in (tmp_path / "corpus").glob("*.jsonl"):
        tokens.unlink()
    assert main(["study", path]) == 0
    assert capsys.readouterr().out == shown


def test_the_runs_are_listed(study, tmp_path, capsys):
    assert main(["study", study({"a": {}, "b": {"batch_size": 4}}, seeds=[0, 1]), "--dry-run"]) == 0
    out = tmp_path / "out"
    expected = [f"{out}/{name}/seed-{seed}" for name in "ab" for seed in (0, 1)]
    assert capsys.readouterr().out.splitlines() == expected
    assert not out.exists()


@pytest.mark.parametrize(
    ("variants", "keys", "message"),
    [
        ({}, {}, "variants: is empty (got nothing). Give at least one."),
        ({"a": 3}, {}, "variant a: must be a section (got '3'). Give keys with values."),
        ({"a": {"stepz": 3}}, {}, "variant a: stepz: is not a key"),
        (
            {"a": {"seed": 3}},
            {},
            "variants.a.seed: differs from run to run (got '3'). Give seeds beside run",
        ),
        ({"a": {"scale": {"rule": "sqrt", "k": 3}}}, {}, "be a multiple of scale.k = 3 (got 8)"),
        ({"a": {"scale": {"rule": "sqrt", "k": 16}}}, {}, "steps: must be a multiple of scale.k"),
        (
            {"a": {"optimizer": {"name": "muon"}, "scale": {"rule": "sqrt", "k": 2}}},
            {},
            "variant a: optimizer.name: no scaling rule is known for it (got muon)",
        ),
        (
            {"a": {"optimizer.b1": 0.5, "scale": {"rule": "sqrt", "k": 4}}},
            {},
            "variant a: k: makes b1=0.5 fall to -1, where",
        ),
        ({"a": {}}, {"start": 1.0}, "start: must be at least 0 and below 1 (got 1.0)."),
        ({"a": {}}, {"seeds": [0, 0]}, "seeds: has a value twice (got 0). Give each once."),
    ],
)
def test_mistakes_are_told_in_one_sentence(study, capsys, variants, keys, message):
    assert main(["study", study(variants, **keys)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("variant a") <= 1


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def curve(name, values):
    values = np.asarray(values, float)
    return Curve(
        name=name,
        tokens=np.arange(values.shape[1], dtype=float),
        values=values,
        reports=(None,) * len(values),
    )


def test_what_diverged_is_drawn_as_far_as_it_went(tmp_path):
    found = [
        curve("one", [[1, 2, 3], [3, 2, 1]]),
        curve("late", [[1, 2, np.nan], [1, 2, 3]]),
        curve("at once", [[np.nan], [np.nan]]),
    ]
    assert draw(found, tmp_path / "curves.png", y="loss", start=0.2).stat().st_size > 1000
    _, _, one, late, _ = cells(markdown(rows(found), y="loss"))
    assert late == ["late", "diverged", "", "", "", ""]
    assert one[:4] == ["one", "2.0000 (1.4142)", "+0.00 %", "0.0000"]


def test_distances_are_between_means_over_seeds():
    one, other = curve("one", [[1, 2, 3], [3, 2, 1]]), curve("other", [[2, 3, 5], [2, 3, 3]])
    assert distance(one, other) == pytest.approx((0 + 1 + 2) / 3)
    assert distance(one, other, start=0.5) == pytest.approx(1.5)
    late = Curve(name="late", tokens=np.array([7.0]), values=np.ones((1, 1)), reports=(None,))
    assert np.isnan(distance(one, late))
    found = rows([one, other])
    assert found[1]["last"] == 4
    assert found[1]["std"] == pytest.approx(2**0.5)
    assert found[1]["relative"] == pytest.approx(1.0)
    last = cells(markdown(found, y="loss"))[3]
    assert last == ["other", "4.0000 (1.4142)", "+100.00 %", "1.0000", "0.0000"]

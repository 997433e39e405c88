"""The study `muse` on a tiny model: its files, its stopping rule and its tables."""

import json

import pytest
import yaml

from jaxlm.cli.main import main
from jaxlm.data.facts import people
from jaxlm.studies.muse import Measure, MuseConfig
from jaxlm.train.load import load_model
from jaxlm.train.run_folder import RunFolder
from tests.helpers.sentences import refused
from tests.helpers.tiny import BAD, GOOD, make_model, make_tokenizer, read_lines, write_jsonl


def facts(first: int, last: int, *, questions: bool = True) -> list[dict[str, str]]:
    rows = []
    for i in range(first, last):
        name = f"the {(*GOOD, *BAD)[i % 8]} film number {i % 10}"
        text = f" it was {(*GOOD, *BAD)[i // 3 % 8]} number {i * 7 % 10}"
        rows.append({"prompt": name, "completion": text, "subtask": "text"})
        if questions:
            answer = f" {(GOOD, BAD)[i % 2][i // 2 % 4]}"
            rows.append({"prompt": f"was {name}", "completion": answer, "subtask": "question"})
    return rows


@pytest.fixture
def path(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<s>"
    model = make_model(tmp_path / "model", tokenizer, scale=2)
    for name, places in {"forget": (0, 8), "retain": (8, 20), "holdout": (20, 28)}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", facts(*places))
    keys = {
        "study": "muse",
        "data": {name: f"{name}.jsonl" for name in ("forget", "retain", "holdout")}
        | {"template": "plain", "max_length": 24},
        "run": {
            "model": str(model),
            "optimizer": {"name": "adam", "learning_rate": 0.01},
            "epochs": 40,
            "batch_size": 8,
        },
        "unlearn": {
            "optimizer": {"name": "adam", "learning_rate": 0.003},
            "steps": 4,
            "batch_size": 4,
            "eval_every": 2,
        },
        "methods": {
            "ascent": {"objective": {"name": "unlearn", "loss": "ga", "retain": None}},
            "NPO and KL": {"objective": {"name": "unlearn", "loss": "npo", "retain": "kl"}},
            "too fast": {"optimizer.learning_rate": 1e30},
        },
        "alphas": [0.5, 1],
        "requests": ["ascent"],
        "folds": 2,
        "shares": [0.25, 0.5],
        "max_new_tokens": 6,
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


def test_methods_are_measured_until_they_know_no_more_than_the_retrained_model(path, capsys):
    assert main(["study", str(path), "--dry-run"]) == 0
    listed = [line.rpartition("seed-0/")[2] for line in capsys.readouterr().out.splitlines()]
    assert listed[:2] == ["target", "retrain"]
    assert len(listed) == 5
    assert main(["study", str(path)]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    seed = path.parent / "out" / "seed-0"
    assert read_lines(seed / "target.jsonl") == facts(0, 20)
    assert read_lines(seed / "kept.jsonl") == facts(8, 14)
    assert read_lines(seed / "utility.jsonl") == facts(14, 20)
    assert read_lines(seed / "retrain.jsonl") == facts(8, 20)
    table = json.loads((path.parent / "out" / "table.json").read_text())
    rows = table["rows"]
    assert [*rows] == [
        "before training", "target", "retrained", "ascent", "NPO and KL", "too fast", "task vector",
    ]  # fmt: skip
    assert rows["retrained"]["privleak"]["mean"] == 0
    assert rows["target"]["verbmem"]["mean"] > rows["before training"]["verbmem"]["mean"]
    (curves,) = table["curves"]
    bar = rows["retrained"]["knowmem_forget"]["mean"]
    for name in ("ascent", "NPO and KL", "task vector"):
        known = [stage["knowmem_forget"] for stage in curves[name]]
        assert all(value > bar for value in known[:-1])
        assert rows[name]["knowmem_forget"]["mean"] == known[-1]
        assert known[-1] <= bar or curves[name][-1]["step"] == (1 if "task" in name else 4)
    assert len(curves["too fast"]) == 1  # it diverged before the first measurement
    assert rows["too fast"]["verbmem"]["mean"] is None
    assert "diverged" in shown
    # A stage is the run itself after as many steps: measured again, the last one is the same.
    last = curves["ascent"][-1]
    run = RunFolder(seed / "methods" / "ascent")
    assert run.tested_step()[0] == last["step"]
    forget = read_lines(seed / "forget.jsonl")
    assert read_lines(seed / "request-1.jsonl") + read_lines(seed / "request-2.jsonl") == forget
    assert read_lines(seed / "request-2-so-far.jsonl") == forget
    assert read_lines(seed / "share-0.25-so-far.jsonl") == forget[:4]
    second = RunFolder(next((seed / "methods").glob("ascent_request_2-*/")))
    assert second.config()["model"] == str(next((seed / "methods").glob("ascent_request_1-*/")))
    requests = table["requests"]["ascent"]
    assert [*requests] == ["share 0.25", "share 0.5", "request 1", "request 2"]
    assert "PrivLeak" in shown
    assert (path.parent / "out" / "forgetting.png").exists()
    assert main(["study", str(path)]) == 0  # what has ended is not done again
    assert json.loads((path.parent / "out" / "table.json").read_text()) == table
    load_model(run.path)


def test_without_questions_texts_decide():
    measure = Measure(None, 4, None, {"verbmem": 20.0, "auc_min_k": 0.5})
    assert measure.has_forgotten({"verbmem": 20.0})
    assert not measure.has_forgotten({"verbmem": 20.1})


def test_fictional_people_are_told_apart_by_their_names():
    found = people(300, seed=4)
    assert len({person.name for person in found}) == 300
    assert found == people(300, seed=4)
    assert people(2, seed=5) != found[:2]
    for person in found:
        assert person.name in person.text
        for _, answer in person.questions:
            words = answer.removesuffix(".").split()[1:]
            assert all(word in person.text for word in words)
    assert len(found[0].rows) == 5


@pytest.mark.parametrize(
    ("change", "key", "part"),
    [
        ({"data": {"forget": "a", "retain": "b"}}, "data.holdout", "missing"),
        ({"requests": ("other",)}, "requests", "ascent"),
        ({"folds": 1}, "folds", "2"),
        ({"shares": (0.0,)}, "shares", "above 0"),
    ],
)
def test_mistakes(change, key, part):
    keys = {
        "run": {},
        "data": {"forget": "a", "retain": "b", "holdout": "c"},
        "unlearn": {},
        "methods": {"ascent": {}},
        "output": "o",
    }
    with refused(key, part):
        MuseConfig(**(keys | change))


def test_a_schedule_that_ends_is_refused(path, capsys):
    flag = "--unlearn.optimizer.schedule=linear"
    assert main(["study", str(path), "--dry-run", flag]) == 2
    assert "schedule: must be constant" in capsys.readouterr().err


def test_a_method_that_is_never_measured_is_refused(path, capsys):
    assert main(["study", str(path), "--dry-run", "--unlearn.eval_every=5"]) == 2
    assert "eval_every: must be at most steps, 4 (got 5)" in capsys.readouterr().err


def test_texts_are_needed(path, capsys):
    rows = [row for row in facts(20, 28) if row["subtask"] == "question"]
    write_jsonl(path.parent / "holdout.jsonl", rows)
    assert main(["study", str(path)]) == 2
    assert "data: holdout has no texts" in capsys.readouterr().err

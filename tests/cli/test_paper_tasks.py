"""Tasks of the MeZO paper by name in finetune and evaluate, with a tiny model."""

import json

import pytest

from jaxlm.cli.main import main
from tests.helpers.tiny import sentences, write_jsonl


@pytest.fixture
def words(tmp_path, tiny_model):
    for split, count in (("train", 40), ("validation", 16)):
        rows = [{"sentence": row["text"], "label": row["label"]} for row in sentences(count)]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    return [
        f"--model={tiny_model}",
        "--task.name=opt/sst2",
        "--task.template={sentence} it was {label}",
        "--task.labels=[good, bad]",
        f"--task.train={tmp_path / 'train.jsonl'}",
        f"--task.test={tmp_path / 'validation.jsonl'}",
        "--task.num_train=24",
        "--task.num_validation=8",
    ]


def evaluate(capsys, *words):
    capsys.readouterr()
    assert main(["evaluate", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_zero_shot_and_with_demonstrations(words, capsys) -> None:
    zero = evaluate(capsys, *words)
    assert (zero["examples"], zero["majority_accuracy"]) == (16, 0.5)
    few = evaluate(capsys, *words, "--icl=2")
    assert few["examples"] == 16
    assert "calibrated_accuracy" not in few


def test_options_of_its_own_are_trained_on_as_completions(tmp_path, tiny_model, capsys) -> None:
    rows = [
        {
            "premise": f"the film was {word}",
            "question": "cause",
            "choice1": f"it was {'good' if i % 2 == 0 else 'bad'} film",
            "choice2": f"it was {'bad' if i % 2 == 0 else 'good'}",
            "label": i // 2 % 2,
        }
        for i, word in enumerate(["bright", "dull", "fine", "cold"] * 10)
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    words = [f"--model={tiny_model}", "--task.name=opt/copa", f"--task.test={source}"]
    words += [f"--task.train={source}", "--task.num_validation=8"]
    output = tmp_path / "run"
    small = ["--optimizer.name=adam", "--steps=3", "--batch_size=4", f"--output={output}"]
    assert main(["finetune", *words, *small]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["forwards"], summary["backwards"]) == (3, 3)
    assert summary["config"]["task"]["num_train"] == 1000
    found = evaluate(capsys, output)
    assert found["accuracy"] == summary["test"]["accuracy"]
    assert "majority_accuracy" not in found


def test_there_is_nothing_to_train_on(tmp_path, tiny_model, capsys) -> None:
    row = {"title": "film", "context": "it was good", "question": "it", "answers": {"text": ["x"]}}
    source = write_jsonl(tmp_path / "rows.jsonl", [row] * 2)
    words = [f"--model={tiny_model}", "--task.name=opt/squad", f"--task.test={source}"]
    words += ["--task.train=null", "--task.validation=null"]
    capsys.readouterr()
    assert main(["finetune", *words, f"--output={tmp_path / 'run'}"]) == 2
    assert "task.train: there are no such examples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--icl=-1"], "icl: must be from 0 to"),
        (["--icl=2", "--split=train"], "split: must be test with icl (got train)"),
        (["--icl=41"], "icl: task.train has 40 examples to draw demonstrations from (got 41)."),
    ],
)
def test_mistakes_of_demonstrations(flags, message, words, capsys) -> None:
    capsys.readouterr()
    assert main(["evaluate", *words, *flags]) == 2
    assert message in capsys.readouterr().err

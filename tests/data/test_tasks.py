from pathlib import Path

import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import TaskConfig, load_task, shipped_names, shipped_task, task_config

GIVEN = {"name": "trec", "template": "{text} {label}", "labels": ["word", "thing"]}
FILES = {split: f"jaxlm:subj/{split}.jsonl.gz" for split in ("train", "validation", "test")}


def test_sequences_become_tuples() -> None:
    config = task_config({**GIVEN, "classes": [1, "two"], "fields": ["text"], "k": 16})
    assert config == TaskConfig(
        name="trec",
        template="{text} {label}",
        labels=("word", "thing"),
        classes=(1, "two"),
        fields=("text",),
        k=16,
    )
    assert (config.train, config.validation, config.test) == (None, None, None)
    assert config.label_field == "label"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": ["word", " "]},
            "task.labels: word 2 is empty. Give a word for every class.",
        ),
        (
            {"labels": ["word"]},
            "task.labels: needs a word for each class, at least two (got ('word',)). Give the "
            "others.",
        ),
        (
            {"labels": ["word", "thing", "word"]},
            "task.labels: has a word twice (got 'word'). Give every class its own.",
        ),
        (
            {"labels": ["no", True]},
            "task.labels: holds what is not text (got True). Put it in quotes.",
        ),
        ({"labels": "word"}, "task.labels: not a list (got 'word'). Give one."),
        ({"labels": None}, "task.labels: not a list (got None). Give one."),
        (
            {"classes": ["a"]},
            "task.classes: needs 2 names, as many as task.labels (got 1). Give one for each label, "
            "in the same order.",
        ),
        (
            {"classes": [1, "1"]},
            "task.classes: has a word twice (got '1'). Give every class its own.",
        ),
        ({"k": "many"}, "task.k: must be a whole number (got 'many'). Correct it."),
        ({"k": True}, "task.k: must be a whole number (got True). Correct it."),
        ({"k": 0}, "task.k: must be from 1 to 2147483647 (got 0). Correct it."),
        (
            {"num_train": 10**12},
            "task.num_train: must be from 1 to 2147483647 (got 1000000000000). Correct it.",
        ),
        (
            {"test_seed": -1},
            "task.test_seed: must be from 0 to 2**32 - 1 (got -1). Correct it.",
        ),
        ({"threshold": float("nan")}, "task.threshold: must be finite (got nan). Correct it."),
        ({"k": [16]}, "task.k: must be a whole number (got [16]). Correct it."),
        ({"name": ["trec"]}, "task.name: not text (got ['trec']). Put it in quotes."),
        (
            {"labels": ["a", "\ud800"]},
            r"task.labels: holds half of a character (got '\ud800'). Write the whole one.",
        ),
        (
            {"template": "\ud800{label}"},
            r"task.template: holds half of a character (got '\ud800{label}'). Write the whole one.",
        ),
        ({"max_length": -1}, "task.max_length: must be from 1 to 2147483647 (got -1). Correct it."),
        ({"train": 3}, "task.train: not the name of a file or data set (got 3). Give that."),
        ({"template": 3}, "task.template: not text (got 3). Put it in quotes."),
        (
            {"template": "It was good"},
            "task.template: has no {label} (got 'It was good'). Put it where the label word "
            "stands.",
        ),
        (
            {"validation": "hold_out"},
            "task.validation: nothing says how many examples to hold out (got hold_out). Give "
            "task.k, task.num_train or task.num_validation.",
        ),
        ({"lables": ["a", "b"]}, "task.lables: not a key of a task. Did you mean task.labels?"),
        (
            {"zzz": 1},
            "task.zzz: not a key of a task. Use one of name, train, validation, test, template, "
            "labels, label_field, classes, fields, k, num_train, num_validation, num_test, "
            "test_seed, max_length, max_new_tokens, first_field_limit, truncation, threshold.",
        ),
    ],
)
def test_mistakes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        task_config({**GIVEN, **changes})
    assert str(caught.value) == message


@pytest.mark.parametrize("key", ["name", "template", "labels"])
def test_missing_key(key: str) -> None:
    with pytest.raises(UserError) as caught:
        task_config({other: value for other, value in GIVEN.items() if other != key})
    name = "None" if key == "name" else "'trec'"
    assert str(caught.value) == (
        f"task.{key}: missing, and task.name is not that of a task that is known (got {name}). "
        "Give it, or the name of a shipped task (mr, subj)."
        + ("" if key == "name" else " Did you mean roberta/trec?")
    )


def test_shipped_tasks_and_overrides() -> None:
    assert shipped_names() == ["mr", "subj"]
    assert shipped_task("subj") == task_config({"name": "subj"})
    assert {split: getattr(shipped_task("subj"), split) for split in FILES} == FILES
    assert len(shipped_task("mr").labels) == 2
    changed = task_config({"name": "subj", "validation": None, "k": 4, "train": "mine.jsonl"})
    assert (changed.train, changed.validation, changed.k) == ("mine.jsonl", None, 4)
    assert changed.test == FILES["test"]


def letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


@pytest.mark.parametrize(("name", "train"), [("mr", 7661), ("subj", 7000)])
def test_shipped_data(name: str, train: int) -> None:
    """Whole, of both classes, and no sentence in two splits."""
    task = load_task(shipped_task(name), seed=0)
    assert [len(task.train), len(task.validation), len(task.test)] == [train, 1000, 1000]
    splits = [
        {letters(example.fields["text"]) for example in split}
        for split in (task.train, task.validation, task.test)
    ]
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]
    for split in (task.train, task.validation, task.test):
        labels = [example.label for example in split]
        assert set(labels) == {0, 1}
        assert 0.45 < sum(labels) / len(labels) < 0.55


def test_shipped_files_say_where_they_come_from_and_are_small() -> None:
    import yaml

    import jaxlm.data

    folder = Path(jaxlm.data.__file__).parent.parent / "assets" / "tasks"
    for name in shipped_names():
        content = yaml.safe_load((folder / name / "task.yaml").read_text(encoding="utf-8"))
        assert content["licence"] == "CC-BY-4.0"
        assert "Pang" in content["attribution"]
        assert "Changes" in content["attribution"]
        assert content["url"].startswith("https://")
        for archive in (folder / name).glob("*.gz"):
            assert archive.read_bytes()[3:8] == bytes(5)  # no name, no date
    assert sum(path.stat().st_size for path in folder.rglob("*.*")) < 2_000_000

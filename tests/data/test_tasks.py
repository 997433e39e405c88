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
            "task.labels: word 2 is empty: give a word for every class.",
        ),
        (
            {"labels": ["word"]},
            "task.labels has 1 words: give one for each class, at least two.",
        ),
        (
            {"labels": ["word", "thing", "word"]},
            "task.labels has 'word' twice: give every class its own.",
        ),
        (
            {"labels": ["no", True]},
            "task.labels holds True, which is not text: put it in quotes.",
        ),
        ({"labels": "word"}, "task.labels is 'word', which is not a list."),
        ({"labels": None}, "task.labels is None, which is not a list."),
        (
            {"classes": ["a"]},
            "task.classes has 1 names for 2 labels: give one for each label, in the same order.",
        ),
        ({"classes": [1, "1"]}, "task.classes has '1' twice: give every class its own."),
        ({"k": "many"}, "task.k is 'many', which is not a whole number."),
        ({"k": True}, "task.k is True, which is not a whole number."),
        ({"k": 0}, "task.k is 0: give a whole number of at least 1."),
        ({"max_length": -1}, "task.max_length is -1: give a whole number of at least 1."),
        ({"train": 3}, "task.train is 3, which is not the name of a file or data set."),
        ({"template": 3}, "task.template is 3, which is not text: put it in quotes."),
        (
            {"template": "It was good"},
            "task.template 'It was good' has no {label}: put it where the label word stands.",
        ),
        (
            {"validation": "hold_out"},
            "task.validation is hold_out, but task.k is not given: give task.k.",
        ),
        ({"lables": ["a", "b"]}, "task.lables is not a key of a task: did you mean task.labels?"),
        (
            {"zzz": 1},
            "task.zzz is not a key of a task: use one of name, train, validation, test, template, "
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
    assert str(caught.value) == (
        f"task.{key} is missing: give it, or the name of a shipped task (mr, subj)."
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
        content = yaml.safe_load((folder / name / "task.yaml").read_text())
        assert content["licence"] == "CC-BY-4.0"
        assert "Pang" in content["attribution"]
        assert "Changes" in content["attribution"]
        assert content["url"].startswith("https://")
        for archive in (folder / name).glob("*.gz"):
            assert archive.read_bytes()[3:8] == bytes(5)  # no name, no date
    assert sum(path.stat().st_size for path in folder.rglob("*.*")) < 2_000_000

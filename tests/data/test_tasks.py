from pathlib import Path

import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import TaskConfig, load_task, shipped_names, shipped_task, task_config
from tests.helpers.sentences import refused

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
    ("key", "value"),
    [
        ("labels", ["word", " "]),
        ("labels", ["word"]),
        ("labels", ["word", "thing", "word"]),
        ("labels", ["no", True]),
        ("labels", ["no", None]),
        ("labels", "word"),
        ("labels", ["a", "\ud800"]),
        ("classes", ["a"]),
        ("classes", [1, "1"]),
        ("classes", [1, 10**12]),
        ("k", "many"),
        ("k", True),
        ("k", 0),
        ("k", [16]),
        ("num_train", 10**12),
        ("test_seed", -1),
        ("threshold", float("nan")),
        ("max_length", -1),
        ("name", ["trec"]),
        ("template", "\ud800{label}"),
        ("template", 3),
        ("template", "It was good"),
        ("train", 3),
        ("validation", "hold_out"),
        ("options", "several"),
        ("output", "number"),
        ("metric", "f1"),  # of a choice
        ("objective", "f1"),
        ("truncation", "right"),
        ("read", 3),
        ("missing_label", "none"),
    ],
)
def test_mistakes(key: str, value: object) -> None:
    with refused(f"task.{key}"):
        task_config({**GIVEN, key: value})


def test_a_mistake_in_its_words() -> None:
    with pytest.raises(UserError) as caught:
        task_config({**GIVEN, "labels": ["word"]})
    assert str(caught.value) == (
        "task.labels: needs a word for each class, at least two (got ('word',)). Give the others."
    )


def test_keys_that_are_none() -> None:
    for key, hint in (("lables", "Did you mean task.labels?"), ("zzz", "Use one of train, ")):
        with refused(f"task.{key}", hint):
            task_config({**GIVEN, key: 1})


@pytest.mark.parametrize("key", ["name", "template", "labels"])
def test_missing_key(key: str) -> None:
    hints = [
        "a shipped task (mr, subj)",
        *([] if key == "name" else ["Did you mean roberta/trec?"]),
    ]
    with refused(f"task.{key}", "missing", *hints):
        task_config({other: value for other, value in GIVEN.items() if other != key})


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


@pytest.mark.parametrize(
    ("name", "train"), [("mr", 7661), pytest.param("subj", 7000, marks=pytest.mark.slow)]
)
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

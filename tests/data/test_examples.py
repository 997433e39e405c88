import json
from pathlib import Path

import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import Task, load_task, task_config


def load(folder: Path, rows, *, seed: int = 0, name: str = "train.jsonl", **changes) -> Task:
    if isinstance(rows, str):
        (folder / name).write_text(rows)
    else:
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {
        "name": "mine",
        "train": name,
        "template": "{text} It was {label}",
        "labels": ["terrible", "great"],
        **changes,
    }
    return load_task(task_config(values), seed=seed, base_dir=folder)


def classes(task: Task) -> list[int]:
    return [example.label for example in task.train]


def test_examples(tmp_path) -> None:
    rows = [{"text": "a", "label": 1, "other": [3]}, {"text": "", "label": 0}]
    task = load(tmp_path, rows, test="train.jsonl")
    assert [example.fields for example in task.train] == [{"text": "a"}, {"text": ""}]
    assert classes(task) == [1, 0]
    assert [example.id for example in task.train] == ["train.jsonl:1", "train.jsonl:2"]
    assert task.validation == ()
    assert task.test == task.train


@pytest.mark.parametrize(
    ("labels", "changes"),
    [
        ([0, 1], {}),
        (["0", "1"], {}),
        (["terrible", "great"], {}),
        (["terrible", 1], {}),
        (["neg", "pos"], {"classes": ["neg", "pos"]}),
        ([1, 2], {"classes": [1, 2]}),
        (["1", "2"], {"classes": [1, 2]}),
        ([0, "great"], {"classes": ["neg", "pos"]}),
        ([1, 0], {"classes": [1, 0]}),
        (["0", "1"], {"labels": ["0", "1"]}),
        ([1, 2], {"labels": ["1", "2"], "classes": [1, 2]}),
    ],
)
def test_labels(tmp_path, labels, changes) -> None:
    rows = [{"text": "a", "label": label} for label in labels]
    assert classes(load(tmp_path, rows, **changes)) == [0, 1]


def test_other_label_field_and_csv(tmp_path) -> None:
    task = load(tmp_path, "text,y\na,1\nb,0\n", name="train.csv", label_field="y")
    assert classes(task) == [1, 0]
    assert task.train[1].id == "train.csv:3"


def test_lm_bff_template_finds_the_fields(tmp_path) -> None:
    template = "*cls**sent_0*_It_was*mask*.*sep+*"
    rows = [{"sentence": "a", "label": 0}]
    task = load(tmp_path, rows, template=template)
    assert task.template.render(task.train[0].fields, "great").text == "a It was great."
    task = load(tmp_path, [{"q": "b", "label": 0}], template=template, fields=["q"])
    assert task.train[0].fields == {"q": "b"}


def test_k_and_hold_out(tmp_path) -> None:
    rows = [{"text": str(i), "label": i % 2} for i in range(20)]
    task = load(tmp_path, rows, k=3, validation="hold_out")
    assert sorted(classes(task)) == [0, 0, 0, 1, 1, 1]
    assert sorted(example.label for example in task.validation) == [0, 0, 0, 1, 1, 1]
    assert not {e.id for e in task.train} & {e.id for e in task.validation}
    assert load(tmp_path, rows, k=3).train == task.train
    assert load(tmp_path, rows, k=3, seed=1).train != task.train


def test_k_leaves_other_splits_whole(tmp_path) -> None:
    rows = [{"text": str(i), "label": i % 2} for i in range(20)]
    task = load(tmp_path, rows, k=3, validation="train.jsonl", test="train.jsonl")
    assert [len(task.train), len(task.validation), len(task.test)] == [6, 20, 20]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"sentence": "a", "label": 0},
            "train.jsonl, line 2 has no field 'text', which task.template names: its fields are "
            "'sentence', 'label'.",
        ),
        (
            {"text": "a", "y": 0},
            "train.jsonl, line 2 has no field 'label', which task.label_field names: its fields "
            "are 'text', 'y'.",
        ),
        (
            {"text": None, "label": 0},
            "train.jsonl, line 2: field 'text' is null: give a value or leave the line out.",
        ),
        (
            {"text": float("nan"), "label": 0},
            "train.jsonl, line 2: field 'text' is null: give a value or leave the line out.",
        ),
        (
            {"text": 3, "label": 0},
            "train.jsonl, line 2: field 'text' holds 3, which is not text: put it in quotes.",
        ),
        (
            {"text": "a", "label": None},
            "train.jsonl, line 2: field 'label' is null: give a value or leave the line out.",
        ),
        (
            {"text": "a", "label": True},
            "train.jsonl, line 2: label True is neither text nor a whole number: give an index, a "
            "label word or a class name.",
        ),
        (
            {"text": "a", "label": 1.0},
            "train.jsonl, line 2: label 1.0 is neither text nor a whole number: give an index, a "
            "label word or a class name.",
        ),
        (
            {"text": "a", "label": 2},
            "train.jsonl, line 2: label 2 is not one of terrible, great nor an index from 0 to 1: "
            "correct it, or name the classes in task.classes.",
        ),
        (
            {"text": "a", "label": -1},
            "train.jsonl, line 2: label -1 is not one of terrible, great nor an index from 0 to 1: "
            "correct it, or name the classes in task.classes.",
        ),
        (
            {"text": "a", "label": "Great"},
            "train.jsonl, line 2: label 'Great' is not one of terrible, great nor an index from 0 "
            "to 1: correct it, or name the classes in task.classes.",
        ),
    ],
)
def test_bad_rows(tmp_path, row: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, [{"text": "good", "label": 1}, row])
    assert str(caught.value) == message


def test_label_that_is_an_index_and_a_word(tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, [{"text": "a", "label": 1}], labels=["1", "2", "3"])
    assert str(caught.value) == (
        "train.jsonl, line 1: label 1 may be an index or a label word: name the classes in "
        "task.classes."
    )


def test_empty_text_of_a_csv_is_empty(tmp_path) -> None:
    task = load(tmp_path, "text,label\n,1\n", name="train.csv")
    assert task.train[0].fields == {"text": ""}


def test_no_data(tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, [], train=None)
    assert str(caught.value) == "task has no data: give task.train, task.test or both."


def test_test_alone(tmp_path) -> None:
    task = load(tmp_path, [{"text": "a", "label": 1}], train=None, test="train.jsonl", k=4)
    assert (len(task.train), len(task.test)) == (0, 1)


def test_k_larger_than_a_class(tmp_path) -> None:
    rows = [{"text": "a", "label": 1}] * 3
    with pytest.raises(UserError) as caught:
        load(tmp_path, rows, k=2)
    assert str(caught.value) == (
        "task.k asks for 2 examples of every class, but task.train has 0 of 'terrible': lower "
        "task.k or give more examples."
    )

import json
from pathlib import Path

import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import Task, load_task, task_config
from tests.helpers.sentences import refused


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
    ("row", "said"),
    [
        ({"sentence": "a", "label": 0}, "has no field 'text', which task.template reads"),
        ({"text": "a", "y": 0}, "has no field 'label', which task.label_field reads"),
        ({"text": None, "label": 0}, "field 'text' is null"),
        ({"text": float("nan"), "label": 0}, "field 'text' is null"),
        ({"text": 3, "label": 0}, "field 'text' is not text (got 3)"),
        ({"text": "a", "label": None}, "field 'label' is null"),
        ({"text": "a", "label": True}, "the label is neither text nor a whole number"),
        ({"text": "a", "label": 1.0}, "the label is neither text nor a whole number"),
        ({"text": "a", "label": 2}, "is not one of terrible, great nor an index from 0 to 1"),
        ({"text": "a", "label": -1}, "is not one of terrible, great"),
        ({"text": "a", "label": "Great"}, "is not one of terrible, great"),
    ],
)
def test_bad_rows(tmp_path, row: dict, said: str) -> None:
    with refused("train.jsonl, line 2", said):
        load(tmp_path, [{"text": "good", "label": 1}, row])


def test_label_that_is_an_index_and_a_word(tmp_path) -> None:
    with refused("train.jsonl, line 1", "the label may be an index or a label word"):
        load(tmp_path, [{"text": "a", "label": 1}], labels=["1", "2", "3"])


def test_empty_text_of_a_csv_is_empty(tmp_path) -> None:
    task = load(tmp_path, "text,label\n,1\n", name="train.csv")
    assert task.train[0].fields == {"text": ""}


def test_test_alone(tmp_path) -> None:
    task = load(tmp_path, [{"text": "a", "label": 1}], train=None, test="train.jsonl", k=4)
    assert (len(task.train), len(task.test)) == (0, 1)


def saved_with_names(folder: Path, names: list[str]) -> list[str]:
    """A folder of `datasets` whose row i has class i, and the names in the order of the rows."""
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    rows = [{"text": name, "label": i} for i, name in enumerate(names)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(folder / "saved"))
    return names


@pytest.mark.parametrize("given", ["labels", "classes"])
@pytest.mark.parametrize(
    "names", [["great", "terrible"], ["Great", "Terrible"], ["terrible", "great"]]
)
def test_class_names_of_the_data_are_matched_by_name(tmp_path, given, names) -> None:
    saved_with_names(tmp_path, names)
    words = ["terrible", "great"]
    changes = (
        {"labels": words} if given == "labels" else {"labels": ["no", "yes"], "classes": words}
    )
    task = load(tmp_path, [], train="saved", **changes)
    assert [words[example.label] for example in task.train] == [name.lower() for name in names]


def test_class_names_of_other_words_leave_the_order_as_it_is(tmp_path) -> None:
    saved_with_names(tmp_path, ["negative", "positive"])
    assert classes(load(tmp_path, [], train="saved")) == [0, 1]
    assert classes(load(tmp_path, [], train="saved", classes=[1, 0])) == [1, 0]


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (["great", "awful"], {}),
        (["negative", "positive"], {"classes": ["neg", "pos"]}),
    ],
)
def test_a_class_name_that_does_not_match_is_refused(tmp_path, names, changes) -> None:
    saved_with_names(tmp_path, names)
    with pytest.raises(UserError, match=r"saved, row \d: the data name the class \d '(awful|neg)"):
        load(tmp_path, [], train="saved", **changes)


def test_classes_of_a_known_task_are_matched_by_name(tmp_path) -> None:
    import datasets

    names = ["not_entailment", "entailment"]
    features = datasets.Features(
        {
            **dict.fromkeys(("premise", "hypothesis"), datasets.Value("string")),
            "label": datasets.ClassLabel(names=names),
        }
    )
    rows = [{"premise": "a", "hypothesis": "b", "label": i} for i in (0, 1)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    values = {"name": "opt/rte", "train": "saved", "test": None, "validation": None}
    task = load_task(task_config(values), seed=0, base_dir=tmp_path)
    assert {task.config.labels[example.label] for example in task.train} == {"Yes", "No"}
    by_row = {example.id: task.config.labels[example.label] for example in task.train}
    assert by_row == {"saved:1": "No", "saved:2": "Yes"}


def test_outputs_of_a_model_are_matched_by_name() -> None:
    config = task_config({"name": "x", "template": "{text} {label}", "labels": ["bad", "good"]})
    assert config.columns_of(["good", "bad"]) == [1, 0]
    assert config.columns_of(["Bad", "GOOD"]) == [0, 1]
    assert config.columns_of(["LABEL_0", "LABEL_1"]) == config.columns_of([]) == [0, 1]
    for names in (["good", "awful"], ["good", "bad", "none"]):
        with pytest.raises(UserError, match=r"^model: its classes are not bad, good"):
            config.columns_of(names)


def test_texts_of_training_are_counted_whatever_their_labels(tmp_path) -> None:
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": 0}) + "\n" for text in ("a", "b", "a", "c"))
    )
    rows = [{"text": "a", "label": 1}, {"text": "b ", "label": 0}, {"text": "d", "label": 0}]
    assert load(tmp_path, rows, test="test.jsonl").repeated() == 2


def test_digests_are_of_the_examples_and_not_of_their_file(tmp_path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    whole = load(tmp_path, rows, test="train.jsonl").digests()
    assert set(whole) == {"train", "test"}
    (tmp_path / "other.jsonl").write_text("\n" + (tmp_path / "train.jsonl").read_text())
    assert load(tmp_path, rows, test="other.jsonl").digests() == whole
    for changed in (rows[::-1], [rows[0]], [rows[0], {"text": "b", "label": 1}]):
        assert load(tmp_path, changed).digests()["train"] != whole["train"]


def test_hold_out_takes_what_num_train_leaves(tmp_path) -> None:
    rows = [{"text": str(i), "label": i % 2} for i in range(20)]
    for num_train, held_out in ((4, 4), (15, 5)):
        task = load(tmp_path, rows, num_train=num_train, validation="hold_out")
        assert (len(task.train), len(task.validation)) == (num_train, held_out)
        assert not {e.id for e in task.train} & {e.id for e in task.validation}
    with pytest.raises(UserError, match=r"task.num_train: leaves none of the 20 examples"):
        load(tmp_path, rows, num_train=20, validation="hold_out")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_is_none(tmp_path, seed) -> None:
    with pytest.raises(UserError, match=r"^seed: must be from 0"):
        load(tmp_path, [{"text": "a", "label": 1}], seed=seed)


@pytest.mark.parametrize("label", ["nan", "inf", "-Infinity", "1e999", [1]])
def test_a_score_that_is_not_finite_is_no_label(tmp_path, label) -> None:
    with pytest.raises(
        UserError, match=r"the label is not a number, which task.threshold compares"
    ):
        load(tmp_path, [{"text": "a", "label": label}], threshold=0.5)


def test_options_of_each_row(tmp_path) -> None:
    rows = [
        {"text": "a", "options": ["x", "y z"], "label": 1},
        {"text": "b", "options": ["x", "y", "z"], "label": "x"},
    ]
    task = load(tmp_path, rows, labels=None, options="per_example")
    assert [(e.options, e.label) for e in task.train] == [(("x", "y z"), 1), (("x", "y", "z"), 0)]
    assert (task.config.metric, task.config.objective) == ("accuracy", "classification")
    for wrong in ({"options": "xy"}, {"label": "w"}, {"label": 2}, {"label": True}):
        with pytest.raises(UserError, match=r"^train.jsonl, line 1: .*\(got .*\)\. "):
            load(tmp_path, [{**rows[0], **wrong}], labels=None, options="per_example")


def test_an_answer_that_is_a_text(tmp_path) -> None:
    rows = [{"text": "a", "answer": "x"}, {"text": "b", "answer": ["y", "z"]}]
    keys = {"labels": None, "output": "text", "label_field": "answer"}
    task = load(tmp_path, rows, **keys)
    assert [(e.answers, e.options) for e in task.train] == [
        (("x",), ("x\n",)),
        (("y", "z"), ("y\n",)),
    ]
    assert (task.config.metric, task.config.objective) == ("f1", "completion")
    for wrong in (3, [], [3]):
        with pytest.raises(UserError, match=r"^train.jsonl, line 1: field 'answer' is neither"):
            load(tmp_path, [{"text": "a", "answer": wrong}], **keys)


def test_rows_are_read_by_code_of_others_only_where_that_is_allowed(tmp_path, monkeypatch) -> None:
    """A configuration may come from anyone; also a function of jaxlm itself may do harm."""
    (tmp_path / "theirs.py").write_text(
        "from jaxlm.data import ParsedRow\n\ndef read(row):\n"
        "    return ParsedRow({'text': row['text'].upper()}, (row['label'],))\n\n"
        "def bare(row):\n    raise KeyError\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1}\n')
    values = {"name": "x", "template": "{text} {label}", "labels": ["no", "yes"]}

    def fields(read: str, **options) -> dict:
        config = task_config({**values, "train": "train.jsonl", "read": read})
        return config.load(seed=0, base_dir=tmp_path, **options).train[0].fields

    assert fields("theirs:read", allow_code=True) == {"text": "A"}
    with pytest.raises(UserError, match=r"^train.jsonl, line 1: has no field"):
        fields("theirs:bare", allow_code=True)
    for name in ("theirs:read", "jaxlm.cli.main:main", "os:system"):
        with pytest.raises(UserError, match=r"^task.read: names code outside .* --allow-code"):
            fields(name)
    for name in ("jaxlm.data.readers:none", "jaxlm.data.readers", "nowhere:read"):
        with pytest.raises(UserError, match=r"^task.read: there is no such function"):
            fields(name, allow_code=True)

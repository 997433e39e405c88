"""Prompts, options and metrics of the tasks of the MeZO paper, typed from its templates by hand."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import (
    Template,
    load_task,
    prompted,
    task_config,
    task_names,
    with_demonstrations,
    without_examples,
)
from jaxlm.evaluation import accuracy, token_f1
from tests.helpers.sentences import refused
from tests.helpers.tiny import write_jsonl

SQUAD = {
    "id": "5",
    "title": "Oslo",
    "context": "Oslo is the capital. It has a fjord.",
    "question": "What is Oslo? ",
    "answers": {"text": ["the capital", "a capital city"], "answer_start": [8, 8]},
}
DROP = {
    "section_id": "n",
    "query_id": "q",
    "passage": "Two goals, then one.",
    "question": " How many goals?",
    "answers_spans": {"spans": ["3", "three"], "types": ["number", "span"]},
}
RECORD = {
    "passage": "Ann met Bob in Rome.\n@highlight\nThe two talked",
    "query": "@placeholder spoke to Bob.",
    "entities": ["Rome", "Ann", "Ann Lee"],
    "answers": ["Ann", "Ann Lee"],
    "idx": {"passage": 0, "query": 0},
}
COPA = {"premise": "I fell.", "choice1": "The ice broke.", "choice2": "I ran home.", "idx": 0}
NLI = {"premise": "A man eats.", "hypothesis": "He is hungry."}
PAIR = {"sentence1": "A man eats.", "sentence2": "He is hungry."}
REVIEW = {"text": "A joy.", "label_text": "objective"}

# name: (row, prompt, options, right options, what is said, its metric). What is said is the place
# of an option, or a text where one is generated.
CASES: dict[str, tuple[dict[str, Any], str, list[str], list[int], int | str, float]] = {
    "opt/sst2": (
        {"sentence": "hide new secretions from the parental units ", "label": 0, "idx": 0},
        "hide new secretions from the parental units It was",
        [" terrible", " great"],
        [0],
        0,
        1.0,
    ),
    "opt/rte": (
        {**NLI, "label": 1},
        'A man eats.\nDoes this mean that "He is hungry." is true? Yes or No?\n',
        ["Yes", "No"],
        [1],
        1,
        1.0,
    ),
    "opt/cb": (
        {**NLI, "label": 2},
        'Suppose A man eats. Can we infer that "He is hungry."? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
        [2],
        0,
        0.0,
    ),
    "opt/boolq": (
        {"passage": "Oslo is a city.", "question": "is oslo a city", "answer": True},
        "Oslo is a city. Is oslo a city?\n",
        ["Yes", "No"],
        [0],
        0,
        1.0,
    ),
    "opt/wsc": (
        {"text": "Ann saw Bob when He ran.", "span1_text": "Bob", "span2_text": "He", "label": 1},
        "Ann saw Bob when He ran.\nIn the previous sentence, does the pronoun "
        '"he" refer to Bob? Yes or No?\n',
        ["No", "Yes"],
        [1],
        0,
        0.0,
    ),
    "opt/wic": (
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "My bank.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "A river bank.\nMy bank.\n",
        ["No", "Yes"],
        [0],
        0,
        1.0,
    ),
    "opt/multirc": (
        {"paragraph": "Ann ran.", "question": "Who ran?", "answer": "Ann", "label": 1},
        'Ann ran.\nQuestion: Who ran?\nI found this answer "Ann". Is that correct? Yes or No?\n',
        ["No", "Yes"],
        [1],
        1,
        1.0,
    ),
    "opt/copa": (
        {**COPA, "question": "cause", "label": 0},
        "I fell because",
        [" the ice broke.", " I ran home."],
        [0],
        0,
        1.0,
    ),
    "opt/record": (
        RECORD,
        "Ann met Bob in Rome.\n- The two talked\n-",
        [" Rome spoke to Bob.", " Ann spoke to Bob.", " Ann Lee spoke to Bob."],
        [1, 2],
        2,
        1.0,
    ),
    "opt/squad": (
        SQUAD,
        "Title: Oslo\nContext: Oslo is the capital. It has a fjord.\n"
        "Question: What is Oslo?\nAnswer:",
        [" the capital\n"],
        [0],
        "A big Capital.",  # big capital: one of two words, and all of "capital"
        2 / 3,
    ),
    "opt/drop": (
        DROP,
        "Passage: Two goals, then one.\nQuestion: How many goals?\nAnswer:",
        [" 3\n"],
        [0],
        "Three!",
        1.0,
    ),
    "roberta/sst-2": (
        {"sentence": "A joy.", "label": 1},
        "A joy. It was",
        [" terrible.", " great."],
        [1],
        1,
        1.0,
    ),
    "roberta/sst-5": (
        {"text": "A joy.", "label": 3},
        "A joy. It was",
        [" terrible.", " bad.", " okay.", " good.", " great."],
        [3],
        4,
        0.0,
    ),
    "roberta/mr": ({**REVIEW, "label": 0}, "A joy. It was", [" terrible.", " great."], [0], 0, 1.0),
    "roberta/cr": ({**REVIEW, "label": 1}, "A joy. It was", [" terrible.", " great."], [1], 1, 1.0),
    "roberta/mpqa": (
        {**REVIEW, "label": 1},
        "A joy. It was",
        [" terrible.", " great."],
        [1],
        0,
        0.0,
    ),
    "roberta/subj": (REVIEW, "A joy. This is", [" subjective.", " objective."], [1], 1, 1.0),
    "roberta/trec": (
        {"text": "Who is Ann?", "coarse_label": 0, "fine_label": 1},  # the hub's ABBR
        "",
        [
            "Description: Who is Ann?",
            "Entity: Who is Ann?",
            "Expression: Who is Ann?",
            "Human: Who is Ann?",
            "Location: Who is Ann?",
            "Number: Who is Ann?",
        ],
        [2],
        2,
        1.0,
    ),
    "roberta/cola": (
        {"sentence": "Ann run.", "label": 0},
        "Ann run. This is",
        [" incorrect.", " correct."],
        [0],
        0,
        1.0,
    ),
    "roberta/mnli": (
        {**NLI, "label": 2},  # the hub's contradiction
        "A man eats?",
        [" No, he is hungry.", " Yes, he is hungry.", " Maybe, he is hungry."],
        [0],
        0,
        1.0,
    ),
    "roberta/snli": (
        {**NLI, "label": 1},  # the hub's neutral
        "A man eats?",
        [" No, he is hungry.", " Yes, he is hungry.", " Maybe, he is hungry."],
        [2],
        1,
        0.0,
    ),
    "roberta/rte": (
        {**PAIR, "label": 0},  # the hub's entailment
        "A man eats?",
        [" Yes, he is hungry.", " No, he is hungry."],
        [0],
        0,
        1.0,
    ),
    "roberta/qnli": (
        {"question": "Who ran?", "sentence": "Ann ran.", "label": 1},
        "Who ran?",
        [" Yes, ann ran.", " No, ann ran."],
        [1],
        1,
        1.0,
    ),
    "roberta/qqp": (
        {"question1": "Who ran?", "question2": "Did Ann run?", "label": 0},
        "Who ran?",
        [" No, did Ann run?", " Yes, did Ann run?"],
        [0],
        0,
        1.0,
    ),
    "roberta/mrpc": (
        {**PAIR, "label": 1},
        "A man eats.",
        [" No, he is hungry.", " Yes, he is hungry."],
        [1],
        1,
        1.0,
    ),
    "roberta/sts-b": (
        {**PAIR, "label": 2.5},
        "A man eats.",
        [" No, he is hungry.", " Yes, he is hungry."],
        [1],
        1,
        1.0,
    ),
}
CALIBRATION = {
    "opt/sst2": ("It was", [" terrible", " great"]),
    "opt/rte": ("", ["Yes", "No"]),
    "opt/cb": ("", ["Yes", "No", "Maybe"]),
    "opt/boolq": ("", ["Yes", "No"]),
    "opt/wsc": ("", ["No", "Yes"]),
    "opt/wic": ("", ["No", "Yes"]),
    "opt/multirc": ("", ["No", "Yes"]),
    "opt/copa": ("because", [" the ice broke.", " I ran home."]),
    "opt/record": (
        "-",
        [" Rome spoke to Bob.", " Ann spoke to Bob.", " Ann Lee spoke to Bob."],
    ),
}


def loaded(name: str, folder: Path, rows: list[dict[str, Any]]):
    """A task whose test split is these rows in a local file."""
    source = str(write_jsonl(folder / "validation.jsonl", rows))
    config = task_config({"name": name, "train": None, "validation": None, "test": source})
    return load_task(config, seed=0)


def test_every_task_has_its_case() -> None:
    assert {name for name in task_names() if "/" in name} == set(CASES)
    assert len(CASES) == 11 + 15


@pytest.mark.parametrize("name", CASES)
def test_prompt_options_and_metric(name: str, tmp_path: Path) -> None:
    row, prompt, options, gold, said, value = CASES[name]
    task = loaded(name, tmp_path, [row])
    found = prompted(task, task.test[0])
    assert found.prompt == prompt
    assert list(found.options) == options
    assert list(found.gold) == gold
    if isinstance(said, str):
        assert token_f1(said, found.answers) == pytest.approx(value)
        return
    scores = np.eye(len(options))[[said]]
    assert accuracy(scores, np.array(gold[:1])) == (value if len(gold) == 1 else 0.0)
    assert accuracy(scores, np.isin(np.arange(len(options)), gold)[None]) == value


@pytest.mark.parametrize("name", CALIBRATION)
def test_the_prompt_of_the_domain(name: str, tmp_path: Path) -> None:
    task = without_examples(loaded(name, tmp_path, [CASES[name][0]]))
    found = prompted(task, task.test[0])
    assert (found.prompt, list(found.options)) == CALIBRATION[name]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a} Is {b} so? {label}.", "so? X."),
        ("{label}: {a}", "X: "),
        ("*cls**sent_0*_It_was*mask*.*sep+*", "It was X."),
        ("*cls**mask*:*+sent_0**sep+*", " X: "),  # the word goes with its space
        ("*cls**sent-_0*?*mask*,*+sentl_1**sep+*", "? X, "),
    ],
)
def test_any_template_without_its_fields(template: str, text: str) -> None:
    assert Template.parse(template).bare.render({}, "X").text == text


def test_an_answer_in_words_has_no_calibration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the task generates a text.*got opt/squad"):
        without_examples(loaded("opt/squad", tmp_path, [SQUAD]))


def test_an_effect_and_a_premise_without_a_stop(tmp_path: Path) -> None:
    row = {**COPA, "premise": "I fell ", "question": "effect", "label": 1}
    task = loaded("opt/copa", tmp_path, [row])
    found = prompted(task, task.test[0])
    assert found.completed == "I fell so I ran home."


def test_a_question_that_has_its_mark_and_the_label_of_superglue(tmp_path: Path) -> None:
    task = loaded("opt/boolq", tmp_path, [{"passage": "A.", "question": "Is it?", "label": 0}])
    found = prompted(task, task.test[0])
    assert (found.prompt, found.gold) == ("A. Is it?\n", (1,))


@pytest.mark.parametrize(("score", "label"), [(0.0, 0), (2.49, 0), (2.5, 1), (5, 1)])
def test_a_score_is_cut_in_two_classes(score: float, label: int, tmp_path: Path) -> None:
    assert loaded("roberta/sts-b", tmp_path, [{**PAIR, "label": score}]).test[0].label == label


def test_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    task = loaded("roberta/snli", tmp_path, [{**NLI, "label": -1}, {**NLI, "label": 0}])
    assert [example.label for example in task.test] == [1]


@pytest.mark.parametrize("name", ["opt/squad", "opt/record"])
def test_a_folder_in_the_layout_of_the_hub(name: str, tmp_path: Path) -> None:
    """Files of splits as a data set has them, one row of each task with its nested fields."""
    row = CASES[name][0]
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [row] * 3)
    write_jsonl(folder / "validation.jsonl", [row])
    sources = {"train": str(folder), "test": f"{folder}:validation"}
    task = load_task(task_config({"name": name, **sources, "num_validation": 1}), seed=0)
    assert [len(getattr(task, split)) for split in ("train", "validation", "test")] == [2, 1, 1]
    assert prompted(task, task.test[0]).prompt == CASES[name][1]


def test_a_parquet_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "validation-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([RECORD]), path)
    values = {"name": "opt/record", "train": None, "validation": None, "test": str(path)}
    task = load_task(task_config(values), seed=0)
    assert prompted(task, task.test[0]).gold == (1, 2)


# name: (rows of train and test, those that are taken to train, validate and test)
COUNTS = {
    "opt/rte": ((2490, 277), (1000, 500, 277)),
    "opt/cb": ((250, 56), (150, 100, 56)),
    "opt/copa": ((400, 100), (300, 100, 100)),
    "opt/multirc": ((1600, 1200), (1000, 500, 1000)),
}


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("opt/rte", "opt/multirc")]


@pytest.mark.parametrize("name", ["opt/cb", "opt/copa", *LONG])
def test_counts_of_the_paper(name: str, tmp_path: Path) -> None:
    sizes, counts = COUNTS[name]
    row = {**CASES[name][0]}
    key = {"opt/copa": "premise", "opt/multirc": "paragraph"}.get(name, "premise")
    for split, size in zip(("train", "test"), sizes, strict=True):
        rows = [{**row, key: f"{split} {i}"} for i in range(size)]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    values = {"name": name, "train": "train.jsonl", "test": "test.jsonl"}
    task = load_task(task_config(values), seed=0, base_dir=tmp_path)
    splits = (task.train, task.validation, task.test)
    assert tuple(map(len, splits)) == counts
    order = np.random.RandomState(0).permutation(sizes[0])
    taken = [example.fields[key] for example in (*task.train, *task.validation)]
    assert taken == [f"train {i}" for i in order[: counts[0] + counts[1]]]
    other = load_task(task_config(values), seed=1, base_dir=tmp_path)
    assert {e.fields[key] for e in other.train} != {e.fields[key] for e in task.train}
    assert other.test == task.test


def test_k_of_a_class_for_training_and_as_many_for_validation(tmp_path: Path) -> None:
    rows = [{"sentence": f"s{i}", "label": i % 2} for i in range(80)]
    source = str(write_jsonl(tmp_path / "train.jsonl", rows))
    task = load_task(task_config({"name": "roberta/sst-2", "train": source, "test": None}), seed=13)
    for split in (task.train, task.validation):
        assert np.bincount([example.label for example in split]).tolist() == [16, 16]
    assert not {e.id for e in task.train} & {e.id for e in task.validation}


def test_demonstrations(tmp_path: Path) -> None:
    rows = [{"sentence": f"s{i}", "label": i % 2} for i in range(9)]
    train = str(write_jsonl(tmp_path / "train.jsonl", rows))
    test = str(write_jsonl(tmp_path / "test.jsonl", [{"sentence": "x", "label": 0}] * 2))
    values = {"name": "opt/sst2", "train": train, "validation": None, "test": test}
    task = load_task(task_config({**values, "num_train": None}), seed=0)
    found = with_demonstrations(task, 2)
    assert (found.train, found.validation, found.config.truncation) == ((), (), "left")
    words = ("terrible", "great")
    for example, seed in zip(
        found.test, np.random.RandomState(0).randint(0, 10000, 2), strict=True
    ):
        i, j = np.random.RandomState(seed).permutation(9)[:2]
        expected = f"s{i} It was {words[i % 2]}\n\ns{j} It was {words[j % 2]}\n\nx It was"
        assert prompted(found, example).prompt == expected
        assert prompted(found, example).options == (" terrible", " great")
    same = with_demonstrations(task, 3, seed=5)
    assert same.test[0].context == same.test[1].context
    assert prompted(without_examples(same), same.test[0]).prompt.endswith("\n\nIt was")
    for k in (0, 10):
        with pytest.raises(UserError, match=rf"icl: task.train has .* \(got {k}\)"):
            with_demonstrations(task, k)


def test_a_demonstration_ends_without_its_line_break(tmp_path: Path) -> None:
    task = loaded("opt/squad", tmp_path, [SQUAD])
    task = with_demonstrations(dataclasses.replace(task, train=task.test), 1)
    assert prompted(task, task.test[0]).prompt.count("Answer: the capital\n\nTitle: Oslo") == 1


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt/rte", {"hypothesis": None}, "field 'hypothesis' is null"),
        (
            "opt/wsc",
            {"span2_text": None},
            "is not a row of opt/wsc, which jaxlm.data.readers:wsc reads",
        ),
        ("opt/copa", {"question": "how"}, "is not a row of opt/copa"),
        ("opt/record", {"answers": ["Oslo"]}, "is not a row of opt/record"),
        ("opt/squad", {"answers": {"text": []}}, "is not a row of opt/squad"),
        ("opt/squad", {"answers": {"text": "Oslo"}}, "is not a row of opt/squad"),
        ("opt/squad", {"answers": {"text": [3]}}, "is not a row of opt/squad"),
        ("opt/record", {"answers": []}, "is not a row of opt/record"),
        ("opt/rte", {"label": 2}, "the label is not one of entailment, not_entailment"),
        ("opt/wsc", {"label": 2}, "is not a row of opt/wsc"),
        ("opt/wsc", {"label": float("inf")}, "is not a row of opt/wsc"),
        (
            "roberta/sts-b",
            {"label": "high"},
            "the label is not a number, which task.threshold compares (got 'high')",
        ),
    ],
)
def test_bad_rows(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        loaded(name, tmp_path, [{**CASES[name][0], **changes}])


def test_a_missing_field(tmp_path: Path) -> None:
    for name, said in (("opt/rte", "task.template reads"), ("opt/boolq", "opt/boolq reads")):
        with pytest.raises(
            UserError, match=rf"line 1: has no field '(premise|question)', which {said}"
        ):
            loaded(name, tmp_path, [{"hypothesis": "x", "label": 0}])


@pytest.mark.parametrize(
    ("name", "known"), [("opt/rt", "opt/sst2, opt/rte"), ("roberta/opt", "roberta/sst-2")]
)
def test_a_name_that_is_not_of_the_suite(name: str, known: str) -> None:
    with refused("task.name", f"not known (got {name!r})", known):
        task_config({"name": name})


def test_k_beside_the_number_of_a_known_task() -> None:
    with refused("task.num_train", "is given beside task.k (got 1000)"):
        task_config({"name": "opt/rte", "k": 16})

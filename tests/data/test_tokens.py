"""Words with tags: their tokens, their classes, and rows that are not such."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxlm.data import TokensConfig
from jaxlm.data.tokens import encode_words
from tests.helpers.sentences import refused

ROWS = [
    {"tokens": ["fun", "badly", "fun"], "tags": ["O", "B-X", "I-X"]},
    {"tokens": ["bad"], "tags": ["B-X"]},
]


def model(tokenizer, head: str = "none", names: tuple[str, ...] = (), limit: int = 96):
    sizes = {"max_positions": limit, "vocab_size": len(tokenizer), "pad_id": 0}
    config = SimpleNamespace(
        kind="encoder", head=head, label_names=names, num_labels=len(names), **sizes
    )
    return SimpleNamespace(tokenizer=tokenizer, config=config)


@pytest.fixture
def write(tmp_path: Path):
    def write(rows, name: str = "train.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def encoded(lm, *, test: str | None = None, **keys):
    return TokensConfig(test=test, **keys).load(seed=0).encode(lm)


def test_the_first_token_of_each_word_is_in_the_loss(wordpiece, write):
    rows = encoded(model(wordpiece), train=write(ROWS))
    assert rows.labels == ("B-X", "I-X", "O")
    row = rows.train.rows[0]
    pieces = wordpiece.convert_ids_to_tokens(row.ids)
    (whole,) = wordpiece([ROWS[0]["tokens"]], is_split_into_words=True)["input_ids"]
    assert list(row.ids) == whole
    assert (pieces[0], pieces[-1]) == ("[CLS]", "[SEP]")
    words = wordpiece([ROWS[0]["tokens"]], is_split_into_words=True).word_ids(0)
    # What transformers' examples do: the label of a word at its first token, -100 elsewhere.
    wanted, last = [], None
    for word in words:
        wanted.append(-100 if word is None or word == last else word)
        last = word
    assert list(row.loss_positions) == [i for i, word in enumerate(wanted) if word != -100]
    assert len(row.ids) > 5  # one word has several tokens
    assert row.tags == (2, 0, 1)
    (batch,) = rows.eval_batches("train", batch_size=2)
    np.testing.assert_array_equal(batch["tags"][0][batch["weights"][0] > 0], [2, 0, 1])


def test_a_long_row_is_cut_with_its_special_tokens_and_one_without_words_is_dropped(
    wordpiece, write
):
    many = {"tokens": ["fun"] * 50, "tags": ["O"] * 50}
    none = {"tokens": [""], "tags": ["O"]}
    rows = encoded(model(wordpiece, limit=8), train=write([many, none, ROWS[1]]), max_length=6)
    row = rows.train.rows[0]
    assert (len(row.ids), len(row.tags)) == (6, 4)
    assert row.ids[-1] == wordpiece.sep_token_id
    assert rows.dropped["train"][0].endswith("train.jsonl:2")


def test_split_words_are_the_tokens_that_they_are_in_a_text(bpe_bos, wordpiece):
    """A byte-level tokenizer would join them; BERT's does not read spaces."""
    for tokenizer in (bpe_bos, wordpiece):
        for words in (["fun", "bad", "fun"], ["bad"]):
            (pieces,) = encode_words([words], tokenizer, 64)
            assert list(pieces.ids) == tokenizer(" ".join(words))["input_ids"]
            assert pieces.words == tuple(range(len(words)))


def test_classes_are_those_of_the_model_or_given_or_those_of_the_training_rows(wordpiece, write):
    train = write(ROWS)
    names = ("O", "B-X", "I-X", "B-Y")
    lm = model(wordpiece, "token_classifier", names)
    assert encoded(lm, train=train).labels == names
    assert encoded(lm, train=train, labels=("I-X", "O", "B-X")).labels == names
    assert encoded(lm, train=train).train.rows[0].tags == (0, 1, 2)
    given = ("I-X", "O", "B-X")
    assert encoded(model(wordpiece), train=train, labels=given).labels == given
    other = model(wordpiece, "token_classifier", ("O", "B-Z"))
    assert encoded(other, train=train).labels == ("B-X", "I-X", "O")
    one_token = model(wordpiece, "classifier", names)
    assert encoded(one_token, train=train).labels == ("B-X", "I-X", "O")
    assert encoded(lm, test=train).labels == names  # without training rows


def test_indices_have_the_names_of_the_data_or_given_or_of_the_model(wordpiece, write, tmp_path):
    numbers = [{"words": row["tokens"], "ner_tags": [2, 0, 1][-len(row["tags"]) :]} for row in ROWS]
    train = write(numbers)
    names = ("B-X", "I-X", "O")
    own = model(wordpiece, "token_classifier", ("O", "I-X", "B-X"))
    keys = {"train": train, "field": "words"}
    assert encoded(model(wordpiece), labels=names, **keys).train.rows[0].tags == (2, 0, 1)
    # The index 2 is "O" by `labels`, the first output of the model.
    assert encoded(own, labels=names, **keys).train.rows[0].tags == (0, 2, 1)
    assert encoded(own, **keys).train.rows[0].tags == (2, 0, 1)
    with refused("tokens.labels", "nothing names the classes"):
        encoded(model(wordpiece), **keys)
    feature = {"feature": {"names": [*names], "_type": "ClassLabel"}, "_type": "Sequence"}
    features = {"info": {"features": {"ner_tags": feature}}}
    table = pyarrow.Table.from_pylist(numbers)
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    keys = {"train": str(tmp_path / "rows.parquet"), "field": "words"}
    for lm, tags in ((model(wordpiece), (2, 0, 1)), (own, (0, 2, 1))):
        assert encoded(lm, **keys).train.rows[0].tags == tags


def test_a_folder_of_datasets_names_the_classes(wordpiece, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    names = ["I-X", "O", "B-X"]
    features = Features(
        {"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=names))}
    )
    rows = {"tokens": [row["tokens"] for row in ROWS], "ner_tags": [[1, 2, 0], [2]]}
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "rows")
    found = encoded(model(wordpiece), train=str(tmp_path / "rows"))
    assert found.labels == tuple(names)
    assert found.train.rows[0].tags == (1, 2, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "must have as many tags as words, 2"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "field 'tokens' is not a list of words"),
        ({"tokens": [], "tags": []}, "field 'tokens' is not a list of words"),
        ({"tokens": ["a"], "tags": "O"}, "field 'tags' is not a list of tags"),
        ({"tokens": ["a"], "tags": [None]}, "field 'tags' is not a list of tags"),
        ({"tokens": ["a"]}, "field 'tags' is not a list of tags"),
        ({"tokens": ["a"], "tags": ["B-Z"]}, "has a tag that is none of 'B-X, I-X, O'"),
        ({"tokens": ["a"], "tags": [3]}, "has a tag that is none of"),
        ({"tokens": ["a"], "tags": [-1]}, "has a tag that is none of"),
    ],
)
def test_other_rows_are_refused_by_file_and_line(row, message, wordpiece, write):
    path = write([*ROWS, row])
    with refused(f"{path}, line 3", message):
        encoded(model(wordpiece), test=path, train=write(ROWS, "other.jsonl"))


def test_mistakes(wordpiece, write):
    with refused("tokens.max_length", "no room for words beside 2 special tokens (got 2)"):
        encoded(model(wordpiece), train=write(ROWS), max_length=2)
    with refused("tokens.labels", "has a value twice"):
        TokensConfig(train="a.jsonl", labels=("O", "O"))
    with refused("tokens.labels", "is needed where the model has no tokenizer"):
        TokensConfig(train="a.jsonl").unread(8)
    assert TokensConfig(train="a.jsonl", labels=("O", "X")).unread(8).labels == ("O", "X")

import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import Encoded, EncodedTask, Example, Task, TaskConfig, Template, prepare
from tests.helpers.sentences import refused

LABELS = ("great", "bad")


def task(texts, test=(), template="{text} it was {label}", labels=LABELS, **changes) -> Task:
    def examples(split):
        return tuple(Example({"text": text}, i % 2, f"x:{i}") for i, text in enumerate(split))

    config = TaskConfig(name="mine", template=template, labels=labels, **changes)
    return Task(config, Template.parse(template), examples(texts), (), examples(test))


def test_label_words(bpe) -> None:
    encoded = prepare(task(["fun", "fun fun fun"], test=["it"]), bpe, kind="decoder")
    assert encoded.form == "label_words"
    assert bpe.convert_ids_to_tokens(encoded.token_ids.tolist()) == ["Ġgreat", "Ġbad"]
    assert encoded.token_ids.dtype == np.int32
    batch = next(encoded.eval_batches("train", batch_size=3))
    fun, more, it, was = bpe("fun fun it was")["input_ids"]
    long, short = [fun, more, more, it, was], [fun, it, was]
    np.testing.assert_array_equal(
        batch["input_ids"], [[*long, 0, 0, 0], [*short, *[0] * 5], [*long, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), [5, 3, 5])
    np.testing.assert_array_equal(batch["attention_mask"][1], [1, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["positions"], [4, 2, 4])
    np.testing.assert_array_equal(batch["labels"][:2], [1, 0])
    np.testing.assert_array_equal(batch["weights"], [1, 1, 0])
    np.testing.assert_array_equal(batch["index"], [1, 0, -1])
    assert {key: value.dtype for key, value in batch.items()} == {
        "input_ids": np.int32,
        "attention_mask": np.int32,
        "positions": np.int32,
        "labels": np.int32,
        "weights": np.float32,
        "index": np.int32,
    }


def test_options(bpe) -> None:
    labels = ("great", "bad it", "grey")
    template = "{text} it was {label} fun"  # what comes after the label is scored too
    given = task(["fun", "fun fun"], template=template, labels=labels)
    encoded = prepare(given, bpe, kind="decoder")
    assert encoded.form == "options"
    assert encoded.token_ids is None
    batch = encoded.batch(0, batch_size=2, seed=0)
    assert batch["input_ids"].shape == (2, 3, 8)
    assert batch["targets"].shape == batch["positions"].shape == (2, 3, 3)
    row = 0 if batch["labels"][0] == 0 else 1  # the example "fun"
    np.testing.assert_array_equal(batch["attention_mask"][row].sum(-1), [4, 5, 5])
    np.testing.assert_array_equal(batch["positions"][row], [[2, 3, 0], [2, 3, 4], [2, 3, 4]])
    np.testing.assert_array_equal(batch["target_mask"][row], [[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    names = [bpe.convert_ids_to_tokens(ids.tolist()) for ids in batch["targets"][row]]
    assert names == [["Ġgreat", "Ġfun", "<pad>"], ["Ġbad", "Ġit", "Ġfun"], ["Ġgre", "y", "Ġfun"]]
    assert batch["target_mask"].dtype == batch["weights"].dtype == np.float32
    assert batch["targets"].dtype == np.int32


def test_continuations(bpe) -> None:
    labels = ("great", "bad it", "grey")
    encoded = prepare(task(["fun", "fun fun"], labels=labels), bpe, kind="decoder")
    assert encoded.form == "continuations"
    assert encoded.token_ids is None
    batch = encoded.batch(0, batch_size=2, seed=0)
    assert batch["prompt_ids"].shape == batch["prompt_mask"].shape == (2, 8)
    assert batch["option_ids"].shape == batch["option_mask"].shape == (2, 3, 2)
    row = 0 if batch["labels"][0] == 0 else 1  # the example "fun"
    prompt = bpe.convert_ids_to_tokens(batch["prompt_ids"][row].tolist())
    assert prompt == ["fun", "Ġit", "Ġwas", *["<pad>"] * 5]
    np.testing.assert_array_equal(batch["prompt_mask"][row], [1, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["option_mask"][row], [[1, 0], [1, 1], [1, 1]])
    names = [bpe.convert_ids_to_tokens(ids.tolist()) for ids in batch["option_ids"][row]]
    assert names == [["Ġgreat", "<pad>"], ["Ġbad", "Ġit"], ["Ġgre", "y"]]
    assert {key: value.dtype for key, value in batch.items()} == {
        "prompt_ids": np.int32,
        "prompt_mask": np.int32,
        "option_ids": np.int32,
        "option_mask": np.float32,
        "labels": np.int32,
        "weights": np.float32,
    }


@pytest.mark.parametrize(
    ("template", "labels", "form"),
    [
        ("{text} it was {label}.", LABELS, "options"),  # scored after the label
        ("{text} it was {label}", ("bad", "bad it"), "continuations"),  # a common first token
        ("{text} it was {label}", ("great", "grey"), "continuations"),  # two tokens
        ("{text} it was {label}", ("great", "awful"), "options"),  # another prompt
    ],
)
def test_one_row_for_all_words_only_where_it_is_the_same(bpe, template, labels, form) -> None:
    encoded = prepare(task(["fun"], template=template, labels=labels), bpe, kind="decoder")
    assert encoded.form == form


def test_one_example_decides_for_the_whole_task(bpe_bos) -> None:
    """The label "reat" is one token after " g", and another number of tokens after "x"."""
    template = "{text}{label}"
    words = ("reat", "un")
    encoded = prepare(task([" g", "x"], template=template, labels=words), bpe_bos, kind="decoder")
    assert encoded.form == "options"


def test_encoder(wordpiece) -> None:
    encoded = prepare(
        task(["fun fun", "it"], template="{text} was {mask}."), wordpiece, kind="encoder"
    )
    assert encoded.form == "label_words"
    batch = next(encoded.eval_batches("train", batch_size=2))
    tokens = wordpiece.convert_ids_to_tokens(batch["input_ids"][1].tolist())
    assert tokens == ["[CLS]", "it", "was", "[MASK]", ".", "[SEP]", "[PAD]", "[PAD]"]
    np.testing.assert_array_equal(batch["positions"], [4, 3])
    np.testing.assert_array_equal(batch["token_type_ids"], np.zeros((2, 8)))
    assert wordpiece.convert_ids_to_tokens(encoded.token_ids.tolist()) == list(LABELS)


def test_max_length_is_the_smaller_of_task_and_model(bpe) -> None:
    given = task(["fun " * 50], max_length=20)
    for limit, length in ((None, 20), (30, 20), (10, 10)):
        encoded = prepare(given, bpe, kind="decoder", max_length=limit)
        assert encoded.buckets == (length,)
        assert len(encoded.train[0].input_ids[0]) == length


def test_no_tokenizer() -> None:
    with refused("model", "has no tokenizer"):
        prepare(task(["fun"]), None, kind="decoder")


def test_row_longer_than_the_buckets() -> None:
    row = Encoded(0, ((1, 2, 3),), ((1,),), ())
    task = EncodedTask((), np.arange(2, dtype=np.int32), 0, (2,), (), (), (row,))
    with pytest.raises(ValueError, match="a row has 3 tokens, but the longest bucket is 2"):
        task.collate([row])


def test_a_tokenizer_of_another_model_is_refused(bpe) -> None:
    given = task(["fun", "fun fun"])
    ids = [i for each in prepare(given, bpe, kind="decoder").train for i in each.input_ids[0]]
    words = prepare(given, bpe, kind="decoder").token_ids
    largest = max(*ids, *words.tolist())
    prepare(given, bpe, kind="decoder", vocab_size=largest + 1)
    with pytest.raises(UserError, match=f"beyond the {largest} of the model .got {largest}.. Take"):
        prepare(given, bpe, kind="decoder", vocab_size=largest)


def test_digests_are_of_the_tokens_of_each_split(bpe) -> None:
    texts = ["fun", "fun fun fun"]
    whole = prepare(task(texts, test=["it"]), bpe, kind="decoder").digests()
    assert set(whole) == {"train", "test"}
    assert prepare(task(texts, test=["it"]), bpe, kind="decoder").digests() == whole
    other = prepare(task(texts, test=["was"]), bpe, kind="decoder").digests()
    assert (other["train"] == whole["train"], other["test"] == whole["test"]) == (True, False)
    for changes in ({"labels": ("great", "fun")}, {"template": "{text} was it {label}"}):
        changed = prepare(task(texts, test=["it"], **changes), bpe, kind="decoder").digests()
        assert not set(changed.values()) & set(whole.values())

"""Every data form: batches are pure functions of the step, and hold each row as often as they say.

A new form is one entry of `FORMS`.
"""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import (
    DATA_FORMS,
    ForgetConfig,
    MessagesConfig,
    PaddedRows,
    PairsConfig,
    TaskConfig,
    TextConfig,
    TokenRow,
    TokensConfig,
)
from jaxlm.data.rows import epoch_places, length_buckets

WORDS = ("great", "bad")


def task_row(i: int) -> dict:
    return {"text": f"{'fun ' * (1 + i % 9)}{i}", "label": i % 2}


def task(**given):
    values = {"name": "mine", "template": "{text} it was {label}", "labels": WORDS, **given}

    def config(**changes) -> TaskConfig:
        return TaskConfig(**values, **changes)

    return config


def option_row(i: int) -> dict:
    return {
        "text": task_row(i)["text"],
        "options": [*WORDS, "badly it"][: 2 + i % 2],
        "label": "bad",
    }


def answer_row(i: int) -> dict:
    return {"text": task_row(i)["text"], "label": [WORDS[i % 2], "fun"][: 1 + i % 2]}


def messages_row(i: int) -> dict:
    row = task_row(i)
    turns = [{"role": "user", "content": row["text"]}]
    return {"messages": [*turns, {"role": "assistant", "content": WORDS[i % 2]}]}


def prompt_row(i: int) -> dict:
    return {"prompt": task_row(i)["text"], "completion": f" {WORDS[i % 2]}"}


def pair_row(i: int) -> dict:
    row = task_row(i)
    return {"prompt": row["text"], "chosen": f" {WORDS[i % 2]}", "rejected": f" {WORDS[1 - i % 2]}"}


def messages_pair_row(i: int) -> dict:
    prompt = messages_row(i)["messages"]
    said = [{"role": "assistant", "content": word} for word in (WORDS[1 - i % 2], "fun")]
    return {
        "chosen": prompt,
        "rejected": [prompt[0], said[0]],
        "score_chosen": 2,
        "score_rejected": 1,
    }


def rated_row(i: int) -> dict:
    row = task_row(i)
    return {"prompt": row["text"], "responses": [" good", " fun it"], "scores": [i % 3, 3]}


def tokens_row(i: int) -> dict:
    words = task_row(i)["text"].split()
    return {"tokens": words, "tags": ["O"] * (len(words) - 1) + ["B-N"]}


def tokens(**changes) -> TokensConfig:
    return TokensConfig(labels=("O", "B-N"), **changes)


def question_row(i: int) -> dict:
    row = task_row(i)
    return {"question": row["text"], "answer": f" {WORDS[i % 2]}"}


def forget(**changes) -> ForgetConfig:
    return ForgetConfig(template="plain", **changes)


def messages(template: str):
    def config(**changes) -> MessagesConfig:
        return MessagesConfig(template=template, **changes)

    return config


FORMS = {
    "task": (task(), task_row),
    "task_options": (task(template="{text} it was {label}."), task_row),
    "task_per_example": (task(labels=(), options="per_example"), option_row),
    "task_text": (task(labels=(), output="text", max_new_tokens=4), answer_row),
    "messages_tulu": (messages("tulu"), messages_row),
    "messages_chat": (messages("chat"), messages_row),
    "messages_plain": (messages("plain"), prompt_row),
    "text": (TextConfig, task_row),
    "pairs": (PairsConfig, pair_row),
    "pairs_messages": (PairsConfig, messages_pair_row),
    "pairs_rated": (PairsConfig, rated_row),
    "tokens": (tokens, tokens_row),
    "forget": (forget, question_row),
    "forget_text": (ForgetConfig, task_row),
}

FILES = {"train": 25, "validation": 7, "test": 11}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    for name, (_, row) in FORMS.items():
        (folder / name).mkdir()
        start = 0
        for split, count in FILES.items():
            rows = [row(i) for i in range(start, start + count)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
            start += count
    return folder


@pytest.fixture(scope="module")
def lm(bpe_bos):
    import copy

    tokenizer = copy.deepcopy(bpe_bos)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    sizes = {"max_positions": 96, "vocab_size": len(tokenizer), "pad_id": 0}
    config = SimpleNamespace(kind="decoder", head="lm", **sizes)
    return SimpleNamespace(tokenizer=tokenizer, config=config)


@pytest.fixture(params=FORMS)
def form(request, folder, lm):
    """`form(seed=..., **changes)` makes the texts of a form and its encoded splits."""
    make, _ = FORMS[request.param]

    def load(*, seed: int = 0, splits=tuple(FILES), **changes):
        files = {split: f"{split}.jsonl" for split in splits} | changes
        texts = make(**files).load(seed=seed, base_dir=folder / request.param)
        return texts, texts.encode(lm)

    return load


def row_ids(encoded, place: int) -> list[int]:
    """The (first) row of a test example."""
    test = encoded.test
    return list(test.rows[place].ids if isinstance(test, PaddedRows) else test[place].input_ids[0])


def same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        np.testing.assert_array_equal(value, second[key])


def test_a_run_names_one_of_them() -> None:
    assert {type(config(train="a")) for config, _ in FORMS.values()} == set(DATA_FORMS.values())


def test_batches_are_a_pure_function_of_the_step(form) -> None:
    """What a resumed run reads, from files that are read anew, is what it would have read."""
    _, first = form()
    _, again = form()
    size = first.sizes["train"] * 2 // 5
    whole = first.streams(0, 6, batch_size=size, seeds=(3, 4))
    part = again.streams(2, 3, batch_size=size, seeds=(3, 4))
    assert {value.shape[:3] for value in whole.values()} == {(6, 2, size)}
    for key, value in part.items():
        wide = [slice(0, n) for n in value.shape]
        np.testing.assert_array_equal(whole[key][2:5][tuple(wide)], value)
    same(part, again.streams(2, 3, batch_size=size, seeds=(3, 4)))
    assert whole["attention_mask" if "attention_mask" in whole else "prompt_mask"].any(-1).all()


def test_every_epoch_has_every_row_once(form) -> None:
    _, encoded = form()
    size = encoded.sizes["train"]
    batch = encoded.streams(0, 2, batch_size=size, seeds=(0,))
    name = "input_ids" if "input_ids" in batch else "prompt_ids"
    orders = [[row.tobytes() for row in epoch] for epoch in batch[name][:, 0]]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert len(set(orders[0])) == size
    other = encoded.streams(0, 1, batch_size=size, seeds=(1,))[name][0, 0]
    assert [row.tobytes() for row in other] != orders[0]


@pytest.mark.parametrize("batch_size", [4, 64])
def test_evaluation_sees_every_row_once_in_few_shapes(form, batch_size) -> None:
    _, encoded = form()
    seen, shapes = [], set()
    for batch in encoded.eval_batches("test", batch_size=batch_size):
        ids = batch.get("input_ids", batch.get("prompt_ids"))
        shapes.add(ids.shape[-1])
        assert len(batch["index"]) == batch_size
        assert not batch["weights"][batch["index"] < 0].any()
        assert batch["weights"][batch["index"] >= 0].any(axis=-1).all()
        for read, place in zip(ids, batch["index"], strict=True):
            if place >= 0:
                expected = row_ids(encoded, place)
                assert read.reshape(-1)[: len(expected)].tolist() == expected
        seen += batch["index"][batch["index"] >= 0].tolist()
    assert sorted(seen) == list(range(encoded.sizes["test"]))
    assert shapes <= set(encoded.buckets)
    assert len(encoded.buckets) <= 4


def test_hold_out_is_a_part_of_training(form) -> None:
    drawn = {"validation": "hold_out", "num_train": 15, "num_validation": 6, "num_test": 5}
    texts, encoded = form(**drawn)
    assert [len(getattr(texts, split)) for split in FILES] == [15, 6, 5]
    assert texts.repeated("validation") == texts.repeated("test") == 0
    again, other = form(**drawn)[0], form(seed=1, **drawn)[0]
    assert again.digests() == texts.digests()
    changed = {name for name, digest in other.digests().items() if digest != again.digests()[name]}
    assert changed == {"train", "validation"}  # the draw of the test set has a seed of its own
    assert encoded.sizes.keys() == texts.digests().keys() == encoded.digests().keys()


def test_some_of_the_given_validation_examples_are_drawn(form) -> None:
    whole = form()[0]
    drawn = [form(seed=seed, num_validation=3)[0] for seed in (0, 1)]
    assert [len(texts.validation) for texts in drawn] == [3, 3]
    assert {each.id for each in drawn[0].validation} <= {each.id for each in whole.validation}
    assert (
        drawn[0].digests() == drawn[1].digests() != whole.digests()
    )  # not drawn by the run's seed
    assert len(form(num_validation=10_000)[0].validation) == len(whole.validation)


def test_digests_are_of_each_split(form) -> None:
    texts, encoded = form(splits=("train", "test"))
    assert set(texts.digests()) == set(encoded.digests()) == {"train", "test"}
    changed = form(splits=("train",), test="validation.jsonl")[1].digests()
    assert changed["train"] == encoded.digests()["train"]
    assert changed["test"] != encoded.digests()["test"]
    assert texts.repeated("test") == 0
    assert form(splits=("train",), test="train.jsonl")[0].repeated() == FILES["train"]


def test_a_damaged_file_is_named(form, folder, tmp_path) -> None:
    packed = gzip.compress(b'{"text": "fun"}\n' * 200)
    damaged = {
        "cut.jsonl.gz": packed[:-20],
        "cut.jsonl": b'{"text": "a"}\n{"text',
        "other.jsonl": b'{"words": 1}\n',
        "empty.jsonl": b"",
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            form(splits=(), train=str(tmp_path / name))


def test_a_form_without_training_rows(form) -> None:
    _, encoded = form(splits=("train", "test"))
    assert list(encoded.eval_batches("validation", batch_size=4)) == []
    _, encoded = form(splits=("test",))
    key = "(task|messages|text|pairs|tokens|forget)"
    with pytest.raises(UserError, match=rf"^{key}\.train: there are no "):
        encoded.streams(0, 1, batch_size=2, seeds=(0,))
    with pytest.raises(UserError, match=rf"^{key}: has no data\."):
        form(splits=())


def test_what_is_in_the_loss(lm, folder) -> None:
    """The answers and the token that ends them; of documents every token but the first."""
    tokens = lm.tokenizer.convert_ids_to_tokens

    def learned(name: str) -> list[list[str]]:
        config = FORMS[name][0](train="train.jsonl")
        encoded = config.load(seed=0, base_dir=folder / name).encode(lm)
        (batch,) = encoded.eval_batches("train", batch_size=encoded.sizes["train"])
        order = np.argsort(batch["index"])
        return [
            tokens(ids[scored > 0].tolist())
            for ids, scored in zip(batch["input_ids"][order], batch["weights"][order], strict=True)
        ]

    assert learned("messages_plain")[:2] == [["Ġgreat", "</s>"], ["Ġbad", "</s>"]]
    for name in ("messages_tulu", "messages_chat"):
        assert ["".join(row) for row in learned(name)[:2]] == ["great</s>", "bad</s>"]
    assert ["".join(row) for row in learned("text")[:2]] == ["funĠ0</s>", "funĠfunĠ1</s>"]


def test_packed_rows_have_the_tags_of_their_words(lm, folder) -> None:
    """Each token of a window has the tag that it has in its own row."""
    whole, packed = (
        tokens(train="train.jsonl", max_length=48, packing=packing)
        .load(seed=0, base_dir=folder / "tokens")
        .encode(lm)
        for packing in (False, True)
    )
    assert packed.sizes["train"] < whole.sizes["train"]
    tags = {row.id: row.tags for row in whole.train.rows}
    batch = packed.train.batch(range(packed.sizes["train"]))
    for i, row in enumerate(packed.train.rows):
        scored = batch["weights"][i] > 0
        wanted = [tag for name in row.id.split() for tag in tags[name]]
        assert batch["tags"][i][scored].tolist() == wanted
        assert not batch["tags"][i][~scored].any()


def test_a_long_document_becomes_pieces(lm, folder) -> None:
    whole = TextConfig(train="train.jsonl", max_length=6)
    encoded = whole.load(seed=0, base_dir=folder / "text").encode(lm)
    rows = [row for row in encoded.train.rows if row.id.startswith("train.jsonl:9@")]
    assert max(encoded.train.lengths) == 6
    assert [row.ids[0] for row in rows] == [lm.tokenizer.bos_token_id] * len(rows)
    ids = [token for row in rows for token in row.ids[1:]]
    assert lm.tokenizer.decode(ids) == f"{task_row(8)['text']}</s>"
    assert all(row.loss_positions == tuple(range(1, len(row.ids))) for row in rows)


def test_rows_whose_answer_is_cut_are_dropped(lm, folder) -> None:
    config = MessagesConfig(train="train.jsonl", template="plain", max_length=5)
    encoded = config.load(seed=0, base_dir=folder / "messages_plain").encode(lm)
    assert 0 < encoded.sizes["train"] < FILES["train"]
    assert encoded.sizes["train"] + len(encoded.dropped["train"]) == FILES["train"]
    short = MessagesConfig(train="train.jsonl", template="plain", max_length=2)
    with pytest.raises(UserError, match=r"^messages\.train: no row has a token in the loss"):
        short.load(seed=0, base_dir=folder / "messages_plain").encode(lm)


@pytest.mark.parametrize(
    ("form", "changes", "key"),
    [
        (MessagesConfig, {"validation": "hold_out"}, "messages.validation"),
        (MessagesConfig, {"max_length": 0}, "messages.max_length"),
        (TextConfig, {"max_length": 1}, "text.max_length"),
        (TextConfig, {"num_train": 0}, "text.num_train"),
        (TextConfig, {"test_seed": -1}, "text.test_seed"),
    ],
)
def test_mistakes(form, changes, key) -> None:
    with pytest.raises(UserError, match=rf"^{key}: .*\(got .*\)\. "):
        form(train="a.jsonl", **changes)


def test_an_encoder_is_refused(lm, folder) -> None:
    texts = TextConfig(train="train.jsonl").load(seed=0, base_dir=folder / "text")
    encoder = SimpleNamespace(tokenizer=lm.tokenizer, config=SimpleNamespace(kind="encoder"))
    with pytest.raises(UserError, match=r"^model: text needs a decoder \(got"):
        texts.encode(encoder)


def test_both_forms_of_a_batch_say_the_same() -> None:
    rows = [TokenRow(str(n), tuple(range(1, n + 1)), tuple(range(n // 2, n))) for n in (2, 5, 9)]
    weights = PaddedRows(rows, 0).batch([2, 0, 1])
    targets = PaddedRows(rows, 0, "targets").batch([2, 0, 1])
    same(*({key: x[key] for key in ("input_ids", "attention_mask")} for x in (weights, targets)))
    for i in range(3):
        scored = np.flatnonzero(weights["weights"][i])
        mask = targets["target_mask"][i] > 0
        np.testing.assert_array_equal(targets["positions"][i][mask] + 1, scored)
        np.testing.assert_array_equal(targets["targets"][i][mask], weights["input_ids"][i][scored])


def test_few_buckets_that_hold_everything() -> None:
    lengths = np.random.default_rng(0).geometric(0.05, 300).tolist()
    buckets = length_buckets(lengths)
    assert len(buckets) <= 4
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] >= max(lengths) > buckets[-1] - 8


def test_streams_and_buckets_of_small_sizes() -> None:
    assert epoch_places(5, 2, 1, seed=0) == [0, 0]
    assert sorted(epoch_places(0, 7, 3, seed=0)[:6]) == [0, 0, 1, 1, 2, 2]
    assert length_buckets([3]) == (8,)
    assert length_buckets([3, 20], limit=20) == (20,)

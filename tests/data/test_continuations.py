"""Tokens of prompts and options against those of the whole texts."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.data import Encoded, EncodedTask, Prompted, prepare, prompted
from jaxlm.data.encoding import encode_prompted, share_prompts
from tests.data.test_paper_tasks import CASES, COPA, RECORD, loaded

OPT = [name for name in CASES if name.startswith("opt/")]


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(Path(jaxlm.__file__).parent / "assets" / "model")


def one(prompt: str, *options: str) -> Prompted:
    return Prompted(prompt, options, (0,), (), "x")


@pytest.mark.parametrize("tokens", ["bpe_bos", "slow", "slow_special", "shipped"])
@pytest.mark.parametrize("name", OPT)
def test_an_option_is_what_its_prompt_lacks(name, tokens, request, tmp_path: Path) -> None:
    """len(tokens of prompt and option) - len(tokens of the prompt), as MeZO's code counts."""
    tokenizer = request.getfixturevalue(tokens)
    task = loaded(name, tmp_path, [CASES[name][0]])
    texts = prompted(task, task.test[0])
    (found,) = encode_prompted([texts], tokenizer)

    def ids(text: str) -> list[int]:
        found = tokenizer(text)["input_ids"]
        return found[:-1] if tokens == "slow_special" else found  # without the end of the text

    for i, option in enumerate(texts.options):
        whole = ids(texts.prompt + option)
        count = len(whole) - len(ids(texts.prompt))
        assert found.targets[i] == tuple(whole[-count:])
        assert found.input_ids[i] == tuple(whole[:-1])
        assert found.positions[i] == tuple(range(len(whole) - count - 1, len(whole) - 1))
    (shared,) = share_prompts([found])
    assert shared.input_ids == (tuple(ids(texts.prompt)),)
    assert shared.targets == found.targets


def test_long_texts_lose_their_beginning_and_keep_the_first_token(bpe_bos) -> None:
    texts = one("fun it was" + " fun" * 5, " great", " bad it")
    (whole,) = encode_prompted([texts], bpe_bos, max_length=11)
    (cut,) = encode_prompted([texts], bpe_bos, max_length=6)
    assert len(whole.input_ids[1]) + 1 == 11
    assert bpe_bos.convert_ids_to_tokens(cut.input_ids[1]) == [
        "<s>",
        "Ġfun",
        "Ġfun",
        "Ġfun",
        "Ġbad",
    ]
    assert bpe_bos.convert_ids_to_tokens(cut.input_ids[0]) == ["<s>", "Ġfun", "Ġfun", "Ġfun"]
    assert cut.positions == ((3,), (3, 4))
    assert cut.targets == whole.targets
    assert share_prompts([cut]) is not None


@pytest.mark.parametrize(
    ("texts", "limit", "message"),
    [
        (one("fun"), None, "x: has no options (got none). Leave it out."),
        (one("fun", ""), None, "x: an option has no token (got ''). Give it text."),
        (
            one("", "great"),
            None,
            "x: has no token before an option (got 'great'). Give it a prompt",
        ),
        (
            one("fun it", " bad it was"),
            3,
            "x: has no token before an option (got ' bad it was'). Give",
        ),
    ],
)
def test_options_that_cannot_be_scored(bpe, texts, limit, message) -> None:
    with pytest.raises(UserError) as caught:
        list(encode_prompted([texts], bpe, max_length=limit))
    assert str(caught.value).startswith(message)


def test_a_task_that_is_cut_on_the_left(bpe_bos, tmp_path: Path) -> None:
    task = loaded("opt/sst2", tmp_path, [{"sentence": "fun " * 50, "label": 1}])
    encoded = prepare(task, bpe_bos, kind="decoder", max_length=12)
    (found,) = encoded.test
    assert encoded.form == "label_words"
    assert bpe_bos.convert_ids_to_tokens(encoded.token_ids.tolist()) == ["Ġterrible", "Ġgreat"]
    tokens = bpe_bos.convert_ids_to_tokens(found.input_ids[0])
    assert (tokens[0], tokens[-1], len(tokens)) == ("<s>", "Ġwas", 11)


def test_room_for_an_answer(bpe_bos, tmp_path: Path) -> None:
    task = loaded("opt/squad", tmp_path, [CASES["opt/squad"][0]])
    encoded = prepare(task, bpe_bos, kind="decoder", max_length=80)
    assert len(encoded.test[0].input_ids[0]) + len(encoded.test[0].targets[0]) == 80 - 50


def test_the_first_field_has_a_limit_of_its_own(roberta_like, tmp_path: Path) -> None:
    rows = [{"premise": "fun" + " fun" * 400, "hypothesis": "it was fun", "label": 0}]
    task = loaded("roberta/mnli", tmp_path, rows)
    config = dataclasses.replace(task.config, labels=("great", "bad", "fun"))
    task = dataclasses.replace(task, config=config)
    ids = prepare(task, roberta_like, kind="encoder").test[0].input_ids[0]
    tokens = roberta_like.convert_ids_to_tokens(ids)
    assert len(tokens) <= 256
    assert tokens.index("?") - 1 == 240


def ragged(examples: int = 20) -> EncodedTask:
    """Example i has i + 1 options, the first of which has i + 1 tokens and the others one."""
    rows = [
        Encoded(0, ((7,) * (3 + i % 2),), (), ((5,) * (i + 1), *[(i + 1,)] * i), None)
        for i in range(examples)
    ]
    return EncodedTask(
        labels=(), token_ids=None, pad_id=1, buckets=(4,), train=(), validation=(), test=tuple(rows)
    )


def test_ragged_options() -> None:
    encoded = ragged(3)
    assert (encoded.form, encoded.num_options, encoded.num_targets) == ("continuations", 3, 3)
    (batch,) = encoded.eval_batches("test", batch_size=3)
    row = batch["index"].tolist().index(1)
    np.testing.assert_array_equal(batch["prompt_ids"][row], [7, 7, 7, 7])
    np.testing.assert_array_equal(batch["option_ids"][row], [[5, 5, 0], [2, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(batch["option_mask"][row], [[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    row = batch["index"].tolist().index(2)
    np.testing.assert_array_equal(batch["prompt_ids"][row], [7, 7, 7, 1])


def test_few_shapes_of_ragged_options() -> None:
    shapes = {
        batch["option_ids"].shape[1:] for batch in ragged().eval_batches("test", batch_size=1)
    }
    assert shapes == {(8, 8), (16, 16), (20, 20)}


@pytest.mark.parametrize("name", ["opt/copa", "opt/record", "opt/squad"])
def test_training_on_the_right_option_alone(name, bpe_bos, tmp_path: Path) -> None:
    row = {"opt/copa": {**COPA, "question": "cause", "label": 1}, "opt/record": RECORD}
    task = loaded(name, tmp_path, [row.get(name, CASES[name][0])] * 2)
    task = dataclasses.replace(task, train=task.test, test=())
    batch = prepare(task, bpe_bos, kind="decoder").batch(0, batch_size=2, seed=0)
    texts = prompted(task, task.train[0])
    whole = bpe_bos(texts.completed)["input_ids"]
    count = len(whole) - len(bpe_bos(texts.prompt)["input_ids"])
    assert set(batch) == {"input_ids", "attention_mask", "weights"}
    for i in range(2):
        assert batch["input_ids"][i, : len(whole)].tolist() == whole
        assert batch["attention_mask"][i].sum() == len(whole)
        scored = np.flatnonzero(batch["weights"][i])
        assert scored.tolist() == list(range(len(whole) - count, len(whole)))
    assert batch["weights"].dtype == np.float32


def test_prompts_alone_with_the_places_of_their_examples(bpe_bos, tmp_path: Path) -> None:
    row = CASES["opt/squad"][0]
    task = loaded("opt/squad", tmp_path, [{**row, "title": f"T{i}"} for i in range(4)])
    task = dataclasses.replace(task, train=task.test, test=())
    encoded = prepare(task, bpe_bos, kind="decoder", max_length=200)
    encoded = dataclasses.replace(encoded, objective="generation")
    batch = encoded.batches(0, 2, batch_size=2, seed=0)
    assert set(batch) == {"input_ids", "attention_mask", "index"}
    assert sorted(batch["index"].ravel().tolist()) == [0, 1, 2, 3]
    assert batch["input_ids"].shape[2] <= 200 - 50
    for ids, mask, place in zip(
        *(batch[name].reshape(4, -1) for name in ("input_ids", "attention_mask", "index")),
        strict=True,
    ):
        prompt = prompted(task, task.train[place[0]]).prompt
        assert ids[: mask.sum()].tolist() == bpe_bos(prompt)["input_ids"]


def test_an_encoder_reads_neither_options_nor_demonstrations(roberta_like, tmp_path: Path) -> None:
    task = loaded("opt/copa", tmp_path, [{**COPA, "question": "cause", "label": 1}])
    with pytest.raises(
        UserError, match=r"an encoder cannot read options of several tokens, .* .got opt/copa."
    ):
        prepare(task, roberta_like, kind="encoder")

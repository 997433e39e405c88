"""Preference pairs: what the model reads, which tokens are scored, and what is left out."""

import copy
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm import preference
from jaxlm.data import PairsConfig
from jaxlm.data.encoding import Encoded
from jaxlm.data.pairs import as_task
from jaxlm.data.rows import pad
from tests.helpers.models import GOLDEN
from tests.helpers.sentences import refused
from tests.helpers.tiny import make_model, write_jsonl

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def encode(tmp_path, bpe_bos):
    """`encode(*rows, tokenizer=..., limit=..., **config)` returns the encoded splits."""

    def encode(*rows, tokenizer=bpe_bos, limit=96, kind="decoder", **config):
        write_jsonl(tmp_path / "train.jsonl", list(rows))
        sizes = {"max_positions": limit, "vocab_size": 1000, "pad_id": 0}
        model = SimpleNamespace(kind=kind, head="lm" if kind == "decoder" else "mlm", **sizes)
        texts = PairsConfig(train="train.jsonl", **config).load(seed=0, base_dir=tmp_path)
        return texts.encode(SimpleNamespace(tokenizer=tokenizer, config=model))

    return encode


def read(encoded, tokenizer):
    """The prompt and the responses of each pair, as tokens."""
    return [
        [tokenizer.convert_ids_to_tokens(list(x)) for x in (pair.input_ids[0], *pair.targets)]
        for pair in encoded.train
    ]


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def turn(content, role="assistant"):
    return {"role": role, "content": content}


def test_texts_have_one_beginning_and_one_end(encode, bpe, bpe_bos, bpe_bos_eos):
    row = pair("fun it", " was great", " was bad</s>")
    expected = [["<s>", "fun", "Ġit"], ["Ġwas", "Ġgreat", "</s>"], ["Ġwas", "Ġbad", "</s>"]]
    for tokenizer in (bpe_bos, bpe_bos_eos):
        assert read(encode(row, tokenizer=tokenizer), tokenizer) == [expected]
    assert read(encode(row, tokenizer=bpe), bpe) == [[["fun", "Ġit"], *expected[1:]]]
    open_ended = encode(row, append_eos=False)
    assert read(open_ended, bpe_bos) == [[expected[0], ["Ġwas", "Ġgreat"], expected[2]]]
    # The space between belongs to the response, wherever it is written.
    assert read(encode(pair("fun it ", "was great", "was bad")), bpe_bos) == [expected]


@pytest.mark.parametrize("template", ["chat", "tulu", "plain"])
def test_conversations_have_the_end_that_the_template_writes(encode, bpe_bos, template):
    tokenizer = copy.deepcopy(bpe_bos)
    tokenizer.chat_template = CHAT
    rows = [
        pair([turn("fun", "user")], [turn("great")], [turn("bad")]),
        pair("fun", [turn("great")], [turn("bad")]),  # a text before messages is the user's
        pair([turn("fun", "user")], "great", "bad"),  # a text after messages, the assistant's
        {"chosen": [turn("fun", "user"), turn("great")],
         "rejected": [turn("fun", "user"), turn("bad")]},
    ]  # fmt: skip
    found = read(encode(*rows, tokenizer=tokenizer, template=template), tokenizer)
    assert all(each == found[0] for each in found[1:])
    prompt, chosen, rejected = ["".join(tokens) for tokens in found[0]]
    assert (chosen, rejected) == ("great</s>", "bad</s>")
    assert (
        prompt
        == {
            "chat": "<user>fun</s>Ċ<assistant>",
            "tulu": "<s><|user|>Ċfun" + "Ċ<|assistant|>Ċ",
            "plain": "<s>fun",
        }[template]
    )


def test_the_prompt_is_what_both_begin_with(encode, bpe_bos):
    both = [turn("fun", "user"), turn("it"), turn("was", "user")]
    rows = [
        {"chosen": "fun it was great", "rejected": "fun it was bad"},
        {"chosen": "fun it", "rejected": "fun it was bad"},  # one begins with the other
        {"chosen": [*both, turn("great")], "rejected": [*both, turn("bad")]},
    ]
    first, second, third = read(encode(*rows, template="plain"), bpe_bos)
    assert first == [["<s>", "fun", "Ġit", "Ġwas"], ["Ġgreat", "</s>"], ["Ġbad", "</s>"]]
    assert second == [["<s>", "fun"], ["Ġit", "</s>"], ["Ġit", "Ġwas", "Ġbad", "</s>"]]
    assert ["".join(x) for x in third] == ["<s>funit</s>was", "great</s>", "bad</s>"]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "both",
    [
        ("The sky is blue.", "The sky is green."),
        ("The sky is", "The sky was"),
        ("The sky", "The sky was"),
        ("same", "same"),
        ("a bc", "xa"),
        ([turn("q", "user"), turn("a")], [turn("q", "user"), turn("b")]),
        ([turn("q", "user"), turn("a")], [turn("q", "user"), turn("a")]),
    ],
)
def test_the_prompt_is_that_of_trl(both):
    from jaxlm.data.pairs import _split

    extract_prompt = pytest.importorskip("trl.data_utils").extract_prompt
    theirs = extract_prompt(dict(zip(("chosen", "rejected"), both, strict=True)))
    assert list(_split(*both)) == [theirs[name] for name in ("prompt", "chosen", "rejected")]


def test_both_responses_begin_after_the_same_tokens(encode, bpe_bos, tmp_path):
    """Where the tokenizer joins prompt and response; log-probabilities by plain `lm.log_probs`."""
    import jaxlm
    from jaxlm.train.objectives.preference import response_scorer

    rows = [
        pair("fun it was bad", "ly", " it"),
        pair("fun", " it", " great"),
        pair("it was" + " fun" * 7, " bad" * 9, "!"),
    ]
    encoded = encode(*rows)
    prompt, chosen, rejected = read(encoded, bpe_bos)[0]
    assert prompt == ["<s>", "fun", "Ġit", "Ġwas"]
    assert (chosen, rejected) == (["Ġbadly", "</s>"], ["Ġbad", "Ġit", "</s>"])

    lm = jaxlm.from_pretrained(make_model(tmp_path / "model", bpe_bos, scale=3))
    log_probs, tokens = jax.jit(response_scorer(lm))(lm.params, encoded.collate(encoded.train))
    texts = [
        bpe_bos(row["prompt"] + row[name])["input_ids"] + [bpe_bos.eos_token_id]
        for row in rows
        for name in ("chosen", "rejected")
    ]
    ids, mask = pad(texts, (max(map(len, texts)),))
    whole = jax.jit(lm.log_probs)(lm.params, ids, mask) * mask[:, 1:]
    for i, text in enumerate(texts):
        each, j = encoded.train[i // 2], i % 2
        start = len(each.input_ids[0])
        assert list(each.input_ids[0] + each.targets[j]) == text
        np.testing.assert_allclose(log_probs[i // 2, j], whole[i, start - 1 :].sum(), rtol=1e-5)
        assert tokens[i // 2, j] == len(text) - start


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2"])
def test_pairs_may_fill_the_positions_of_a_model(family):
    """Prompt and both responses are one row, longer than what each of them fills: 16 positions."""
    import jaxlm
    from jaxlm.train.objectives import Preference
    from jaxlm.train.objectives.preference import response_scorer

    lm = jaxlm.from_pretrained(GOLDEN / family)
    rng = np.random.default_rng(0)
    examples = []
    for sizes in ((12, 4, 2), (3, 13, 1), (1, 2, 15)):
        prompt, *both = (tuple(rng.integers(4, 30, n).tolist()) for n in sizes)
        examples.append(Encoded(0, (prompt,), (), tuple(both)))
    encoded = as_task({"train": examples, "validation": (), "test": ()}, 0)
    encoded = Preference(loss=(preference.LOSSES["kto"](),)).batched(encoded)
    rows = [(x.input_ids[0], y) for x in encoded.train for y in x.targets]
    ids, mask = pad([prompt + response for prompt, response in rows], (16,))
    whole = np.asarray(jax.jit(lm.log_probs)(lm.params, ids, mask))
    expected = [whole[i, len(a) - 1 : len(a) + len(b) - 1].sum() for i, (a, b) in enumerate(rows)]
    found, _ = jax.jit(response_scorer(lm))(lm.params, encoded.collate(encoded.train))
    np.testing.assert_allclose(found, np.reshape(expected, (3, 3)), rtol=1e-5)


def test_a_prompt_is_cut_on_the_left_and_then_responses_on_the_right(encode, bpe_bos):
    row = pair("fun it was fun it was", " great fun", " bad")
    prompt, chosen, rejected = read(encode(row), bpe_bos)[0]
    for limit in range(3, 12):
        found = read(encode(row, max_length=limit), bpe_bos)[0]
        left = min(max(limit - 3, 1), 7)
        assert found[0] == ["<s>", *prompt[len(prompt) - left + 1 :]][:left]
        assert found[1:] == [x[: limit - left] for x in (chosen, rejected)]
        assert found == read(encode(row, limit=limit), bpe_bos)[0]


@pytest.mark.parametrize("kind", ["slow", "slow_special"])
def test_tokenizers_without_offsets(encode, request, kind):
    tokenizer = request.getfixturevalue(kind)
    found = encode(pair("fun", " a b", " a c</s>"), tokenizer=tokenizer)
    ids = [list(x) for x in (found.train[0].input_ids[0], *found.train[0].targets)]
    start, end = (tokenizer.convert_tokens_to_ids([t])[0] for t in ("<s>", "</s>"))
    text = lambda *tokens: [tokenizer._convert_token_to_id(t) for t in tokens]  # noqa: E731
    first = [start] if kind == "slow_special" else []
    assert ids == [[*first, *text(*"fun")], [*text(" a", " b"), end], [*text(" a", " c"), end]]
    with refused("tokenizer", "character offsets"):
        encode(pair([turn("q", "user")], "a", "b"), tokenizer=tokenizer, template="plain")


def test_pairs_without_a_difference_are_dropped_and_named(encode):
    rows = [
        pair("fun", " it", " bad"),
        pair("fun", " it", " it"),
        pair("fun", " it", " bad", score_chosen=2, score_rejected=2.0),
        {"chosen": "fun it", "rejected": "fun it"},
        pair("fun", " it was great", " it was bad"),
        pair("fun", " it", " bad", score_chosen=2, score_rejected=None),
    ]
    encoded = encode(*rows, max_length=3)
    assert encoded.sizes == {"train": 2, "validation": 0, "test": 0}
    assert encoded.dropped["train"] == tuple(f"train.jsonl:{i}" for i in (2, 3, 4, 5))
    with refused("pairs.train", "no pair has two different responses", "got 6 pairs"):
        encode(*rows, max_length=1)


def test_every_two_rated_responses_are_a_pair(encode, bpe_bos):
    row = {"prompt": "fun", "responses": [" it", " was", " bad", " was"], "scores": [1, 3, 1, 2.5]}
    encoded = encode(row)
    found = ["".join(x[0][:1] + x[1][:1]) for x in (p[1:] for p in read(encoded, bpe_bos))]
    assert found == ["ĠwasĠit", "ĠwasĠbad", "ĠwasĠit", "ĠwasĠbad"]
    # The same response with two ratings, and the two of the same rating.
    assert encoded.dropped["train"] == ("train.jsonl:1.0", "train.jsonl:1.5")


GOOD = pair("fun", " it", " bad")


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "fun", "chosen": "a"}, "has no 'rejected' (got 'prompt', 'chosen')"),
        ({"prompt": "fun", "rejected": "a"}, "has no 'chosen'"),
        ({"text": "fun"}, "has no 'chosen'"),
        (pair("fun", "", " a"), "chosen is empty (got '')"),
        (pair("fun", " a", " \n"), "rejected is empty"),
        (pair("fun", None, " a"), "neither a text nor a list of messages (got None)"),
        (pair(3, "b", "a"), "neither a text nor a list of messages (got 3)"),
        (pair("fun", "a", [turn("b")]), "one response is text, the other messages"),
        (pair("fun", [], [turn("b")]), "has no messages"),
        (pair("fun", [turn("a", "user")], [turn("b")]), "chosen must be one message of the assist"),
        (pair("fun", [turn("a", "tool")], [turn("b")]), "unknown role (got 'tool')"),
        (pair("fun", [turn("a")], [turn("b"), turn("c")]), "(got assistant, assistant)"),
        (pair("fun", [turn("")], [turn("b")]), "chosen is empty"),
        (pair("fun", [turn("a")], [turn(3)]), "message 1 has no content"),
        ({"chosen": [turn("q", "user")], "rejected": [turn("a")]}, "chosen must be one message"),
        (GOOD | {"score_chosen": 1, "score_rejected": 2}, "rejected response is rated higher"),
        (GOOD | {"score_chosen": "1", "score_rejected": 0}, "score is not a number (got '1')"),
        (GOOD | {"score_chosen": True, "score_rejected": 0}, "score is not a number (got True)"),
        (GOOD | {"score_chosen": 10**400, "score_rejected": 0}, "score is not a number (got 1000"),
        ({"prompt": "p", "responses": ["a"], "scores": [1]}, "two responses or more"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "each with a score (got 2 and 1"),
        ({"prompt": "p", "responses": ["a", "b"]}, "responses and scores must be lists"),
        ({"prompt": "p", "responses": ["a", ""], "scores": [1, 0]}, "rejected is empty"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, None]}, "not a number (got None)"),
    ],
)
def test_a_mistake_names_the_file_and_the_line(encode, row, part):
    with refused("train.jsonl, line 2", part):
        encode(GOOD, row)


def test_what_cannot_read_pairs(encode):
    with refused("model", "pairs need a decoder", "kind encoder with the head mlm"):
        encode(GOOD, kind="encoder")
    with refused("model", "has no tokenizer"):
        encode(GOOD, tokenizer=None)
    with refused("template", "no chat template"):
        encode(pair([turn("q", "user")], "a", "b"))


def test_rows_from_json_and_parquet_are_the_same(tmp_path, encode):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    rows = [GOOD | {"score_chosen": 3, "score_rejected": i} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    texts = PairsConfig(train="train.parquet").load(seed=0, base_dir=tmp_path)
    assert [x.margin for x in texts.train] == [3, 2, 1, 0]
    (tmp_path / "same.json").write_text(json.dumps(rows))
    again = PairsConfig(train="same.json").load(seed=0, base_dir=tmp_path)
    assert again.digests() == texts.digests()

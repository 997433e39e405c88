"""Text against the decoder, brute force, and models whose text is known by construction."""

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.evaluation import generate_text, stream_text
from jaxlm.models import LanguageModel, ModelConfig, param_shapes
from jaxlm.models.generation import Sampling
from jaxlm.models.initialise import nest

PROMPTS = ["the film is", "a", "one of the best films of the year , but also", ""]
SAMPLING = Sampling(temperature=1.0)
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def lm():
    return jaxlm.from_pretrained()


def chain(tokenizer, ids, eos_id=None, **changes):
    """A model that goes from each of these tokens, all different, to the next one."""
    assert len(set(ids)) == len(ids)
    size = len(ids) + len(ids) % 2
    config = ModelConfig(
        family="llama", kind="decoder", head="lm", vocab_size=len(tokenizer), hidden_size=size,
        num_layers=1, num_heads=1, num_kv_heads=1, head_size=size, intermediate_size=2,
        max_positions=64, embedding_size=size, activation="silu", gated_mlp=True, norm="rmsnorm",
        positions="rotary", attention_bias=False, output_bias=False, mlp_bias=False,
        tie_embeddings=False, eos_id=eos_id,
    ).replace(**changes)  # fmt: skip
    flat = {path: np.zeros(shape, np.float32) for path, shape in param_shapes(config).items()}
    for path, leaf in flat.items():
        leaf[...] = path.endswith(".scale")
    for i, token in enumerate(ids):
        flat["embed.tokens.embedding"][token, i] = 1
        flat["lm_head.embedding"][token, i - 1] = 1
    params = nest({path: jax.numpy.asarray(leaf) for path, leaf in flat.items()})
    return LanguageModel(config, params, tokenizer)


def test_greedy_text_is_the_decoded_text_of_the_tokens(lm):
    found = generate_text(lm, PROMPTS, max_new_tokens=24)
    read = [lm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ids, mask = np.zeros((2, 4, max(map(len, read))), np.int32)
    for row, prompt in enumerate(read):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    wanted = lm.generate(lm.params, ids, mask, max_new_tokens=24)
    for row, (sample,) in enumerate(found):
        tokens = wanted.tokens[row, : wanted.lengths[row]].tolist()
        stopped = tokens[-1] == lm.config.eos_id
        assert sample.tokens.tolist() == tokens
        assert sample.text == lm.tokenizer.decode(tokens[: len(tokens) - stopped])
        assert sample.finish == ("stop" if stopped else "length")
        np.testing.assert_allclose(
            sample.log_probs, wanted.log_probs[row, : len(tokens)], rtol=1e-3, atol=1e-5
        )
    assert {sample.finish for (sample,) in found} == {"stop", "length"}


SAMPLES = {"max_new_tokens": 12, "sampling": SAMPLING, "num_samples": 3, "key": KEY}


@pytest.fixture(scope="module")
def samples(lm):
    return generate_text(lm, PROMPTS[:2], **SAMPLES)


def test_samples_carry_the_log_probabilities_of_their_tokens(lm, samples):
    found, again = samples, generate_text(lm, PROMPTS[:2], **SAMPLES)
    assert [[s.text for s in row] for row in found] == [[s.text for s in row] for row in again]
    assert len({sample.text for row in found for sample in row}) == 6
    score = jax.jit(lm.log_probs)
    for prompt, row in zip(PROMPTS, found, strict=False):
        for sample in row:
            start = lm.tokenizer(prompt)["input_ids"]
            whole, ids = [*start, *sample.tokens], np.zeros((1, 32), np.int32)
            ids[0, : len(whole)] = whole  # no token sees those behind it
            scored = score(lm.params, ids)[0, len(start) - 1 : len(whole) - 1]
            np.testing.assert_allclose(sample.log_probs, scored, rtol=1e-3, atol=1e-4)


def brute_force(text_of, tokens, stop):
    """(text, number of tokens), token after token and character after character."""
    for count in range(1, len(tokens) + 1):
        text = text_of(tokens[:count])
        for end in range(len(text) + 1):
            lengths = [len(s) for s in stop if text[:end].endswith(s)]
            if lengths:
                return text[: end - max(lengths)], count
    return None


def test_stop_strings_end_a_sample_where_brute_force_finds_them(lm, samples):
    full = [sample for row in samples for sample in row]
    rng = np.random.default_rng(0)
    text = max((sample.text for sample in full), key=len)
    cases = [["zebra"], ["e"], [text[5:14], text[7:9]], [" "], [text], [text[5:9] + "#", "zz"]]
    for _ in range(3):
        start, length = rng.integers(0, len(text) - 8), rng.integers(1, 8)
        piece = text[start : start + length]
        cases.append([piece, piece + "zz", text[start + 1 : start + 9]])
    stopped = 0
    for i, stop in enumerate(cases):
        chunk = (4, 100)[i % 2]
        rows = generate_text(lm, PROMPTS[:2], stop=stop, chunk=chunk, **SAMPLES)
        for sample, whole in zip([x for row in rows for x in row], full, strict=True):
            body = whole.tokens[whole.tokens != lm.config.eos_id].tolist()
            wanted = brute_force(lm.tokenizer.decode, body, stop)
            stopped += wanted is not None
            finish = whole.finish if wanted is None else "stop"
            wanted = wanted or (whole.text, len(whole.tokens))
            assert (sample.text, len(sample.tokens)) == wanted
            assert sample.finish == finish
            assert sample.tokens.tolist() == whole.tokens[: wanted[1]].tolist()
    assert 10 < stopped < 6 * len(cases)


@pytest.mark.parametrize("chunk", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_pieces_joined_are_the_text(lm, chunk):
    options = {"max_new_tokens": 12, "sampling": SAMPLING, "key": KEY}
    sample = generate_text(lm, PROMPTS[:1], **options)[0][0]
    text, seen = sample.text, len(lm.tokenizer.decode(sample.tokens[:4]))
    late = text[seen - 4 : seen + 1]  # its last character comes with the fifth token
    for stop in ([], [late], [text[3:7] + "#", text[12:20], text[13:15]], [text[:2]]):
        wanted = generate_text(lm, PROMPTS[:1], stop=stop, **options)[0][0].text
        pieces = list(stream_text(lm, PROMPTS[0], stop=stop, chunk=chunk, **options))
        assert "".join(pieces) == wanted
        assert all(pieces)


def test_a_character_of_several_tokens_arrives_whole(lm):
    tokenizer = lm.tokenizer
    text = " 😀naïve≈ the end"
    ids = tokenizer("start" + text)["input_ids"]
    prompt = tokenizer("start")["input_ids"]
    assert ids[: len(prompt)] == prompt
    model = chain(tokenizer, ids[1:])
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids)
    new = len(ids) - len(prompt)
    pieces = list(stream_text(model, "start", max_new_tokens=new, chunk=1))
    assert "".join(pieces) == text == generate_text(model, ["start"], max_new_tokens=new)[0][0].text
    assert "\ufffd" not in "".join(pieces)
    assert any("😀" in piece for piece in pieces)
    held = list(stream_text(model, "start", max_new_tokens=new, chunk=1, stop=["ïve≈ the"]))
    assert "".join(held) == " 😀na"
    # Where the tokens run out within a character, what is there is shown as it is decoded.
    half = len(tokenizer("start 😀")["input_ids"]) - len(prompt) - 1
    pieces = list(stream_text(model, "start", max_new_tokens=half, chunk=1))
    (sample,) = generate_text(model, ["start"], max_new_tokens=half)[0]
    assert "".join(pieces) == sample.text == tokenizer.decode(sample.tokens)


def sentencepiece_tokenizer(template):
    """A tokenizer in the manner of SentencePiece: a mark for spaces, bytes for what is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marked = ["▁" + word for word in ("start", "one", "two")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁staroenw", *marked]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    special = [(word, vocabulary[word]) for word in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("template", ["$A", "<s> $A </s>"])
def test_what_a_tokenizer_adds(template):
    tokenizer = sentencepiece_tokenizer(template)
    words = ["▁start", "▁one", *(f"<0x{byte:02X}>" for byte in "😀".encode()), "▁two", "</s>"]
    ids = tokenizer.convert_tokens_to_ids(words)
    model = chain(tokenizer, ids, eos_id=tokenizer.eos_token_id)
    (sample,) = generate_text(model, ["start"], max_new_tokens=20)[0]
    assert sample.text == " one😀 two"
    assert sample.tokens.tolist() == ids[1:]
    assert sample.finish == "stop"
    pieces = list(stream_text(model, "start", max_new_tokens=20, chunk=1))
    assert pieces == [" one", "😀", " two"]
    if template.startswith("<s>"):
        assert len(generate_text(model, [""], max_new_tokens=1)[0][0].tokens) == 1
    else:
        with pytest.raises(UserError, match=r"^prompt: has no tokens"):
            generate_text(model, [""], max_new_tokens=1)


def test_scores_that_are_not_finite_are_refused(lm):
    """As tokens they would all be 0."""
    large = lm.replace(params=jax.tree.map(lambda x: 1e18 * x, lm.params))
    with pytest.raises(UserError, match=r"^model: its scores are not finite"):
        generate_text(large, ["a"], max_new_tokens=2)
    with pytest.raises(UserError, match=r"^model: its scores are not finite"):
        list(stream_text(large, "a", max_new_tokens=2))


def test_bad_input_is_refused(lm):
    def refuse(message, model=lm, prompts=("a",), **options):
        options = {"max_new_tokens": 2, **options}
        with pytest.raises(UserError, match=message):
            generate_text(model, prompts, **options)
        with pytest.raises(UserError, match=message):
            stream_text(model, prompts[0], **options)

    refuse("^model: has no tokenizer", lm.replace(tokenizer=None))
    refuse("^key: sampling needs one", sampling=SAMPLING)
    refuse("^stop: has an empty string", stop=["#", ""])
    refuse("^stop: must be a list of texts", stop="##")
    refuse("^chunk: must be from 1", chunk=0)
    refuse("^max_new_tokens: must be from 1", max_new_tokens=0)
    learned = lm.replace(config=lm.config.replace(positions="learned", max_positions=8))
    refuse(
        "^max_new_tokens: .* 11 positions",
        learned,
        ["a film"],
        max_new_tokens=9,
    )
    small = lm.replace(config=lm.config.replace(vocab_size=100))
    refuse(r"^input_ids: must be from 0 to 99", small)
    refuse("^model: does not generate", lm.replace(config=lm.config.replace(kind="encoder")))
    with pytest.raises(UserError, match=r"^prompts: must be a list of texts"):
        generate_text(lm, "the film", max_new_tokens=2)
    for options in ({"prompts": ""}, {"stop": "ab"}, {"chunk": 0}):
        with pytest.raises(UserError, match=rf"^{next(iter(options))}: "):
            generate_text(lm, **{"prompts": [], "max_new_tokens": 2, **options})
    assert generate_text(lm, [], max_new_tokens=2) == []

"""Tokenised corpora and the windows drawn from them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxlm.core.errors import UserError
from jaxlm.data import corpus
from tests.helpers.sentences import refused

WORDS = [f"w{i}" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, token of `w7` = 8, <eos> = 0."""
    vocabulary = {"<eos>": 0} | {word: i + 1 for i, word in enumerate(WORDS)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")


def write(path: Path, *documents: str) -> Path:
    text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_tokens_know_their_documents_sentences_and_bytes(tmp_path, tokenizer, name):
    path = write(tmp_path / name, "w0 W1\n w2\n\nw3 w4", "", "w5", "W6\nw7")
    tokens = corpus.tokenize(path, tokenizer)
    assert tokens.ids.dtype == np.uint16
    assert tokens.ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 6, 0, 7, 8]
    assert tokens.starts.tolist() == [1, 3, 4, 7, 9, 10]
    assert tokens.size == len("w0 w1  w2 w3 w4") + len("w5") + len("w6 w7")


def test_bytes_are_those_of_the_normalised_text(tmp_path, tokenizer):
    tokens = corpus.tokenize(write(tmp_path / "a.jsonl", "\u0130 w1"), tokenizer)
    assert tokens.size == len("\u0130 w1".lower().encode()) != len("\u0130 w1".encode())


def test_a_cached_domain_is_mapped_and_equal(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl.gz", "w0 w1\nw2", "w3")
    fresh = corpus.tokenize(path, tokenizer)
    first = corpus.cached(path, tokenizer, tmp_path / "cache")
    monkeypatch.delattr(corpus, "tokenize")
    again = corpus.cached(path, tokenizer, tmp_path / "cache")
    for tokens in (first, again):
        assert isinstance(tokens.ids, np.memmap)
        np.testing.assert_array_equal(tokens.ids, fresh.ids)
        np.testing.assert_array_equal(tokens.starts, fresh.starts)
        assert (tokens.boundary, tokens.size) == (fresh.boundary, fresh.size)


@pytest.mark.parametrize("names", [("wiki.en", "wiki.de"), ("en/news", "de/news")])
def test_every_domain_has_tokens_of_its_own_text(tmp_path, tokenizer, names):
    for name, text in zip(names, ("w1 w2", "w3"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", text)
    ids = [
        corpus.cached(corpus.find(tmp_path, name), tokenizer, tmp_path / "cache").ids.tolist()
        for name in names
    ]
    assert ids == [[0, 2, 3], [0, 4]]


def test_tokens_are_of_the_file_and_the_tokenizer_as_they_are_now(tmp_path, tokenizer):
    cache, path = tmp_path / "cache", write(tmp_path / "a.jsonl", "w1")
    first = corpus.cached(path, tokenizer, cache)
    assert corpus.cached(write(path, "w1"), tokenizer, cache).digest == first.digest
    changed = corpus.cached(write(path, "w2"), tokenizer, cache)
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0, "w2": 1}, unk_token="<eos>")),
        eos_token="<eos>",
    )
    again = corpus.cached(path, other, cache)
    assert (changed.ids.tolist(), again.ids.tolist()) == ([0, 3], [0, 1])
    assert len({first.digest, changed.digest, again.digest}) == 3


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("ids.npy", "flipped"),
        ("ids.npy", "cut"),
        ("starts.npy", "gone"),
        ("tokens.json", "text"),
        ("checksums.json", "flipped"),
        ("checksums.json", "gone"),
    ],
)
def test_damaged_tokens_are_made_again(tmp_path, tokenizer, name, damage):
    path, cache = write(tmp_path / "a.jsonl", "w0 w1\nw2", "w3"), tmp_path / "cache"
    fresh = corpus.cached(path, tokenizer, cache)
    fresh = corpus.Tokens(np.array(fresh.ids), np.array(fresh.starts), fresh.boundary, fresh.size)
    (victim,) = cache.glob(f"*/{name}")
    data = bytearray(victim.read_bytes())
    data[-2] ^= 1
    changes = {"flipped": data, "cut": data[:-3], "text": b"[]"}
    victim.unlink()
    if damage in changes:
        victim.write_bytes(changes[damage])
    tokens = corpus.cached(path, tokenizer, cache)
    np.testing.assert_array_equal(tokens.ids, fresh.ids)
    np.testing.assert_array_equal(tokens.starts, fresh.starts)
    assert (tokens.boundary, tokens.size) == (fresh.boundary, fresh.size)


@pytest.mark.parametrize(
    ("domains", "held_out", "key", "said"),
    [
        ([], None, "corpus.domains", "is empty"),
        ([("a", 1.0), ("./a", 2.0)], None, "corpus.domains", "has a value twice (got 'a')"),
        ([("a", 0.0), ("b", 0.0)], None, "corpus.domains", "weight of all domains"),
        ([("a", 1.0, 0.0), ("b", 0.0)], None, "corpus.domains", "final_weight of all domains"),
        ([("a", 1e308), ("b", 1e308)], None, "corpus.domains", "weight of all domains"),
        ([("a", 1.0), ("b", 1.0)], "b", "corpus.held_out", "is trained on too (got 'b')"),
    ],
)
def test_domains_that_do_not_go_together(domains, held_out, key, said):
    with refused(key, said):
        corpus.check_domains([corpus.Domain(*each) for each in domains], held_out)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none(weight):
    with pytest.raises(UserError, match=r"^corpus.domains: a: (final_)?weight: must be"):
        corpus.Domain("a", weight)
    with pytest.raises(UserError, match=r"^corpus.domains: a: final_weight: must be"):
        corpus.Domain("a", 1.0, weight)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "en/../../a"])
def test_a_domain_stays_in_its_folder(tmp_path, name):
    write(tmp_path / "a.jsonl", "w1")
    (tmp_path / "inner").mkdir()
    with pytest.raises(UserError, match="outside its folder"):
        corpus.find(tmp_path / "inner", name)


def test_a_document_without_end_is_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus.files, "LONGEST_LINE", 2**21)
    path = write(tmp_path / "a.jsonl", "w1", "w2 " * 2**21)
    with pytest.raises(UserError, match=r"a.jsonl, line 2: longer than 2 MiB. Write one document"):
        corpus.tokenize(path, tokenizer)


def test_how_many_documents_are_tokenised_at_once_changes_nothing(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", *(f"w{i} w{i + 1}\nw{i}" for i in range(9)))
    whole = corpus.tokenize(path, tokenizer)
    monkeypatch.setattr(corpus, "CHARACTERS_AT_ONCE", 12)
    parts = corpus.tokenize(path, tokenizer)
    np.testing.assert_array_equal(parts.ids, whole.ids)
    np.testing.assert_array_equal(parts.starts, whole.starts)


def domain(first: int, sentences: int, length: int = 4) -> corpus.Tokens:
    """Documents of two sentences of `length` tokens; token ids count up from `first`."""
    ids, starts = [], []
    for i in range(sentences):
        if i % 2 == 0:
            ids.append(0)
        starts.append(len(ids))
        ids += range(first + i * length, first + (i + 1) * length)
    return corpus.Tokens(np.array(ids, np.uint16), np.array(starts), 0, len(ids))


def windows(**changes) -> corpus.Windows:
    options = {"steps": 50, "batch_size": 8, "seq_len": 6, "seed": 3} | changes
    domains = [corpus.Domain("a", 3.0, 1.0), corpus.Domain("b", 1.0, 3.0)]
    return corpus.Windows([domain(1, 40), domain(1001, 60)], domains, **options)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    one, other = windows(), windows()
    later = [other.batch(step)["input_ids"] for step in (40, 7, 0)]
    for step, ids in zip((40, 7, 0), later, strict=True):
        assert ids.dtype == np.int32
        assert ids.shape == (8, 7)
        np.testing.assert_array_equal(one.batch(step)["input_ids"], ids)
    assert not np.array_equal(windows(seed=4).batch(0)["input_ids"], later[2])


def test_windows_start_with_the_boundary_and_a_sentence_and_then_follow_the_text():
    drawn = windows()
    texts = [tokens.ids.tolist() * 2 for tokens in drawn.tokens]
    firsts = {int(t.ids[s]) for t in drawn.tokens for s in t.starts}
    for step in range(drawn.steps):
        for row in drawn.batch(step)["input_ids"].tolist():
            assert row[0] == 0
            assert row[1] in firsts
            text = texts[row[1] > 1000]
            place = text.index(row[1])
            assert row[1:] == text[place : place + 6]


def test_shares_move_from_weight_to_final_weight():
    drawn = windows(steps=2000)
    of_b = drawn.plan[0] == 1
    for part, expected in ((of_b[:500], 0.25 + 0.5 * 0.125), (of_b[-500:], 0.75 - 0.5 * 0.125)):
        error = np.sqrt(expected * (1 - expected) / part.size)
        assert abs(part.mean() - expected) < 4.5 * error


def test_given_shares_draw_the_windows_of_a_plan_with_them():
    """Step by step, from the shares so far alone; equal shares give the batches of the run."""
    drawn = windows(steps=20)
    time = np.linspace(0, 1, 20)[:, None]
    shares = (1 - time) * [0.75, 0.25] + time * [0.25, 0.75]
    for step in (0, 7, 19):
        ids = windows(steps=1).batch(step, shares[: step + 1])["input_ids"]
        np.testing.assert_array_equal(ids, drawn.batch(step)["input_ids"])
    other = shares.copy()
    other[5:] = [1.0, 0.0]  # what was drawn before a change of shares stays
    domain, before = drawn._plan(other)
    np.testing.assert_array_equal(domain[:5], drawn.plan[0][:5])
    assert not domain[5:].any()
    of_a = before[domain == 0]
    np.testing.assert_array_equal(of_a, np.arange(len(of_a)))  # each window once an epoch


@pytest.mark.parametrize(
    "shares", [[[0.5, 0.5]], [[0.5, 0.5], [0.5, 0.6]], [[1.0], [1.0]], [[1.5, -0.5]] * 2]
)
def test_shares_that_are_none(shares):
    with pytest.raises(UserError, match=r"^shares: must .*\(got "):
        windows().batch(1, np.array(shares))


def test_an_epoch_sees_the_text_about_equally_often():
    tokens = domain(1, 400)
    drawn = corpus.Windows(
        [tokens], [corpus.Domain("a", 1.0)], steps=75, batch_size=4, seq_len=6, seed=0
    )
    assert len(tokens.ids) // 6 == 300  # 75 * 4: one epoch
    seen = np.bincount(
        np.concatenate([drawn.batch(step)["input_ids"][:, 1:].ravel() for step in range(75)]),
        minlength=1601,
    )[1:]
    assert seen.max() <= 3
    assert (seen == 0).mean() < 0.2
    drawn_at_random = 1 - 1 / np.e
    assert (seen > 0).mean() > drawn_at_random + 0.1


def test_all_windows_hold_every_token_once_as_a_target():
    tokens = domain(1, 7)
    cut = corpus.all_windows(tokens, 5)
    assert cut["input_ids"].shape == (-(-len(tokens.ids) // 5), 6)
    targets = cut["input_ids"][:, 1:][cut["weights"] == 1]
    np.testing.assert_array_equal(targets, tokens.ids[tokens.ids != 0])


BAD_LINES = {
    "nonsense": "not valid JSON",
    '{"words": 1}': "not a document",
    '{"text": 1}': "not a document",
    f'{{"text": {"9" * 5000}}}': "thousands of digits",
    '{"text": "\\ud800"}': "without its other half",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_is_no_document_is_named(tmp_path, tokenizer, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "w1"}}\n{line}\n')
    with refused(f"{path}, line 2", BAD_LINES[line]):
        corpus.tokenize(path, tokenizer)


def test_files_and_tokenizers_that_do_not_serve(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", "w1")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(path.read_bytes() * 100)[:-20])
    for name, said in (("empty.jsonl", "has no text"), ("cut.jsonl.gz", "not a whole gzip file")):
        with refused(str(tmp_path / name), said):
            corpus.tokenize(tmp_path / name, tokenizer)
    with refused("corpus.domains", "no missing.jsonl or missing.jsonl.gz"):
        corpus.find(tmp_path, "missing")
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with refused("tokenizer", "has no eos_token"):
        corpus.tokenize(path, endless)

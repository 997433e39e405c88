"""No sentence of a validation or test split stands in the pretraining text."""

import gzip
import json
import re
from pathlib import Path

import pytest

from scripts import prepare_corpus

LONG = "the film , though slow at first , rewards a patient viewer in the end ."
MIDDLE = "a warm and honest little picture"
SHORT = "psychologically savvy ."
HELD_OUT = {"mr": [LONG, SHORT], "subj": [MIDDLE, "he leaves town and never writes home again"]}


def read(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as records:
        return [json.loads(record)["text"] for record in records]


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text, "label": 0}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()))


def plain(text: str) -> str:
    """Words between single spaces, one at either end; written apart from the script's own way."""
    return " " + " ".join(re.sub(r"[\W_]", " ", text.lower()).split()) + " "


def leaks(texts: list[str], sentences: list[str]) -> list[str]:
    """The sentences that stand in a text, or, under five words, make up a whole line of one."""
    whole = "\n".join(plain(text) for text in texts)
    lines = {plain(line) for text in texts for line in text.split("\n")}
    return [
        sentence
        for sentence in sentences
        if plain(sentence) in lines
        or (len(plain(sentence).split()) >= 5 and plain(sentence) in whole)
    ]


@pytest.mark.parametrize(
    ("lines", "offending"),
    [
        (["Something else .", LONG.upper(), "more"], {1}),
        (["and so : " + LONG.replace(",", "") + " i think"], {0}),
        (["it is true :", "the film though slow at", "first rewards a patient viewer"], {1, 2}),
        (["rewards a patient viewer in the end"], set()),  # seven words of a longer sentence
        (["who rewards at first rewards a patient viewer in the end !"], {0}),  # eight or more
        (["A warm, and honest, little picture!!"], {0}),
        (["a warm and honest little film"], set()),
        (["psychologically savvy"], {0}),
        (["a psychologically savvy thriller"], set()),  # short ones only as whole lines
        ([], set()),
    ],
)
def test_lines_with_a_held_out_sentence_are_found(lines, offending):
    held_out = prepare_corpus.HeldOut.build([LONG, MIDDLE, SHORT, "..."])
    assert held_out.offending_lines(lines) == offending


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """A small corpus in which every held-out sentence stands somewhere, in several guises."""
    source, tasks = tmp_path / "source", tmp_path / "tasks"
    for domain in prepare_corpus.DOCUMENT_DOMAINS:
        documents = [f"opening number {i} .\nsome {domain} prose .\nclosing ." for i in range(50)]
        documents[3] += f"\n{LONG}\nafter it ."
        documents[4] += f"\nas they say , {MIDDLE.title()} , indeed ."
        documents[5] = SHORT.upper()
        write(source / f"{domain}.jsonl.gz", documents)
    for domain in prepare_corpus.PHRASE_DOMAINS:
        write(source / f"{domain}.jsonl.gz", [f"Cheap, light\n{SHORT}\nA sturdy tripod"])
    for task, other in (("mr", "subj"), ("subj", "mr")):
        write(tasks / task / "train.jsonl.gz", [f"only in {task} .", *HELD_OUT[other]])
        write(tasks / task / "validation.jsonl.gz", HELD_OUT[task][:1])
        write(tasks / task / "test.jsonl.gz", HELD_OUT[task][1:])
    return source, tasks


def test_prepared_text_holds_no_held_out_sentence_and_all_the_rest(sources, tmp_path):
    out = tmp_path / "out"
    manifest = prepare_corpus.prepare(*sources, out)
    texts = {path.name.split(".")[0]: read(path) for path in out.glob("*.jsonl.gz")}
    sentences = [sentence for both in HELD_OUT.values() for sentence in both]
    assert leaks([text for domain in texts.values() for text in domain], sentences) == []
    assert texts["mr"] == ["only in mr ."]
    assert sorted(texts["pros"]) == ["A sturdy tripod", "Cheap, light"]
    assert "after it ." in texts["state_union"][3]
    assert len(texts["state_union"]) == 49
    apart = read(out / "held_out" / "movie_reviews.jsonl.gz")
    assert len(apart) == prepare_corpus.HELD_OUT_DOCUMENTS
    assert not set(apart) & set(texts["movie_reviews"])
    assert manifest["subj"] == {"documents": 1, "bytes": 14, "removed_lines": 2}
    assert manifest["state_union"]["removed_lines"] == 3
    assert manifest == json.loads((out / "manifest.json").read_text())


def test_preparing_twice_gives_the_same_bytes(sources, tmp_path):
    for out in ("one", "two"):
        prepare_corpus.prepare(*sources, tmp_path / out)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 11
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

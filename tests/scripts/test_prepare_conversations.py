"""Conversations from texts: right answers, splits by text, the same rows for the same seed."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from jaxlm.data import MessagesConfig, PairsConfig
from scripts import prepare_conversations
from scripts.prepare_conversations import ANSWERS, SHARES, prepare


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three small domains, whose lines say what is right."""
    words = "one two three four five six seven eight"
    speech = "PRESIDENT {0}'S ADDRESS. " + " ".join(f"{words} of {{0}} {i}." for i in range(9))
    domains = {
        "pros": ["\n".join(f"a good thing {i}" for i in range(20)) + "\nshort"],
        "cons": ["\n".join(f"a bad thing {i}" for i in range(20))],
        "state_union": [speech.format(name) for name in ["ADAM", "BERT CO"] * 6],
    }
    for domain, texts in domains.items():
        rows = "".join(json.dumps({"text": text, "domain": domain}) + "\n" for text in texts)
        (tmp_path / f"{domain}.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return tmp_path


def read(folder: Path) -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in SHARES
    }


def test_answers_are_those_of_the_text(source, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_conversations, "ROWS", 40)
    counts = prepare(source, tmp_path / "out")
    rows = [row for split in read(tmp_path / "out").values() for row in split]
    assert len(rows) == sum(counts.values()) == 5 * 40
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        assert "short" not in question
        if row["subtask"] == "aspect":
            assert answer == ANSWERS["aspect"]["a good thing" in question]
        elif row["subtask"] == "speaker":
            assert answer == ("Adam." if "ADAM" in question else "Bert Co.")
        elif row["subtask"] == "continuation":
            asked, said = (int(re.search(r"of .* (\d)\.", x)[1]) for x in (question, answer))
            assert said == asked + 1


def test_each_answer_of_pairs_is_chosen_once_and_rejected_once(source, tmp_path):
    prepare(source, tmp_path)
    rows, pairs = read(tmp_path), read(tmp_path / "pairs")
    for split in SHARES:
        right = {
            row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows[split]
        }
        sides = [Counter(row[side] for row in pairs[split]) for side in ("chosen", "rejected")]
        assert sides[0] == sides[1]
        for row in pairs[split]:
            lengths = sorted(len(row[side]) for side in ("chosen", "rejected"))
            assert lengths[1] <= 1.1 * lengths[0]
            assert row["chosen"] == right[row["prompt"][0]["content"]] != row["rejected"]
    assert sum(map(len, pairs.values())) >= 0.8 * sum(map(len, rows.values()))
    loaded = PairsConfig(train=str(tmp_path / "pairs" / "train.jsonl")).load(seed=0)
    assert len(loaded.train) == len(pairs["train"])


def test_no_text_is_in_two_splits_and_a_seed_gives_the_same_files(source, tmp_path):
    items = [*prepare_conversations.aspects(source), *prepare_conversations.speeches(source)]
    of = prepare_conversations.splits(items, 0)
    counts = {split: sum(of[x] == split for x in of if "speech" in x) for split in SHARES}
    assert counts == {"train": 10, "validation": 1, "test": 1}
    prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "again")
    assert read(tmp_path / "out") == read(tmp_path / "again")
    prepare(source, tmp_path / "other", seed=1)
    assert read(tmp_path / "out") != read(tmp_path / "other")


def test_the_tasks_of_the_package_are_enough(tmp_path):
    counts = prepare(None, tmp_path)
    assert sum(counts.values()) == 1000
    assert counts["train"] > 700
    texts = MessagesConfig(train=str(tmp_path / "train.jsonl")).load(seed=0)
    assert len(texts.train) == counts["train"]

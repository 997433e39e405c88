"""Make a task of product reviews, cons (0) or pros (1), from two files of the corpus.

    python scripts/prepare_reviews.py --source DIR --out build/reviews

``DIR`` holds ``pros.jsonl.gz`` and ``cons.jsonl.gz`` with the lines of the NLTK data package
``pros_cons`` (CC BY 4.0; see prepare_corpus.py). A line becomes a row, and its file is its label.
Lines of fewer than three words are left out, and so are lines whose words occur a second time, in
either file. Rows are drawn by a fixed seed, as many of each label: 1,000 for validation, 1,000 for
the test, all others for training.
"""

import argparse
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

DOMAINS = ("cons", "pros")
HELD_OUT = {"validation": 500, "test": 500}
"""Rows of each label in a split."""


def words(line: str) -> tuple[str, ...]:
    """Return the lower-cased alphanumeric words of a line."""
    return tuple(re.findall(r"[^\W_]+", line.lower()))


def read_lines(path: Path) -> list[str]:
    """Return all lines of a domain's documents, with white space collapsed."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(row)["text"] for row in file]
    return [" ".join(line.split()) for text in texts for line in text.splitlines()]


def prepare(source: Path, out: Path, *, seed: int = 0) -> dict[str, int]:
    """Write train.jsonl, validation.jsonl and test.jsonl, and return their numbers of rows."""
    lines = [read_lines(source / f"{domain}.jsonl.gz") for domain in DOMAINS]
    seen = Counter(words(line) for each in lines for line in each)
    kept = [[x for x in each if len(words(x)) >= 3 and seen[words(x)] == 1] for each in lines]
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(each)[: min(map(len, kept))].tolist() for each in kept]
    out.mkdir(parents=True, exist_ok=True)
    counts, start = {}, 0
    for split, count in (*HELD_OUT.items(), ("train", len(drawn[0]))):
        rows = [(x, label) for label, each in enumerate(drawn) for x in each[start : start + count]]
        start, counts[split] = start + count, len(rows)
        shuffled = (rows[i] for i in rng.permutation(len(rows)))
        text = "".join(json.dumps({"text": x, "label": label}) + "\n" for x, label in shuffled)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return counts


def main() -> None:
    """Write the files, and print how many rows they have."""
    parser = argparse.ArgumentParser(description="Make a task of product reviews.")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for split, count in prepare(options.source, options.out).items():
        print(f"{options.out / split}.jsonl: {count} rows")


if __name__ == "__main__":
    main()

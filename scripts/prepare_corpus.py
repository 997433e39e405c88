"""Prepare the text that the shipped language model is pretrained on.

    python scripts/prepare_corpus.py --source DIR --out build/corpus

``--source`` holds one ``<domain>.jsonl.gz`` per domain, with one document
``{"text": ..., "domain": ...}`` per line. The texts are the NLTK data packages ``movie_reviews``,
``pros_cons``, ``state_union``, ``inaugural``, ``shakespeare`` and ``genesis`` (English King James
version), with markup removed: `CC BY 4.0` for the first two, public domain for the rest.
``--tasks`` holds the two shipped tasks, whose training sentences join the corpus without labels.

No sentence of a validation or test split may occur in the corpus. A line is removed if

* its words are exactly those of a held-out sentence (case and punctuation ignored), or
* it overlaps a run of eight words (or a whole sentence of five to seven words) that also occurs in
  a held-out sentence. The run may cross line ends.

Documents of ``movie_reviews`` drawn by a fixed seed are held out to measure bits per byte.
``manifest.json`` counts what went where.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DOCUMENT_DOMAINS = ("movie_reviews", "state_union", "inaugural", "shakespeare", "genesis_en")
PHRASE_DOMAINS = ("pros", "cons")  # one phrase a line: each becomes a document
TASKS = ("mr", "subj")
HELD_OUT_DOMAIN = "movie_reviews"
HELD_OUT_DOCUMENTS = 40
RUN_LENGTH = 8
SHORTEST_RUN = 5

Words = tuple[str, ...]


def words(text: str) -> Words:
    """The lower-cased alphanumeric words of ``text``."""
    return tuple(re.findall(r"[^\W_]+", text.lower()))


@dataclass(frozen=True)
class HeldOut:
    """What may not occur in the corpus: whole sentences, and runs of words by their length."""

    sentences: frozenset[Words]
    runs: dict[int, frozenset[Words]]

    @classmethod
    def build(cls, sentences: Iterable[str]) -> HeldOut:
        whole = {words(sentence) for sentence in sentences} - {()}
        runs: dict[int, set[Words]] = {n: set() for n in range(SHORTEST_RUN, RUN_LENGTH + 1)}
        for sentence in whole:
            n = min(len(sentence), RUN_LENGTH)
            if n >= SHORTEST_RUN:
                runs[n].update(sentence[i : i + n] for i in range(len(sentence) - n + 1))
        return cls(frozenset(whole), {n: frozenset(found) for n, found in runs.items()})

    def offending_lines(self, lines: list[str]) -> set[int]:
        """Return indices of the lines of a document that contain a held-out sentence or run."""
        split = [words(line) for line in lines]
        offending = {i for i, line in enumerate(split) if line in self.sentences}
        stream = [word for line in split for word in line]
        line_of = [i for i, line in enumerate(split) for _ in line]
        for n, runs in self.runs.items():
            for start in range(len(stream) - n + 1):
                if runs and tuple(stream[start : start + n]) in runs:
                    offending.update(line_of[start : start + n])
        return offending


def clean(document: str, held_out: HeldOut) -> tuple[list[str], int]:
    """Return the lines to keep, with white space collapsed, and the number of removed lines."""
    lines = [" ".join(line.split()) for line in document.splitlines()]
    lines = [line for line in lines if line]
    offending = held_out.offending_lines(lines)
    return [line for i, line in enumerate(lines) if i not in offending], len(offending)


def read_jsonl(path: Path) -> Iterator[dict[str, object]]:
    """The records of ``path``, gzipped or not."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def task_texts(tasks: Path, task: str, split: str) -> list[str]:
    """The sentences of one split of one task."""
    for suffix in (".jsonl.gz", ".jsonl"):
        path = tasks / task / f"{split}{suffix}"
        if path.exists():
            return [str(record["text"]) for record in read_jsonl(path)]
    sys.exit(f"error: {tasks / task} has no {split}.jsonl or {split}.jsonl.gz")


def write(path: Path, domain: str, documents: Iterable[str]) -> dict[str, int]:
    """Write ``documents`` one a line, bitwise reproducibly, and count them."""
    count = size = 0
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as out:
        for text in documents:
            out.write(json.dumps({"text": text, "domain": domain}, ensure_ascii=False).encode())
            out.write(b"\n")
            count += 1
            size += len(text.encode())
    return {"documents": count, "bytes": size}


def prepare(source: Path, tasks: Path, out: Path, *, seed: int = 0) -> dict[str, dict[str, int]]:
    """Write the corpus to ``out`` and return the counts of ``manifest.json``."""
    held_out = HeldOut.build(
        text
        for task in TASKS
        for split in ("validation", "test")
        for text in task_texts(tasks, task, split)
    )
    out.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, dict[str, int]] = {}
    rng = np.random.default_rng(seed)

    def put(domain: str, documents: list[list[str]], removed: int) -> None:
        kept = ["\n".join(lines) for lines in documents if lines]
        manifest[domain] = write(out / f"{domain}.jsonl.gz", domain, kept)
        manifest[domain]["removed_lines"] = removed

    for domain in DOCUMENT_DOMAINS + PHRASE_DOMAINS:
        records = read_jsonl(source / f"{domain}.jsonl.gz")
        cleaned = [clean(str(record["text"]), held_out) for record in records]
        documents = [lines for lines, _ in cleaned]
        removed = sum(count for _, count in cleaned)
        if domain in PHRASE_DOMAINS:
            documents = [[line] for lines in documents for line in lines]
            documents = [documents[i] for i in rng.permutation(len(documents))]
        if domain == HELD_OUT_DOMAIN:
            order = rng.permutation(len(documents))
            apart = [documents[i] for i in sorted(order[:HELD_OUT_DOCUMENTS])]
            documents = [documents[i] for i in sorted(order[HELD_OUT_DOCUMENTS:])]
            (out / "held_out").mkdir(exist_ok=True)
            name = out / "held_out" / f"{domain}.jsonl.gz"
            manifest["held_out"] = write(name, domain, ["\n".join(lines) for lines in apart])
        put(domain, documents, removed)

    for task in TASKS:
        cleaned = [clean(text, held_out) for text in task_texts(tasks, task, "train")]
        order = rng.permutation(len(cleaned))
        put(task, [cleaned[i][0] for i in order], sum(count for _, count in cleaned))

    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, default=Path("jaxlm/assets/tasks"))
    parser.add_argument("--out", type=Path, default=Path("build/corpus"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(prepare(args.source, args.tasks, args.out, seed=args.seed), indent=2))


if __name__ == "__main__":
    main()

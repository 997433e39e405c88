"""Make conversations to fine-tune on, from texts whose licences allow it.

    python scripts/prepare_conversations.py --source DIR --out build/conversations

Sentences of the package's tasks mr and subj are asked about: is the film liked, does the sentence
tell its story. With ``--source``, a folder of NLTK's domains as in prepare_corpus.py, there are
three more kinds: whether a line stands among the pros or the cons of a product (``pros``, ``cons``,
CC BY 4.0), how a speech goes on, and which president gave it (``state_union``, public domain).
Questions come from a few templates, drawn by a fixed seed. A row is ``{"messages": [user,
assistant], "subtask": kind}``. All rows of one text are in one split: 80 % of the texts are for
training, 10 % for validation and 10 % for the test. ``KIND/`` has those two of one kind.

``pairs/`` has the same questions with a right and a wrong answer, ``{"prompt": [user], "chosen":
answer, "rejected": answer, "subtask": kind}``. Two questions of a kind and a split, whose answers
differ and are about as long, exchange these: each answer is chosen once and rejected once, so
neither its length nor its words tell which it is.
"""

import argparse
import gzip
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm.data import load_task, shipped_task

ROWS = 500
"""Rows of each kind."""
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}

QUESTIONS = {
    "sentiment": (
        "Is this review positive or negative?\n\n{text}",
        "{text}\n\nDid the reviewer like the film? Answer positive or negative.",
        "Classify the sentiment of this sentence about a film: {text}",
    ),
    "story": (
        "Does this sentence tell the story of a film, or judge it?\n\n{text}",
        "{text}\n\nStory or judgement?",
        "Say whether this sentence is from a plot summary or a review: {text}",
    ),
    "aspect": (
        "Is this a strength or a weakness of a product?\n\n{text}",
        "{text}\n\nWould this be listed under pros or cons?",
    ),
    "continuation": (
        "Continue this speech with one sentence:\n\n{text}",
        "{text}\n\nWhat could the president say next?",
    ),
    "speaker": (
        "Which president said this to the Congress?\n\n{text}",
        "{text}\n\nName the president who gave this address.",
    ),
}
ANSWERS = {
    "sentiment": ("The review is negative.", "The review is positive."),
    "story": ("It judges the film.", "It tells the story."),
    "aspect": ("It is a weakness.", "It is a strength."),
}


class Item(NamedTuple):
    """A text to ask about, the answer, and the name of the text that it was taken from."""

    kind: str
    source: str
    text: str
    answer: str


def sentences(kind: str, task: str) -> Iterator[Item]:
    """Yield the training sentences of a task of the package."""
    for i, example in enumerate(load_task(shipped_task(task), seed=0).train):
        yield Item(kind, f"{task} {i}", example.fields["text"], ANSWERS[kind][example.label])


def documents(source: Path, domain: str) -> list[str]:
    """Return the texts of a domain."""
    with gzip.open(source / f"{domain}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(row)["text"] for row in file]


def aspects(source: Path) -> Iterator[Item]:
    """Yield the lines of pros and cons that have three words or more."""
    for label, domain in enumerate(("cons", "pros")):
        lines = "\n".join(documents(source, domain)).splitlines()
        for i, line in enumerate(lines):
            if len(line.split()) >= 3:
                yield Item("aspect", f"{domain} {i}", line.strip(), ANSWERS["aspect"][label])


def speeches(source: Path) -> Iterator[Item]:
    """Yield sentences of addresses with the next one, and with the president who gave them."""
    for i, text in enumerate(documents(source, "state_union")):
        name = re.match(r"PRESIDENT ([A-Z][A-Z. ]+)'S", text)
        found = [" ".join(x.split()) for x in re.split(r"(?<=[.!?])\s+", text)]
        for sentence, following in itertools.pairwise(found):
            if not all(8 <= len(x.split()) <= 40 for x in (sentence, following)):
                continue
            yield Item("continuation", f"speech {i}", sentence, following)
            if name:
                yield Item("speaker", f"speech {i}", sentence, name[1].title() + ".")


def splits(items: list[Item], seed: int) -> dict[str, str]:
    """Return the split of every source; each domain is divided by the shares."""
    bounds = np.cumsum(list(SHARES.values())[:-1])
    found = {}
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(item.source for item in items):
        groups.setdefault(name.split()[0], []).append(name)
    for names in groups.values():
        places = np.random.default_rng(seed).permutation(len(names)) / len(names)
        for name, split in zip(names, np.searchsorted(bounds, places, "right"), strict=True):
            found[name] = list(SHARES)[split]
    return found


def prepare(source: Path | None, out: Path, *, seed: int = 0) -> dict[str, int]:
    """Write train.jsonl, validation.jsonl and test.jsonl, and return their numbers of rows."""
    items = [*sentences("sentiment", "mr"), *sentences("story", "subj")]
    if source is not None:
        items += [*aspects(source), *speeches(source)]
    split_of, rng = splits(items, seed), np.random.default_rng(seed)
    rows: dict[str, list[str]] = {split: [] for split in SHARES}
    for kind, questions in QUESTIONS.items():
        mine = [item for item in items if item.kind == kind]
        for i in rng.permutation(len(mine))[:ROWS]:
            question = questions[rng.integers(len(questions))].format(text=mine[i].text)
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": mine[i].answer},
            ]
            row = {"messages": messages, "subtask": kind}
            rows[split_of[mine[i].source]].append(json.dumps(row, ensure_ascii=False) + "\n")
    for split, lines in rows.items():
        shuffled = [lines[i] for i in rng.permutation(len(lines))]
        write(out / "pairs" / f"{split}.jsonl", pairs(shuffled))
        write(out / f"{split}.jsonl", shuffled)
        for kind in QUESTIONS if split != "train" else ():
            if mine := [line for line in shuffled if json.loads(line)["subtask"] == kind]:
                write(out / kind / f"{split}.jsonl", mine)
    return {split: len(lines) for split, lines in rows.items()}


def pairs(lines: list[str]) -> list[str]:
    """Return preference pairs of the rows that find a partner, in their order."""
    rows = [json.loads(line) for line in lines]
    answers = [row["messages"][1]["content"] for row in rows]
    rejected: dict[int, str] = {}
    waiting: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (rows[i]["subtask"], len(answers[i]))):
        for j in waiting:
            alike = rows[i]["subtask"] == rows[j]["subtask"]
            # The longer one is the one that comes later.
            if alike and answers[i] != answers[j] and len(answers[i]) <= 1.1 * len(answers[j]):
                rejected |= {i: answers[j], j: answers[i]}
                waiting.remove(j)
                break
        else:
            waiting.append(i)
    found = [
        {
            "prompt": row["messages"][:1],
            "chosen": answer,
            "rejected": rejected[i],
            "subtask": row["subtask"],
        }
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
        if i in rejected
    ]
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in found]


def write(path: Path, lines: list[str]) -> None:
    """Write a file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write the files, and print how many rows they have."""
    parser = argparse.ArgumentParser(description="Make conversations to fine-tune on.")
    parser.add_argument("--source", type=Path, help="folder of pros, cons and state_union")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for split, count in prepare(options.source, options.out).items():
        print(f"{options.out / split}.jsonl: {count} rows")


if __name__ == "__main__":
    main()

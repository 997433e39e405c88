"""Make the data of the shipped tasks from the published sentences.

    python scripts/make_task_assets.py SOURCE

SOURCE holds mr/ and subj/, each with train.jsonl and validation.jsonl (fields text and label, lines
shuffled). test = validation.jsonl; validation = 1,000 sentences drawn from train.jsonl by a fixed
seed; train = the rest. Sentences of train.jsonl that also occur in test, and sentences of train
that also occur in validation, are left out. Only letters and digits are compared.
"""

import argparse
import gzip
import json
import unicodedata
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).parents[1] / "jaxlm" / "assets" / "tasks"
SEED = 0
HELD_OUT = 1000


def normalise(text: str) -> str:
    """Return the letters and digits of a sentence, case-folded."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if character.isalnum())


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without(rows: list[dict], others: list[dict]) -> list[dict]:
    """Return the rows whose sentence does not occur in `others`."""
    taken = {normalise(row["text"]) for row in others}
    return [row for row in rows if normalise(row["text"]) not in taken]


def split(source: Path) -> dict[str, list[dict]]:
    test = read(source / "validation.jsonl")
    rows = without(read(source / "train.jsonl"), test)
    order = np.random.Generator(np.random.PCG64(SEED)).permutation(len(rows))
    held_out = set(order[:HELD_OUT].tolist())
    validation = [row for i, row in enumerate(rows) if i in held_out]
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return {"train": without(train, validation), "validation": validation, "test": test}


def write(path: Path, rows: list[dict]) -> None:
    """Write the same bytes every time: the archive has no file name and no date."""
    lines = (
        json.dumps({"text": row["text"], "label": row["label"]}, ensure_ascii=False) for row in rows
    )
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data, compresslevel=9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    source = parser.parse_args().source
    for name in ("mr", "subj"):
        read_rows = sum(
            len(read(source / name / f"{part}.jsonl")) for part in ("train", "validation")
        )
        splits = split(source / name)
        for key, rows in splits.items():
            write(ASSETS / name / f"{key}.jsonl.gz", rows)
        counts = {key: len(rows) for key, rows in splits.items()}
        print(name, counts, "left out as repeated:", read_rows - sum(counts.values()))


if __name__ == "__main__":
    main()

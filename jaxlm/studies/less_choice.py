"""The choice of rows: scores that need no gradients, and the files of a choice."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxlm.artifacts.files import read_jsonl, report_write_errors, write_jsonl
from jaxlm.artifacts.folder import seal, verify
from jaxlm.artifacts.processes import is_main_process
from jaxlm.core.errors import UserError
from jaxlm.influence import bm25, pool, random_scores, representation_similarity, select
from jaxlm.studies.less_rows import PoolRow, Rows, row_values
from jaxlm.train.state import Program

METHODS = ("less", "random", "matched", "full", "bm25", "representation")
"""Ways to choose rows: by gradients, at random, at random with the answers of the target, all rows,
by common words, by hidden states."""

SCORES, SELECTED = "scores.jsonl", "selected.jsonl"
BLOCK = 64


def shallow_scores(
    method: str, lm: Any, rows: Rows, target: Rows, *, seed: int
) -> Float[np.ndarray, " N"]:
    """Return scores of rows by a method that needs no gradients, with the model before training.

    "bm25" compares tokens, "representation" mean hidden states in which later tokens have larger
    weights; a score is the maximum over the subtasks of the target. `seed` is that of the others.
    """
    if method in ("random", "matched"):
        return np.asarray(random_scores(jax.random.key(seed), len(rows.rows)))
    groups = target.subtasks
    over = None if groups is None else "max"
    if method == "bm25":
        documents, queries = ([each.ids for each in side.rows] for side in (rows, target))
        return bm25(documents, queries, groups, over=over)
    return representation_similarity(_states(lm, rows), _states(lm, target), groups, over=over)


def _states(lm: Any, rows: Rows) -> Float[np.ndarray, "N D"]:
    def pool_states(params, batch):
        mask = batch["attention_mask"]
        return pool(lm.hidden(params, batch["input_ids"], mask), mask)

    return row_values(Program(pool_states), lm.params, lm, rows.rows, BLOCK)


def shares_of_answers(target: Rows) -> dict[str, float]:
    """Return the share of target rows that each answer has."""
    answers = [answer for row in target.rows if (answer := _answer(row)) is not None]
    if len(answers) < len(target.rows):
        raise UserError(
            "match_answers: the target has conversations, whose answers are free text. Give "
            "target.task."
        )
    return {each: answers.count(each) / len(answers) for each in sorted(set(answers))}


def matched(
    rows: Sequence[PoolRow],
    scores: Float[np.ndarray, " N"],
    count: int,
    shares: Mapping[str, float],
) -> list[int]:
    """Return the places of the best rows of each answer, the highest score first.

    The answers have the given shares of `count`, which sum to 1; other answers are not chosen.
    """
    # Round quotas by largest remainder, so that they sum to count.
    exact = {answer: share * count for answer, share in shares.items()}
    quotas = {answer: int(number) for answer, number in exact.items()}
    by_rest = sorted(exact, key=lambda answer: quotas[answer] - exact[answer])
    for answer in by_rest[: count - sum(quotas.values())]:
        quotas[answer] += 1
    places: list[int] = []
    for answer, quota in quotas.items():
        having = np.array([i for i, row in enumerate(rows) if _answer(row) == answer], int)
        if len(having) < quota:
            raise UserError(
                f"fraction: needs {quota} rows with the answer {answer!r} (got {len(having)}). "
                "Lower fraction, or set match_answers to false."
            )
        if quota:
            places += having[select(scores[having], count=quota)].tolist()
    return sorted(places, key=lambda place: (-scores[place], place))


def _answer(row: PoolRow) -> str | None:
    answer: str | None = row.text.get("completion")
    return answer


def write_choice(
    folder: Path,
    rows: Sequence[PoolRow],
    scores: Float[np.ndarray, " N"] | None,
    fraction: float,
    shares: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Choose the rows with the highest scores, ties in order of rows, and write both files.

    `scores.jsonl` has {"id", "score"} for every row; `selected.jsonl` has the id, source, score and
    text of every chosen row, the best first. Without scores all rows are chosen. Returns the
    numbers of chosen rows, in all, from each source and with noise.
    """
    places = list(range(len(rows))) if scores is None else select(scores, fraction).tolist()
    if scores is not None and shares is not None:
        places = matched(rows, scores, len(places), shares)
    chosen = []
    for place in places:
        row = rows[place]
        number = {} if scores is None else {"score": float(scores[place])}
        chosen.append({"id": row.id, "source": row.source, **number, **row.text})
    with report_write_errors(folder):
        if scores is not None:
            pairs = zip(rows, scores.tolist(), strict=True)
            write_jsonl(folder / SCORES, ({"id": row.id, "score": each} for row, each in pairs))
        write_jsonl(folder / SELECTED, chosen)
        if is_main_process():
            seal(folder, "*.jsonl")
    return counts([rows[place] for place in places], rows)


def counts(taken: Sequence[PoolRow], rows: Sequence[PoolRow]) -> dict[str, Any]:
    """Return how many rows are taken, in all, from each source of `rows` and with noise."""
    by_source = Counter(row.source for row in taken)
    return {
        "rows": len(taken),
        "sources": {name: by_source[name] for name in dict.fromkeys(row.source for row in rows)},
        "noise": sum(row.noise for row in taken),
    }


def read_choice(folder: Path, rows: Sequence[PoolRow]) -> list[PoolRow]:
    """Return the chosen rows, in the order of the file."""
    verify(folder)
    known = {row.id: row for row in rows}
    path = folder / SELECTED
    records = read_jsonl(path)
    try:
        return [known[record["id"]] for record in records]
    except (KeyError, TypeError):
        raise UserError(f"{path}: is not the choice that was made. Remove {folder}.") from None

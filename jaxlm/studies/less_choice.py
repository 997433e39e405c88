"""Which rows are taken: the ways to score them without gradients, and the file of a choice."""

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
from jaxlm.data import PaddedRows
from jaxlm.influence import bm25, pool, random_scores, representation_similarity, select
from jaxlm.studies.less_rows import PoolRow, Rows
from jaxlm.train.state import Program

METHODS = ("less", "random", "matched", "full", "bm25", "representation")
"""Ways to choose: by gradients, at random, at random among the answers of the target, all rows, by
common words, by hidden states."""

SCORES, SELECTED = "scores.jsonl", "selected.jsonl"
BLOCK = 64


def shallow_scores(
    method: str, lm: Any, rows: Rows, target: Rows, *, seed: int
) -> Float[np.ndarray, " N"]:
    """Scores of rows by a method that needs no gradients.

    Args:
        method: "random" or "matched"; "bm25" over tokens; "representation", cosines of the mean
            hidden state, later tokens counting more.
        lm: the model before training.
        rows: to be scored.
        target: what they are to help with; of its subtasks the best counts.
        seed: of "random" and "matched".
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
    padded = PaddedRows(rows.rows, lm.config.pad_id or 0, "targets")

    def pool_states(params, batch):
        mask = batch["attention_mask"]
        return pool(lm.hidden(params, batch["input_ids"], mask), mask)

    pooled = Program(pool_states)
    found: dict[int, np.ndarray] = {}
    for places in padded.blocks(BLOCK):
        filled = places + places[:1] * (BLOCK - len(places))
        states = np.asarray(pooled(lm.params, padded.batch(filled)))
        found.update(zip(places, states, strict=False))
    return np.stack([found[place] for place in range(len(padded))])


def shares_of_answers(target: Rows) -> dict[str, float]:
    """How often each answer is right in the target.

    Raises:
        UserError: the target has conversations, whose answers are texts of their own.
    """
    answers = [answer for row in target.rows if (answer := _answer(row)) is not None]
    if len(answers) < len(target.rows):
        raise UserError(
            "match_answers: the target is conversations, whose answers are their own. Give "
            "target.task."
        )
    return {each: answers.count(each) / len(answers) for each in sorted(set(answers))}


def matched(
    rows: Sequence[PoolRow],
    scores: Float[np.ndarray, " N"],
    count: int,
    shares: Mapping[str, float],
) -> list[int]:
    """The places of the best rows of each answer, as many of it as its share of all says.

    Args:
        rows: to choose from.
        scores: of each.
        count: how many are taken.
        shares: of each answer, with the sum 1; rows with other answers are not taken.

    Returns:
        Places, the highest score first.

    Raises:
        UserError: there are too few rows with an answer.
    """
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
                f"fraction: {quota} rows with the answer {answer!r} are to be taken (got "
                f"{len(having)}). Lower fraction, or set match_answers to false."
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
    """Takes the rows with the highest scores, of equal ones the first, and writes both files.

    `scores.jsonl` has {"id", "score"} of every row, `selected.jsonl` of every row that is taken its
    id, source, score and text, the best first.

    Args:
        folder: for the files.
        rows: all rows.
        scores: of each; None takes all rows.
        fraction: the part that is taken.
        shares: of answers among what is taken, see `matched`; None for what the scores give.

    Returns:
        How many are taken of each source, and how many are noise.
    """
    places = list(range(len(rows))) if scores is None else select(scores, fraction).tolist()
    if scores is not None and shares is not None:
        places = matched(rows, scores, len(places), shares)
    lines = [
        {"id": row.id, "score": float(each)}
        for row, each in zip(rows, () if scores is None else scores, strict=scores is not None)
    ]
    chosen = []
    for place in places:
        row = rows[place]
        number = {} if scores is None else {"score": float(scores[place])}
        chosen.append({"id": row.id, "source": row.source, **number, **row.text})
    with report_write_errors(folder):
        if scores is not None:
            write_jsonl(folder / SCORES, lines)
        write_jsonl(folder / SELECTED, chosen)
        if is_main_process():
            seal(folder, "*.jsonl")
    taken = [rows[place] for place in places]
    names = dict.fromkeys(row.source for row in rows)
    return {
        "rows": len(taken),
        "sources": {name: sum(row.source == name for row in taken) for name in names},
        "noise": sum(row.noise for row in taken),
    }


def read_choice(folder: Path, rows: Sequence[PoolRow]) -> list[PoolRow]:
    """The rows that a choice took, in its order.

    Raises:
        UserError: the file is not there, is not as it was written, or names other rows.
    """
    verify(folder)
    known = {row.id: row for row in rows}
    path = folder / SELECTED
    records = read_jsonl(path)
    try:
        return [known[record["id"]] for record in records]
    except (KeyError, TypeError):
        raise UserError(f"{path}: is not the choice that was made. Remove {folder}.") from None

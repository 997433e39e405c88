"""ROUGE-L: the longest common subsequence of two texts."""

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

_OTHERS = re.compile(r"[^a-z0-9]+")


class RougeL(NamedTuple):
    """Precision, recall, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def rouge_l(reference: str | Sequence[Hashable], hypothesis: str | Sequence[Hashable]) -> RougeL:
    """Return ROUGE-L of a hypothesis, as the package `rouge_score` without its stemmer has it.

    Words of texts are runs of the letters a to z and of digits, in lower case. Sequences, such as
    token ids, are compared as they are. An empty side gives 0.

    Reference: Lin (2004), "ROUGE: a package for automatic evaluation of summaries".

    >>> round(rouge_l("The cat sat on the mat.", "the cat lay on a mat").f1, 4)
    0.6667
    """
    wanted, given = (
        _OTHERS.sub(" ", text.lower()).split() if isinstance(text, str) else text
        for text in (reference, hypothesis)
    )
    common = _common(wanted, given)
    if not common:
        return RougeL(0.0, 0.0, 0.0)
    precision, recall = common / len(given), common / len(wanted)
    return RougeL(precision, recall, 2 * precision * recall / (precision + recall))


def _common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence.

    A row of the table of prefixes rises by 0 or 1 a step. Its rises are the zeros of a number, so
    that one addition of whole numbers computes the next row (Hyyrö 2004).
    """
    places: defaultdict[Hashable, int] = defaultdict(int)
    for i, token in enumerate(a):
        places[token] |= 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        both = row & places[token]
        row = ((row + both) | (row - both)) & full
    return len(a) - row.bit_count()

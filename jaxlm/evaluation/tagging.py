"""Tags of words: accuracy, and F1 of the entities that tags such as B-PER and I-PER mark."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxlm.evaluation.classification import majority_accuracy
from jaxlm.evaluation.report import class_report, confusion_matrix, count_report

Entity = tuple[str, int, int]
"""Its kind, and the places of its first and last word."""

_TAG = re.compile(r"([BIES])(?:-(.*))?", re.DOTALL)


def marks_entities(names: Iterable[str]) -> bool:
    """Return whether tags mark entities: whether one of them begins with B- or I-."""
    return any(name.startswith(("B-", "I-")) for name in names)


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities that the tags of a text mark, in order.

    As in conlleval and in seqeval's default, an entity begins at B- or S-, and also at I- or E-
    after another kind, after the end of an entity, or after a word outside. Tags without such a
    prefix are outside.

    >>> entities(["I-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-ORG"])
    [('PER', 0, 1), ('LOC', 3, 3), ('LOC', 4, 4), ('ORG', 5, 5)]
    """
    found: list[Entity] = []
    last, kind = "O", ""
    for place, tag in enumerate(tags):
        match = _TAG.fullmatch(tag)
        prefix, of = (match[1], match[2] or "_") if match else ("O", "")
        if match and (prefix in "BS" or last in "OES" or of != kind):
            found.append((of, place, place))
        elif match:
            found[-1] = (of, found[-1][1], place)
        last, kind = prefix, of
    return found


def tag_report(
    labels: Sequence[Int[np.ndarray, " _"]],
    predicted: Sequence[Int[np.ndarray, " _"]],
    names: Sequence[str],
) -> dict[str, Any]:
    r"""Return what a paper prints about predicted tags.

    If the tags mark entities, that is the precision, recall and F1 of all `entities` together,
    where one is right if its kind and both of its ends are; otherwise the macro F1, the mean of the
    F1 of the tags that occur. A ratio with the denominator 0 is 0.

    Args:
        labels: for each text, the class of each word.
        predicted: the predicted classes, in the same shapes.
        names: names of the classes.

    Returns:
        `f1`, `precision` and `recall`, or `macro_f1`; `accuracy` of the tags of words, and
        `majority_accuracy`, that of always giving the most frequent tag; and `classes`, the counts
        and ratios of each kind of entity, or of each tag.

    References:
        Tjong Kim Sang and De Meulder, Introduction to the CoNLL-2003 shared task (cs/0306050).
    """
    words, chosen = np.concatenate([*labels]), np.concatenate([*predicted])
    report: dict[str, Any] = {
        "accuracy": float(np.mean(words == chosen)),
        "majority_accuracy": majority_accuracy(words),
    }
    if not marks_entities(names):
        columns = class_report(confusion_matrix(chosen, words, len(names)))
        occur = np.flatnonzero(columns["examples"] + columns["predicted"])
        columns = {name: values[occur] for name, values in columns.items()}
        kinds = [names[i] for i in occur.tolist()]
        report["macro_f1"] = float(columns["f1"].mean())
    else:
        true, found = (
            {
                (text, *entity)
                for text, row in enumerate(rows)
                for entity in entities([names[i] for i in row])
            }
            for rows in (labels, predicted)
        )
        kinds = sorted({kind for _, kind, *_ in true | found})
        counts = [Counter(kind for _, kind, *_ in some) for some in (true & found, found, true)]
        by_kind = [np.array([count[kind] for kind in kinds], int) for count in counts]
        columns = count_report(*by_kind)
        total = count_report(*(count.sum(keepdims=True) for count in by_kind))
        report |= {name: total[name].item() for name in ("f1", "precision", "recall")}
    report["classes"] = {
        kind: {name: values[i].item() for name, values in columns.items()}
        for i, kind in enumerate(kinds)
    }
    return report

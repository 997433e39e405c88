"""How long does a topic model take to unlearn documents, and how far from retraining does it end?

usage: python -m benchmarks.topics [--quick] [--repeats 7]

Documents are drawn from known topics with anchor words. Retraining is `topics.fit` on sparse counts
of the documents that stay; unlearning is `topics.unlearn` on those that go. They are interleaved.

  documents, forgotten  numbers of documents
  which                 are forgotten: random ones, or the heaviest in one topic
  retrain_s, unlearn_s  seconds, median over the repeats
  times                 retrain_s over unlearn_s
  Q                     largest difference of the co-occurrence from recomputation
  unlearned             distance of the topics from those of retraining with the same anchors, the
                        largest L1 norm of a column
  bound                 of `topics.unlearn` on the Frobenius norm of that difference
  euclidean, stale      the same for the Euclidean projection, and for the model before unlearning
  stable                whether retraining chooses the same anchors, by `unlearn`

--quick measures the smallest corpus, with two repeats. The last line is one JSON object.
"""

import argparse
from typing import Any

import numpy as np
import scipy

from benchmarks import common
from jaxlm import topics


def true_topics(rng: np.random.Generator, words: int, r: int, anchor: float = 0.15) -> np.ndarray:
    """Draw topics [words, r]; word k is the anchor word of topic k, with probability `anchor`."""
    others = rng.dirichlet(np.full(words - r, 0.5), r).T
    return np.concatenate([anchor * np.eye(r), (1 - anchor) * others])


def documents(
    rng: np.random.Generator, A: np.ndarray, m: int, length: int, alpha: float = 0.2
) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """Draw counts of m documents of equal length, and their weights [m, r]."""
    n, r = A.shape
    weights = rng.dirichlet(np.full(r, alpha), m)
    tokens = rng.multinomial(length, weights)
    rows = [np.repeat(np.arange(m), tokens[:, k]) for k in range(r)]
    words = [rng.choice(n, len(rows[k]), p=A[:, k]) for k in range(r)]
    places = (np.concatenate(rows), np.concatenate(words))
    return scipy.sparse.csr_array((np.ones(m * length), places), shape=(m, n)), weights


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest L1 norm of a column of the difference."""
    return float(np.abs(found - expected).sum(axis=0).max())


def measure(
    size: tuple[int, int, int, int], deletions: tuple[tuple[str, float], ...], repeats: int
) -> list[dict[str, Any]]:
    """Return the rows of one corpus: words, topics, documents and their length."""
    n, r, m, length = size
    rng = np.random.default_rng(0)
    counts, weights = documents(rng, true_topics(rng, n, r), m, length)
    model = topics.fit(counts, r)
    orders = {"random": rng.permutation(m), "heaviest": np.argsort(-weights[:, 0])}
    rows = []
    for name, share in deletions:
        gone, kept = np.split(orders[name], [round(share * m)])
        forget, retain = counts[gone], counts[np.sort(kept)]
        times = common.interleaved(
            {
                "retrain": lambda retain=retain: topics.fit(retain, r),
                "unlearn": lambda forget=forget: topics.unlearn(model, forget),
            },
            repeats,
        )
        Q = topics.cooccurrence(retain)
        same_anchors, _, _ = topics.recover(Q, model.anchors)
        exact = topics.unlearn(model, forget)
        published = topics.unlearn(model, forget, projection="euclidean")
        rows.append(
            {
                "words": f"{n} words, {r} topics",
                "documents": m,
                "forgotten": len(gone),
                "which": name,
                "retrain_s": times["retrain"],
                "unlearn_s": times["unlearn"],
                "times": times["retrain"] / times["unlearn"],
                "Q": float(np.abs(exact.model.Q - Q).max()),
                "unlearned": distance(exact.model.topics, same_anchors),
                "bound": exact.distance_bound if exact.anchors_stable else None,
                "euclidean": distance(published.model.topics, same_anchors),
                "stale": distance(model.topics, same_anchors),
                "stable": exact.anchors_stable,
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest corpus, two repeats")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    sizes = [(120, 6, 20_000, 10), (1000, 20, 20_000, 50), (1000, 20, 80_000, 50)]
    deletions = (
        *(("random", share) for share in (0.001, 0.01, 0.05, 0.2)),
        *(("heaviest", share) for share in (0.01, 0.2)),
    )
    if options.quick:
        sizes, options.repeats = sizes[:1], 2
    rows = [row for size in sizes for row in measure(size, deletions, options.repeats)]
    common.print_table(rows)
    common.print_report("topics", rows)


if __name__ == "__main__":
    main()

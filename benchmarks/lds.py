"""Which attributions predict the losses of targets after training on parts of the data?

usage: python -m benchmarks.lds [--quick] [--subsets 48] [--seeds 3]

The shipped model has adapters of rank 8. There are 192 rows, half from sentiment (mr) and half
from subjectivity (subj); 32 more rows of mr are the targets. Models are trained on halves of the
rows, each with several seeds of adapters and order. Attributions must predict the negative loss of
every target, averaged over seeds. Random halves differ in how often each answer word occurs.
Balanced halves have half of the rows of every answer word, so counting answers does not predict
them. Attributions use models trained on all rows with other seeds, at the end of every epoch:

  LESS             cosine of Adam's step on a training row with the gradient of a target, weighted
                   by learning rates
  cosine           cosine of both gradients, likewise
  TracIn           their inner product, likewise
  TRAK             influence functions of the margin log(p / (1 - p)), mean over these models
  representation   cosine of mean hidden states before training
  BM25             words in common
  answer words     1 where a training row has the target's answer, else 0: the trivial explanation
  random           random numbers

  score            linear datamodelling score on random halves: Spearman's correlation over the
                   halves, mean over targets
  partial          the same with the counts of all answer words regressed out of the ranks
  balanced         the score on balanced halves
  ..._low, _high   95 % intervals over halves and targets
  noise            a row: correlation between the outputs of one training seed and the mean of the
                   others, a bound on the score of a perfect attribution for one seed

--quick uses 5 subsets of 32 rows. The last line is one JSON object.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import rankdata, spearmanr

import jaxlm
from benchmarks import common
from jaxlm import influence, peft
from jaxlm.core import paths
from jaxlm.data import PaddedRows, task_config
from jaxlm.studies.less_rows import PoolRow, Reader, Source, Target
from jaxlm.train.losses import row_losses

EPOCHS, BATCH = 4, 16
LENGTH = 48
RATE = 1e-3
DIM = 128
"""Length of a row of features; TRAK needs more training rows than that."""
REPLICATES = 300
"""Replicates of the bootstrap of partial correlations."""


class Problem:
    """Rows, targets, and training on any subset of the rows."""

    def __init__(self, rows: int, targets: int):
        self.lm = jaxlm.from_pretrained()
        reader = Reader(self.lm, LENGTH)
        self.rows: list[PoolRow] = []
        for name in ("mr", "subj"):
            source = Source(task=task_config({"name": name}), rows=rows // 2)
            self.rows += reader.source(name, source).rows
        target = Target(task=task_config({"name": "mr"}), rows=targets)
        self.targets = list(reader.target(target).rows)
        self.train, self.target = (self._whole(side) for side in (self.rows, self.targets))
        self.losses = row_losses(self.adapted(0))
        self.answers, self.target_answers = answer_words(self.rows, self.targets)

    def adapted(self, seed: int) -> Any:
        """Return the model with new adapters."""
        return peft.lora(self.lm, jax.random.key(seed), rank=8, targets=r"attention\.")

    def _whole(self, rows: list[PoolRow]) -> Any:
        padded = PaddedRows(rows, self.lm.config.pad_id or 0, "targets")
        return jax.tree.map(jnp.asarray, padded.batch(range(len(rows))))

    def trained(self, mask: np.ndarray, seed: int) -> tuple[list[Any], list[Any], list[float]]:
        """Return parameters, Adam's states and mean learning rates at the end of every epoch."""
        places = np.flatnonzero(mask)
        steps = len(places) // BATCH
        rng = np.random.default_rng([seed, len(places)])
        order = [rng.permutation(places)[: steps * BATCH].reshape(steps, -1) for _ in range(EPOCHS)]
        params = self.adapted(seed).params
        chosen, frozen = paths.split(params, peft.LORA)
        ends = self._fit(chosen, frozen, jnp.asarray(order), steps=EPOCHS * steps)
        rates = np.asarray(schedule(EPOCHS * steps)(np.arange(EPOCHS * steps)))
        models, states = [], []
        for epoch in range(EPOCHS):
            end, state = jax.tree.map(lambda a, epoch=epoch: a[epoch], ends)
            models.append(paths.merge(end, frozen))
            states.append(state)
        return models, states, rates.reshape(EPOCHS, steps).mean(1).tolist()

    @functools.partial(jax.jit, static_argnames=("self", "steps"))
    def _fit(self, chosen: Any, frozen: Any, order: Any, *, steps: int) -> Any:
        tx = optax.adam(schedule(steps))

        def step(carry, places):
            chosen, state = carry
            batch = jax.tree.map(lambda a: a[places], self.train)
            grads = jax.grad(lambda chosen: self.losses(paths.merge(chosen, frozen), batch).mean())(
                chosen
            )
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(chosen, updates), state), None

        def epoch(carry, order):
            carry, _ = jax.lax.scan(step, carry, order)
            return carry, carry

        return jax.lax.scan(epoch, (chosen, tx.init(chosen)), order)[1]

    @functools.partial(jax.jit, static_argnames="self")
    def outputs(self, params: Any) -> Any:
        """Return the negative loss of every target [M]."""
        return -self.losses(params, self.target)


def answer_words(*sides: Sequence[PoolRow]) -> list[np.ndarray]:
    """Number the answers of rows; equal answers get the same number in all lists."""
    words = [
        [tuple(row.ids[place] for place in row.loss_positions) for row in rows] for rows in sides
    ]
    known = sorted({word for side in words for word in side})
    return [np.array([known.index(word) for word in side]) for side in words]


def answer_counts(masks: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Count each answer in each subset, [K, C]."""
    return masks.astype(int) @ (answers[:, None] == np.unique(answers))


def balanced_masks(answers: np.ndarray, subsets: int) -> np.ndarray:
    """Draw halves that have half of the rows of every answer, [K, N]."""
    masks = np.zeros((subsets, len(answers)), bool)
    groups = [np.flatnonzero(answers == answer) for answer in np.unique(answers)]
    # Odd groups are rounded down and up in turn, so that all halves have the same size.
    taken = np.diff(np.cumsum([0, *map(len, groups)]) // 2)
    for seed, (places, count) in enumerate(zip(groups, taken, strict=True)):
        share = count / len(places)
        masks[:, places] = influence.subset_masks(len(places), subsets, share, seed=seed)
    return masks


def partial(sums: np.ndarray, outputs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation [M] of columns, with `counts` regressed out of the ranks."""
    known = np.column_stack([np.ones(len(counts)), rankdata(counts, axis=0)])

    def rest(values):
        ranks = rankdata(values, axis=0)
        return ranks - known @ np.linalg.lstsq(known, ranks, rcond=None)[0]

    a, b = rest(sums), rest(outputs)
    # Where the counts explain everything, only rounding errors are left: count them as zero.
    a[:, np.abs(a).max(0) < 1e-6 * len(a)] = 0
    size = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return np.divide((a * b).sum(0), size, out=np.zeros_like(size), where=size > 0)


def interval(sums: np.ndarray, outputs: np.ndarray, counts: np.ndarray) -> tuple[float, ...]:
    """Return the mean of `partial` over targets and its 95 % interval, as `influence.lds` does."""
    rng = np.random.default_rng(0)
    subsets, targets = outputs.shape
    scores = []
    for _ in range(REPLICATES):
        k, m = rng.integers(subsets, size=subsets), rng.integers(targets, size=targets)
        scores.append(partial(sums[k][:, m], outputs[k][:, m], counts[k]).mean())
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(partial(sums, outputs, counts).mean()), float(low), float(high)


def schedule(steps: int) -> optax.Schedule:
    """Return a learning rate that falls to zero."""
    return optax.linear_schedule(RATE, 0.0, steps)


def retrained(problem: Problem, masks: np.ndarray, seeds: int) -> np.ndarray:
    """Return the outputs on the targets of models trained on each subset, [seeds, K, M]."""
    outputs = np.zeros((seeds, len(masks), len(problem.targets)))
    for seed in range(seeds):
        for k, mask in enumerate(masks):
            outputs[seed, k] = problem.outputs(problem.trained(mask, seed)[0][-1])
        print(f"seed {seed}: {len(masks)} models trained", flush=True)
    return outputs


def attributions(problem: Problem, seeds: int) -> dict[str, np.ndarray]:
    """Return the scores [N, M] of every method."""
    project = influence.projector("rademacher", DIM)

    def margins(params, batch, *, tap=None):
        log_p = -problem.losses(params, batch, tap=tap)
        return log_p - jnp.log(-jnp.expm1(log_p))

    def features(function, params, batch, state=None):
        options = {"projector": project, "select": peft.LORA, "adam_state": state}
        return np.asarray(influence.gradient_features(function, params, batch, **options))

    every = np.ones(len(problem.rows), bool)
    rates: list[float] = []
    sides: dict[str, list[np.ndarray]] = {
        name: [] for name in ("adam", "train", "target", "margin", "margin of target", "residual")
    }
    for seed in range(100, 100 + seeds):
        models, states, means = problem.trained(every, seed)
        rates += means
        for params, state in zip(models, states, strict=True):
            sides["adam"].append(features(problem.losses, params, problem.train, state))
            sides["train"].append(features(problem.losses, params, problem.train))
            sides["target"].append(features(problem.losses, params, problem.target))
            sides["margin"].append(features(margins, params, problem.train))
            sides["margin of target"].append(features(margins, params, problem.target))
            sides["residual"].append(1 - np.exp(-np.asarray(problem.losses(params, problem.train))))
    s = {name: np.stack(parts) for name, parts in sides.items()}
    each = np.arange(len(problem.targets))
    tokens = [[row.ids for row in side] for side in (problem.rows, problem.targets)]
    states = [hidden(problem.lm, batch) for batch in (problem.train, problem.target)]
    rng = np.random.default_rng(0)
    return {
        "LESS": influence.score(s["adam"], s["target"], rates, each),
        "cosine": influence.score(s["train"], s["target"], rates, each),
        "TracIn": influence.tracin(s["train"], s["target"], rates, each),
        "TRAK": influence.trak(
            s["margin"], s["margin of target"], s["residual"], each, ridge=ridge(s["margin"])
        ),
        "representation": influence.representation_similarity(*states, each),
        "BM25": influence.bm25(*tokens, each),
        "answer words": (problem.answers[:, None] == problem.target_answers).astype(float),
        "random": rng.random((len(problem.rows), len(problem.targets))),
    }


def ridge(rows: np.ndarray) -> float:
    """Return a thousandth of the mean eigenvalue of the second moment."""
    return float(1e-3 * np.square(rows).sum() / len(rows) / rows.shape[-1])


def hidden(lm: Any, batch: Any) -> np.ndarray:
    """Return mean hidden states, in which later tokens count more."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return np.asarray(influence.pool(jax.jit(lm.hidden)(lm.params, ids, mask), mask))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    problem = Problem(32 if options.quick else 192, 4 if options.quick else 32)
    halves = influence.subset_masks(len(problem.rows), options.subsets)
    even = balanced_masks(problem.answers, options.subsets)
    outputs, balanced = (retrained(problem, masks, options.seeds) for masks in (halves, even))
    counts = answer_counts(halves, problem.answers)
    values = attributions(problem, options.seeds)
    table = []
    for name, tau in values.items():
        row: dict[str, Any] = {"attribution": name}
        sums = halves.astype(float) @ tau
        columns: dict[str, Any] = {
            "score": influence.lds(tau, halves, outputs.mean(0))[:3],
            "partial": interval(sums, outputs.mean(0), counts),
            "balanced": (None, None, None),
        }
        # Balanced halves have equal counts of answers, which therefore predict nothing.
        if name != "answer words":
            columns["balanced"] = influence.lds(tau, even, balanced.mean(0))[:3]
        for column, (value, low, high) in columns.items():
            row |= {column: value, f"{column}_low": low, f"{column}_high": high}
        table.append(row)
    if options.seeds > 1:
        table.append(dict.fromkeys(table[0]) | {"attribution": "noise", "score": noise(outputs)})
        table[-1]["partial"] = float(partial(outputs[0], outputs[1:].mean(0), counts).mean())
        table[-1]["balanced"] = noise(balanced)
    return table


def noise(outputs: np.ndarray) -> float:
    """Return Spearman's correlation of one seed with the mean of the others, mean over targets."""
    first, others = outputs[0], outputs[1:].mean(0)
    return float(np.mean([spearmanr(a, b)[0] for a, b in zip(first.T, others.T, strict=True)]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 subsets of 32 rows")
    parser.add_argument("--subsets", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.quick:
        options.subsets, options.seeds = 5, 2
    table = measure(options)
    common.print_table(table)
    common.print_report("lds", table)


if __name__ == "__main__":
    main()

"""Which attributions foresee what training on a part of the data makes of a target?

usage: python -m benchmarks.lds [--quick] [--subsets 48] [--seeds 3]

The shipped model with adapters of rank 8; 192 rows, half of them sentiment (mr) and half
subjectivity (subj); targets are 32 more rows of mr. Models are trained on random halves of the
rows, each with several seeds of adapters and order; what is foreseen is the negative loss of every
target, averaged over the seeds. Attributions come from models trained on all rows, with as many
other seeds:

  LESS             cosine of Adam's step on a training row with the gradient of a target, over the
                   ends of all epochs, weighted by learning rates
  cosine           cosine of both gradients, after the last epoch
  TracIn           their inner product, over the ends of all epochs, weighted by learning rates
  TRAK             influence functions of the margin log(p / (1 - p)), after the last epoch
  representation   cosine of mean hidden states before training
  BM25             words in common
  random           numbers that know nothing

  score            linear datamodelling score: Spearman's correlation over the subsets, mean over
                   targets
  low, high        its 95 % interval, over other subsets and other targets
  noise            the same score of one seed of the trained models against the others: as much as a
                   perfect attribution could reach of one seed

--quick has 5 subsets of 32 rows. The last line is one JSON object.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import spearmanr

import jaxlm
from benchmarks import common
from jaxlm import influence, peft
from jaxlm.core import paths
from jaxlm.data import task_config
from jaxlm.studies.selection_batches import Padded, row_losses
from jaxlm.studies.selection_rows import Row, Source, Target, read_source, read_target

EPOCHS, BATCH = 4, 16
LENGTH = 48
RATE = 1e-3
DIM = 128
"""Numbers in a row of features, fewer than the training rows that TRAK has."""


class Problem:
    """Rows, targets, and training on any part of the rows."""

    def __init__(self, rows: int, targets: int):
        self.lm = jaxlm.from_pretrained()
        words: dict[str, Any] = {"template": "tulu", "max_length": LENGTH, "seed": 0}
        self.rows: list[Row] = []
        for name in ("mr", "subj"):
            source = Source(task=task_config({"name": name}), rows=rows // 2)
            self.rows += read_source(name, source, self.lm, **words).rows
        target = Target(task=task_config({"name": "mr"}), rows=targets)
        self.targets = list(read_target(target, self.lm, **words).rows)
        self.train, self.target = (self._whole(side) for side in (self.rows, self.targets))
        self.losses = row_losses(self.adapted(0))

    def adapted(self, seed: int) -> Any:
        """The model with new adapters."""
        return peft.lora(self.lm, jax.random.key(seed), rank=8, targets=r"attention\.")

    def _whole(self, rows: list[Row]) -> Any:
        padded = Padded(rows, pad_id=self.lm.config.pad_id or 0)
        return jax.tree.map(jnp.asarray, padded.batch(range(len(rows))))

    def trained(self, mask: np.ndarray, seed: int) -> tuple[list[Any], list[Any], list[float]]:
        """Parameters, Adam's states and mean learning rates at the end of every epoch."""
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
        """The negative loss of every target [M]."""
        return -self.losses(params, self.target)


def schedule(steps: int) -> optax.Schedule:
    """A learning rate that falls to zero."""
    return optax.linear_schedule(RATE, 0.0, steps)


def retrained(problem: Problem, masks: np.ndarray, seeds: int) -> np.ndarray:
    """What the targets say of models trained on each subset, [seeds, K, M]."""
    found = np.zeros((seeds, len(masks), len(problem.targets)))
    for seed in range(seeds):
        for k, mask in enumerate(masks):
            found[seed, k] = problem.outputs(problem.trained(mask, seed)[0][-1])
        print(f"seed {seed}: {len(masks)} models trained", flush=True)
    return found


def attributions(problem: Problem, seeds: int) -> dict[str, np.ndarray]:
    """[N, M] of every method."""
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
        last = models[-1]
        sides["margin"].append(features(margins, last, problem.train))
        sides["margin of target"].append(features(margins, last, problem.target))
        sides["residual"].append(1 - np.exp(-np.asarray(problem.losses(last, problem.train))))
    s = {name: np.stack(parts) for name, parts in sides.items()}
    each = np.arange(len(problem.targets))
    ends = slice(EPOCHS - 1, None, EPOCHS)
    tokens = [[row.ids for row in side] for side in (problem.rows, problem.targets)]
    states = [hidden(problem.lm, batch) for batch in (problem.train, problem.target)]
    rng = np.random.default_rng(0)
    return {
        "LESS": influence.score(s["adam"], s["target"], rates, each),
        "cosine": influence.score(s["train"][ends], s["target"][ends], [1.0] * seeds, each),
        "TracIn": influence.tracin(s["train"], s["target"], rates, each),
        "TRAK": influence.trak(
            s["margin"], s["margin of target"], s["residual"], each, ridge=ridge(s["margin"])
        ),
        "representation": influence.representation_similarity(*states, each),
        "BM25": influence.bm25(*tokens, each),
        "random": rng.random((len(problem.rows), len(problem.targets))),
    }


def ridge(rows: np.ndarray) -> float:
    """A thousandth of the mean eigenvalue of the second moment."""
    return float(1e-3 * np.square(rows).sum() / len(rows) / rows.shape[-1])


def hidden(lm: Any, batch: Any) -> np.ndarray:
    """Mean hidden states, later tokens counting more."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return np.asarray(influence.pool(jax.jit(lm.hidden)(lm.params, ids, mask), mask))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    problem = Problem(32 if options.quick else 192, 4 if options.quick else 32)
    masks = influence.subset_masks(len(problem.rows), options.subsets)
    found = retrained(problem, masks, options.seeds)
    values = attributions(problem, options.seeds)
    table = []
    for name, tau in values.items():
        value, low, high, _ = influence.lds(tau, masks, found.mean(0))
        table.append({"attribution": name, "score": value, "low": low, "high": high})
    if options.seeds > 1:
        table.append({"attribution": "noise", **dict.fromkeys(("score", "low", "high"))})
        others = found[1:].mean(0)
        table[-1]["score"] = float(
            np.mean([spearmanr(found[0][:, m], others[:, m])[0] for m in range(others.shape[1])])
        )
    return table


def main() -> None:
    """Measures and prints."""
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

"""How good a gradient do forward passes give, layer by layer, and how fast can one descend on it?

usage: python -m benchmarks.estimator_quality [--quick] [--model PATH] [--run FOLDER ...]
                                              [--task subj] [--directions 1024] [--probes 64]
                                              [--rows 32] [--plot FILE]

Everything is measured on one training batch of a task: at a pretrained model (the shipped one, or
--model), and after short runs of Adam and MeZO from there or at the runs of `jaxlm finetune` that
--run names. For every layer there is the cosine between the mean of n estimates and the gradient,
for n from 1 to --directions, and the cosine expected by theory,

    sqrt(n / (n + 1 + d r)),    r = ||gradient||^2 / ||gradient of the layer||^2,

with d the number of the layer's parameters; for the whole model it is sqrt(n / (n + d + 1)). One
estimate scatters about it by 1/sqrt(d). Slopes along a random direction within the layer, by
central differences, are compared with `jax.jvp`. For the whole model there is the effective rank of
the Hessian, and MeZO's learning rate by theory (`benchmarks.curvature`). The last line is one JSON
object.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common, curvature
from jaxlm import data, zo
from jaxlm.core import paths
from jaxlm.models import LanguageModel
from jaxlm.train.load import load_model
from jaxlm.train.losses import classification_objective

Tree = Any


class Problem:
    """A model, a task, and the objective on batches of `rows` examples."""

    def __init__(self, lm: LanguageModel, task: str, rows: int = 32):
        config = dataclasses.replace(data.shipped_task(task), max_length=64)
        self.lm, self.rows = lm, rows
        self.encoded = data.prepare_for(lm, data.load_task(config, seed=0))
        self.objective = classification_objective(
            lm.apply, self.encoded.token_ids, log_probs=lm.continuation_log_probs
        )

    def batch(self, step: int) -> Any:
        """Return the training batch of a step; step 0 is the batch for measurements."""
        return self.encoded.batch(step, batch_size=self.rows, seed=0)

    def loss(self, params: Tree, view: Any = None) -> jax.Array:
        """Return the loss on the batch of step 0."""
        return self.objective(params, self.batch(0), view=view)[0]


def after_adam(problem: Problem, steps: int) -> Tree:
    """Return the parameters after some steps of Adam."""
    tx = optax.adam(3e-4)
    step = jax.jit(common.gradient_step(tx, problem.objective))
    params, state = problem.lm.params, tx.init(problem.lm.params)
    for i in range(steps):
        params, state, _ = step(params, state, problem.batch(1 + i))
    return params


def after_mezo(problem: Problem, steps: int) -> Tree:
    """Return the parameters after some steps of MeZO."""
    opt = zo.mezo(1e-4, sampler=zo.rademacher(), select="layers|final_norm")
    step = zo.jit_step(opt, problem.objective)
    params = jax.tree.map(jnp.copy, problem.lm.params)
    state = opt.init(params, jax.random.key(0))
    for i in range(steps):
        params, state, _ = step(params, state, problem.batch(1 + i))
    return params


def checkpoints(options: argparse.Namespace) -> Iterator[tuple[str, Problem, Tree]]:
    """Yield name, problem and parameters of each checkpoint."""
    problem = Problem(load_model(options.model), options.task, options.rows)
    yield "pretrained", problem, problem.lm.params
    if options.run:
        for folder in options.run:
            trained = load_model(folder)
            yield folder, Problem(trained, options.task, options.rows), trained.params
        return
    adam, mezo = (5, 10) if options.quick else (50, 500)
    yield f"Adam, {adam} steps", problem, after_adam(problem, adam)
    yield f"MeZO, {mezo} steps", problem, after_mezo(problem, mezo)


def layers(params: Tree) -> tuple[list[str], Tree]:
    """Return names of a model's parts, and for each leaf the part of each of its first indices."""
    names: list[str] = []

    def parts(leaf):
        if leaf.stacked:
            mine = [f"layer {i}" for i in range(leaf.value.shape[0])]
        else:
            mine = [leaf.path.split(".")[0]]
        names.extend(name for name in mine if name not in names)
        return np.array([names.index(name) for name in mine])

    return names, paths.map_with_path(parts, params)


def inner(parts: Tree, count: int, a: Tree, b: Tree) -> jax.Array:
    """Return inner products of two trees within each part, followed by the total."""
    sums = jnp.zeros(count)
    for part, x, y in zip(*map(jax.tree.leaves, (parts, a, b)), strict=True):
        sums = sums.at[part].add((x * y).reshape(len(part), -1).sum(1))
    return jnp.append(sums, sums.sum())


def only(parts: Tree, count: int, tree: Tree, part: jax.Array) -> Tree:
    """Return the tree with zeros outside one part; unchanged if `part` equals `count`."""

    def kept(own, x):
        own = own.reshape(len(own), *(1,) * (x.ndim - 1))
        return jnp.where((own == part) | (part == count), x, 0)

    return jax.tree.map(kept, parts, tree)


@functools.partial(jax.jit, static_argnames="loss")
def gradient_of(loss, params: Tree) -> Tree:
    """Return the gradient; compiled once for all checkpoints."""
    return jax.grad(loss)(params)


@functools.partial(jax.jit, static_argnames=("loss", "sampler"))
def add_estimates(loss, sampler, params: Tree, total: Tree, key, first, last) -> Tree:
    """Add the estimates `first` to `last` - 1 to a sum of estimates."""

    def one_more(j, total):
        est = zo.spsa(loss, params, key=jax.random.fold_in(key, j), sampler=sampler)
        return jax.tree.map(jnp.add, total, zo.materialize(est, params))

    return jax.lax.fori_loop(first, last, one_more, total)


def cosines(loss, params: Tree, gradient: Tree, parts: Tree, count: int, most: int, sampler):
    """Return {n: cosine of the mean of n estimates and the gradient, by part}, n a power of two."""
    key = jax.random.key(1)
    total, n, found = jax.tree.map(jnp.zeros_like, gradient), 0, {}
    length = jnp.sqrt(inner(parts, count, gradient, gradient))
    while n < most:
        more = max(1, 2 * n)
        total, n = add_estimates(loss, sampler, params, total, key, n, more), more
        lengths = length * jnp.sqrt(inner(parts, count, total, total))
        found[n] = np.asarray(inner(parts, count, total, gradient) / lengths)
    return found


@functools.partial(jax.jit, static_argnames=("loss", "count", "eps", "sampler"))
def slope(loss, params: Tree, parts: Tree, count: int, eps: float, sampler, key, part):
    """Return central difference and exact slope along z within one part."""
    whole = zo.SPSAEstimate(*[jnp.ones(1)] * 4, key, None, sampler, eps)
    z = only(parts, count, zo.materialize(whole, params), part)
    moved = lambda scale: loss(jax.tree.map(lambda w, z: w + scale * z, params, z))  # noqa: E731
    return (moved(eps) - moved(-eps)) / (2 * eps), jax.jvp(loss, (params,), (z,))[1]


def slopes(loss, params: Tree, parts: Tree, count: int, directions: int, eps: float, sampler):
    """Return central differences and exact slopes along z, [parts + 1, directions] each."""
    keys = jax.random.split(jax.random.key(2), directions)
    found = [
        [slope(loss, params, parts, count, eps, sampler, key, part) for key in keys]
        for part in range(count + 1)
    ]
    return np.moveaxis(np.array(found), -1, 0)


def by_layer(
    checkpoint: str, problem: Problem, params: Tree, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each part of the model, and one for the whole model."""
    sampler = {"gaussian": zo.gaussian(), "rademacher": zo.rademacher()}[options.sampler]
    loss = problem.loss
    names, parts = layers(params)
    count = len(names)
    most, slopes_of_each = options.directions, 2 if options.quick else 10
    gradient = gradient_of(loss, params)
    found = cosines(loss, params, gradient, parts, count, most, sampler)
    measured, exact = slopes(loss, params, parts, count, slopes_of_each, options.eps, sampler)
    squares = np.asarray(inner(parts, count, gradient, gradient))
    ones = jax.tree.map(jnp.ones_like, gradient)
    sizes = np.asarray(inner(parts, count, ones, ones))
    rows = []
    for i, part in enumerate([*names, "all"]):
        effective = sizes[i] * squares[-1] / squares[i]
        expected = {n: np.sqrt(n / (n + 1 + effective)) for n in found}
        error = np.sqrt(np.mean((measured[i] - exact[i]) ** 2) / np.mean(exact[i] ** 2))
        rows.append(
            {
                "checkpoint": checkpoint,
                "layer": part,
                "parameters": int(sizes[i]),
                "gradient_norm": float(np.sqrt(squares[i])),
                "cosine": {str(n): float(cosine[i]) for n, cosine in found.items()},
                "expected": {str(n): float(x) for n, x in expected.items()},
                "cosine_over_expected": float(found[most][i] / expected[most]),
                "projected": measured[i].tolist(),
                "jvp": exact[i].tolist(),
                "slope_error": float(error),
            }
        )
    return rows


def of_the_whole(
    checkpoint: str, problem: Problem, params: Tree, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the row of curvature."""
    probes, steps = options.probes, 4 if options.quick else 30
    key = jax.random.key(3)
    found = curvature.measure(problem.loss, params, key, probes=probes, steps=steps)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    gamma = {n: curvature.slow_down(found.rank, size, n) for n in (1, 16)}
    return {
        "checkpoint": checkpoint,
        **found._asdict(),
        **{f"slow_down, n={n}": value for n, value in gamma.items()},
        **{f"eta, n={n}": found.sgd_learning_rate / value for n, value in gamma.items()},
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print cosines at the first, a middle and the last n, and the error of the slopes."""
    shown = list(rows[0]["cosine"])
    shown = [shown[0], shown[len(shown) // 2], shown[-1]]
    common.print_table(
        [
            {
                "checkpoint": row["checkpoint"],
                "layer": row["layer"],
                "parameters": row["parameters"],
                "gradient norm": row["gradient_norm"],
                **{f"cos, n={n}": row["cosine"][n] for n in shown},
                f"expected, n={shown[-1]}": row["expected"][shown[-1]],
                "projected": row["projected"][0],
                "jvp": row["jvp"][0],
                "relative error": row["slope_error"],
            }
            for row in rows
        ]
    )


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot cosines over n, and projected gradients over exact slopes, for each checkpoint."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["checkpoint"] for row in rows))
    figure = Figure(figsize=(10, 4.2 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, squeeze=False)
    for name, (left, right) in zip(names, axes, strict=True):
        mine = [row for row in rows if row["checkpoint"] == name]
        for i, row in enumerate(mine):
            n = [int(n) for n in row["cosine"]]
            left.plot(n, list(row["cosine"].values()), f"C{i}o-", ms=3, lw=1, label=row["layer"])
            left.plot(n, list(row["expected"].values()), f"C{i}--", lw=0.8)
            right.plot(row["jvp"], row["projected"], f"C{i}o", ms=4, label=row["layer"])
        left.set(title=name, xscale="log", xlabel="directions averaged")
        left.set(ylabel="cosine to the gradient (dashed: expected)")
        left.set_yscale("symlog", linthresh=1e-3)
        found = [value for row in mine for value in row["jvp"]]
        right.plot([min(found), max(found)], [min(found), max(found)], "k-", lw=0.6)
        right.set(xlabel="exact slope along z (jvp)", ylabel="projected gradient")
        right.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 directions on 8 examples")
    parser.add_argument("--model", help="folder, hub id or run; the shipped model if not given")
    parser.add_argument("--run", nargs="+", metavar="FOLDER", help="runs to measure after it")
    parser.add_argument("--task", default="subj", choices=data.shipped_names())
    parser.add_argument("--sampler", default="gaussian", choices=["gaussian", "rademacher"])
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--directions", type=int, default=1024, help="most directions in a mean")
    parser.add_argument("--probes", type=int, default=64, help="probes of the Hessian's trace")
    parser.add_argument("--rows", type=int, default=32, help="examples of the batch")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.directions, options.probes, options.rows = 8, 4, 8
    rows, curvatures = [], []
    for name, problem, params in checkpoints(options):
        print(f"measuring: {name}", flush=True)
        rows += by_layer(name, problem, params, options)
        curvatures.append(of_the_whole(name, problem, params, options))
    print_rows(rows)
    common.print_table(curvatures)
    if options.plot:
        plot(rows, options.plot)
    common.print_report("estimator_quality", [*rows, *curvatures])


if __name__ == "__main__":
    main()

"""How long do 100,000 paths of Adam on a noisy quadratic take, and what do local steps cost?

usage: python -m benchmarks.dynamics [--quick] [--paths 100000] [--steps 400] [--repeats 7]

The chain is Adam in one dimension, at learning rate 0.05 on gradients x + 20 z with normal z, for
which Adam's stochastic differential equation holds. It is a Monte Carlo run: every path has its own
noise. `jaxlm.dynamics.run_optimizer` runs the chain with `optax.adam`, and
`jaxlm.dynamics.simulate` solves the equation. The peers run the same chain vectorised over paths,
in float32 and in place: PyTorch and NumPy. Another row is straightforward NumPy, in float64 with an
array for each product. All are interleaved, except PyTorch, which runs last. The columns:

  seconds      of a run, median over the repeats; runs shorter than half a second are repeated until
               half a second has passed
  Msteps_per_s paths times steps in a second, in millions
  over_jaxlm   seconds divided by those of the first row
  mean, sd     of x after the last step
  deviation    of mean and variance from the first row, the larger one, in standard errors
  compile_s    seconds of compilation
  peak_MB      memory by the compiler

The second table has 64 steps of momentum SGD on a network of 256 by 256, for eight workers on this
device with a batch of 16 each: alone, without `jaxlm`, and averaged after every step or every 16th.
The next rows are one model on the joint batch of 128, and SVAG on its halves with l = 1 and l = 4
in as many updates. `over_alone` is time divided by that of the first row, `over_joint` by
that of the joint batch, SVAG's peer. `difference` is the largest difference of a parameter from
the run on the joint batch, which H = 1 reproduces.

The last line is one JSON object.
"""

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from jaxlm import dynamics

CONSTANTS = dynamics.sde.AdaptiveConstants(eta=0.05, sigma0=1.0, eps0=0.1, c2=2.0, c1=20.0)
RATE, SIGMA, EPS, B1, B2 = 0.05, CONSTANTS.sigma, CONSTANTS.eps, CONSTANTS.b1, CONSTANTS.b2


def chain(paths: int, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Return the chain: Adam of optax through `run_optimizer`."""

    def run(key):
        return dynamics.run_optimizer(
            key,
            optax.adam(RATE, B1, B2, EPS),
            lambda x: x,
            lambda x: 1.0,
            1.0,
            steps,
            sigma=SIGMA,
            n_paths=paths,
        )

    return run


def equation(paths: int, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Return Adam's equation, solved by one Euler step per step of the chain."""
    sde = dynamics.sde.adam_sde(lambda x: x, lambda x: 1.0, lambda x: 1.0, CONSTANTS)
    width = sde.time_per_step

    def run(key):
        start = sde.init(jnp.ones(()))
        end = sde.t0 + steps * width
        return dynamics.simulate(key, sde, start, end, width, n_paths=paths).params

    return run


def numpy_chain(numbers: np.random.Generator, paths: int, steps: int) -> np.ndarray:
    """Run the chain in straightforward NumPy, in float64."""
    x, m, v = np.ones(paths), np.zeros(paths), np.zeros(paths)
    for k in range(1, steps + 1):
        g = x + SIGMA * numbers.standard_normal(paths)
        m = B1 * m + (1 - B1) * g
        v = B2 * v + (1 - B2) * g**2
        x = x - RATE * (m / (1 - B1**k)) / (np.sqrt(v / (1 - B2**k)) + EPS)
    return x


def numpy_in_place(numbers: np.random.Generator, paths: int, steps: int) -> np.ndarray:
    """Run the chain in float32, with two arrays of scratch beside the state."""
    x, m, v = (np.full(paths, value, np.float32) for value in (1, 0, 0))
    g, other = np.empty_like(x), np.empty_like(x)
    for k in range(1, steps + 1):
        numbers.standard_normal(out=g, dtype=np.float32)
        g *= np.float32(SIGMA)
        g += x
        m *= np.float32(B1)
        np.multiply(g, np.float32(1 - B1), out=other)
        m += other
        g *= g
        g *= np.float32(1 - B2)
        v *= np.float32(B2)
        v += g
        np.sqrt(v, out=g)
        g *= np.float32((1 - B2**k) ** -0.5)
        g += np.float32(EPS)
        np.divide(m, g, out=g)
        g *= np.float32(RATE / (1 - B1**k))
        x -= g
    return x


def torch_chain(paths: int, steps: int) -> Callable[[], Any] | None:
    """Return the chain in PyTorch, in place; None if PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        print("no PyTorch row, since torch is not installed (extra: parity)")
        return None
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def run():
        x, m, v, g = torch.ones(paths), torch.zeros(paths), torch.zeros(paths), torch.empty(paths)
        for k in range(1, steps + 1):
            torch.randn(paths, generator=generator, out=g)
            g.mul_(SIGMA).add_(x)
            m.mul_(B1).add_(g, alpha=1 - B1)
            v.mul_(B2).addcmul_(g, g, value=1 - B2)
            scale = v.sqrt().mul_((1 - B2**k) ** -0.5).add_(EPS)
            x.addcdiv_(m, scale, value=-RATE / (1 - B1**k))
        return x.numpy()

    return run


def in_a_row(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return median seconds of a call, repeated for at least half a second."""
    for call in calls.values():
        common.seconds(call)
    counts = {name: math.ceil(0.5 / common.seconds(call)) for name, call in calls.items()}

    def many(name):
        return lambda: [jax.block_until_ready(calls[name]()) for _ in range(counts[name])]

    times = common.interleaved({name: many(name) for name in calls}, repeats)
    return {name: times[name] / counts[name] for name in calls}


def measure(paths: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Measure one row for each implementation."""
    key, numbers = jax.random.key(0), np.random.default_rng(0)
    programs, calls = {}, {}
    for name, function in {"jaxlm": chain, "jaxlm, equation": equation}.items():
        program, compile_s = common.compiled(jax.jit(function(paths, steps)), key)
        programs[name] = (compile_s, common.peak_bytes(program) / 1e6)
        calls[name] = functools.partial(program, key)
    calls["numpy, in place"] = functools.partial(numpy_in_place, numbers, paths, steps)
    calls["numpy, float64"] = functools.partial(numpy_chain, numbers, paths, steps)
    times = in_a_row(calls, repeats)
    # PyTorch runs last, since the threads of its pool would take cores from the others.
    peer = torch_chain(paths, steps)
    if peer is not None:
        calls["torch, in place"] = peer
        times |= in_a_row({"torch, in place": peer}, repeats)
    rows, first = [], None
    for name, call in calls.items():
        x = np.asarray(call(), np.float64).reshape(-1)
        first = x if first is None else first
        mean, variance, n = x.mean(), x.var(), len(x)
        gaps = (
            (mean - first.mean()) / np.sqrt(2 * variance / n),
            (variance / first.var() - 1) / np.sqrt(4 / n),
        )
        compile_s, peak = programs.get(name, (None, None))
        rows.append(
            {
                "implementation": name,
                "paths": paths,
                "steps": steps,
                "seconds": times[name],
                "Msteps_per_s": paths * steps / times[name] / 1e6,
                "over_jaxlm": times[name] / times["jaxlm"],
                "mean": mean,
                "sd": variance**0.5,
                "deviation": float(np.abs(gaps).max()),
                "compile_s": compile_s,
                "peak_MB": peak,
            }
        )
    return rows


def loss(params: Any, batch: Any) -> jax.Array:
    """Return the loss of a network with one hidden layer."""
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["first"]) @ params["second"] - y) ** 2)


def plain_steps(params: Any, batches: Any, value_and_grad: Callable[..., Any] | None = None) -> Any:
    """Run steps of one model by optax."""
    value_and_grad = value_and_grad or jax.value_and_grad(loss)
    sgd = optax.sgd(0.05, 0.9)

    def step(carry, batch):
        params, state = carry
        value, grads = value_and_grad(params, batch)
        updates, state = sgd.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, sgd.init(params)), batches)[0][0]


def steps_alone(params: Any, batches: Any) -> Any:
    """Run steps of workers that never average; return their average after the last step."""
    ends = jax.vmap(plain_steps, (None, 0))(params, batches)
    return jax.tree.map(lambda leaf: leaf.mean(0), ends)


def joined(batches: Any) -> Any:
    """Join the batches of all workers, [S, K B, ...]."""

    def join(leaf):
        return jnp.swapaxes(leaf, 0, 1).reshape(leaf.shape[1], -1, leaf.shape[-1])

    return jax.tree.map(join, batches)


def joint_steps(params: Any, batches: Any) -> Any:
    """Run steps on the joint batches."""
    return plain_steps(params, joined(batches))


def svag_steps(l: int, params: Any, batches: Any) -> Any:
    """Run updates of SVAG, whose pairs are the halves of the joint batches."""
    fn = dynamics.svag(l, "sgdm").value_and_grad(loss)
    return plain_steps(
        params, joined(batches), lambda params, batch: fn(params, *dynamics.split_halves(batch))
    )


def local_steps(h: int, params: Any, batches: Any) -> Any:
    """Run steps of as many workers; return their average."""
    workers, steps = jax.tree.leaves(batches)[0].shape[:2]
    optimizer = dynamics.local_update(
        optax.sgd(0.05, 0.9), dynamics.local.constant_h(h), lambda step: 0.05, total_steps=steps
    )
    start = dynamics.local.start_workers(optimizer, params, workers)
    end, _ = dynamics.local.run_workers(optimizer, jax.value_and_grad(loss), start, batches)
    return jax.tree.map(lambda leaf: leaf.mean(0), end.params)


def measure_local(width: int, repeats: int) -> list[dict[str, Any]]:
    """Measure one row for each way to step."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        name: jax.random.normal(key, (width, width)) / width**0.5
        for name, key in zip(("first", "second"), keys, strict=False)
    }
    batches = tuple(jax.random.normal(key, (8, 64, 16, width)) for key in keys[2:])
    functions = {"alone": steps_alone}
    functions |= {f"H = {h}": functools.partial(local_steps, h) for h in (1, 16)}
    functions["joint batch"] = joint_steps
    functions |= {f"SVAG, l = {l}": functools.partial(svag_steps, l) for l in (1, 4)}
    programs = {
        name: common.compiled(jax.jit(function), params, batches)
        for name, function in functions.items()
    }
    calls = {
        name: functools.partial(program, params, batches) for name, (program, _) in programs.items()
    }
    times = common.interleaved(calls, repeats)
    expected = calls["joint batch"]()

    def difference(name):
        gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), calls[name](), expected)
        return float(max(jax.tree.leaves(gaps)))

    return [
        {
            "steps": name,
            "seconds": times[name],
            "over_alone": times[name] / times["alone"],
            "over_joint": times[name] / times["joint batch"],
            "difference": difference(name),
            "compile_s": compile_s,
            "peak_MB": common.peak_bytes(program) / 1e6,
        }
        for name, (program, compile_s) in programs.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2,000 paths of 40 steps, 3 repeats")
    parser.add_argument("--paths", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    size = (2_000, 40, 3) if options.quick else (options.paths, options.steps, options.repeats)
    rows = measure(*size)
    common.print_table(rows)
    local = measure_local(32 if options.quick else 256, size[2])
    common.print_table(local)
    common.print_report("dynamics", rows + local)


if __name__ == "__main__":
    main()

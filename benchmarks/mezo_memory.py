"""Does a zeroth-order step fit into the memory of inference?

usage: python -m benchmarks.mezo_memory [--quick]

The first table is by the compiler, and nothing runs: peak memory of a step over that of a forward
pass on the same 16 rows of 64 tokens, at the shapes of OPT-125M and OPT-1.3B, for one and four
directions, and for Adam by backpropagation. The second is measured at OPT-125M: the peak resident
memory of a fresh process in three steps, minus that after compiling and before the parameters are
made. --quick compiles the first shape only, without the method that takes longest to compile. The
last line is one JSON object.
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import common
from benchmarks.shapes import LABEL_WORDS, OPT_1_3B, OPT_125M, make_batch
from jaxlm import zo
from jaxlm.models import LanguageModel, ModelConfig, init_params
from jaxlm.train.losses import classification_objective

Tree = Any
METHODS: dict[str, zo.ZerothOrderOptimizer | optax.GradientTransformation | None] = {
    "forward": None,
    "MeZO, gaussian": zo.mezo(1e-6),
    "MeZO, gaussian, n=4": zo.mezo(1e-6, num_directions=4),
    "LOZO, rank 2": zo.lozo(1e-6, rank=2),
    "LOZO, rank 2, n=4": zo.lozo(1e-6, rank=2, num_directions=4),
    "Adam, backpropagation": optax.adam(1e-6),
}


QUICK = [name for name in METHODS if name != "LOZO, rank 2, n=4"]


def program(name: str, config: ModelConfig) -> tuple[Callable[..., Any], Tree, Tree, Tree]:
    """Return the function of a method, `f(params, state, batch) -> (params, state, ...)`.

    Returns:
      The function, which donates parameters and state; the shapes of parameters and state; and the
      batch. A forward pass has no state and donates nothing.
    """
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    loss_fn = classification_objective(
        LanguageModel(config, params).apply, jnp.asarray(LABEL_WORDS)
    )
    batch, method = make_batch(config, rows=16, length=64), METHODS[name]
    if method is None:
        return jax.jit(lambda params, state, batch: loss_fn(params, batch)), params, (), batch
    if isinstance(method, zo.ZerothOrderOptimizer):
        state = jax.eval_shape(method.init, params, jax.random.key(0))
        return zo.jit_step(method, loss_fn), params, state, batch
    state = jax.eval_shape(method.init, params)
    step = jax.jit(common.gradient_step(method, loss_fn), donate_argnums=(0, 1))
    return step, params, state, batch


def compiled_rows(
    shape: str, config: ModelConfig, methods: Iterable[str] = METHODS
) -> list[dict[str, Any]]:
    """Return a row for each method, by compilation alone."""
    rows: list[dict[str, Any]] = []
    for name in methods:
        function, *args = program(name, config)
        compiled, seconds = common.compiled(function, *args)
        peak = common.peak_bytes(compiled)
        print(f"{shape}: {name} compiled in {seconds:.0f} s", flush=True)
        rows.append(
            {
                "shape": shape,
                "method": name,
                "parameters_MB": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[0]))
                / 1e6,
                "peak_MB": peak / 1e6,
                "over_forward": peak / 1e6 / (rows[0]["peak_MB"] if rows else peak / 1e6),
                "compile_s": seconds,
            }
        )
    return rows


def resident(name: str, config: ModelConfig = OPT_125M) -> dict[str, float]:
    """Run a method three times in this process; return megabytes before and after.

    The parameters are constants: random ones would take extra memory while they are made.
    """
    function, params, state, batch = program(name, config)
    run, _ = common.compiled(function, params, state, batch)
    before = common.fresh_peak()
    seed = jax.random.key(0)
    params, state = jax.tree.map(
        lambda x: (
            seed
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else jnp.full(x.shape, 0.01, x.dtype)
        ),
        (params, state),
    )
    for _ in range(3):
        out = jax.block_until_ready(run(params, state, batch))
        if METHODS[name] is not None:
            params, state = out[:2]
    return {"before_MB": before / 1e6, "after_MB": common.resident_bytes() / 1e6}


def resident_rows() -> list[dict[str, Any]]:
    """Return a row for each method, each measured in a process of its own."""
    rows: list[dict[str, Any]] = []
    for name in METHODS:
        found = common.in_fresh_process(f"mezo_memory.resident({name!r})")
        taken = found["after_MB"] - found["before_MB"]
        first = rows[0]["taken_MB"] if rows else taken
        row = {"shape": "OPT-125M, resident", "method": name, **found, "taken_MB": taken}
        rows.append(row | {"over_forward": taken / first})
    return rows


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="compile OPT-125M, run nothing")
    options = parser.parse_args()
    shapes = {"OPT-125M": OPT_125M} | ({} if options.quick else {"OPT-1.3B": OPT_1_3B})
    methods = QUICK if options.quick else METHODS
    rows = [row for each in shapes.items() for row in compiled_rows(*each, methods)]
    common.print_table(rows)
    if not options.quick:
        measured = resident_rows()
        common.print_table(measured)
        rows += measured
    common.print_report("mezo_memory", rows)


if __name__ == "__main__":
    main()

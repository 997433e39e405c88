"""Sample paths of an equation, and of an optimizer on noisy gradients, by the thousand.

Path i is a function of `(key, i)`, so that more paths extend the same first paths. White noise
comes from the counter generator of `jaxlm.core.prng`, with 24 bits per number.
Differentiate paths in forward mode (`jax.jvp`); reverse mode does not work.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import ArrayLike, Float

from jaxlm.core import paths, prng
from jaxlm.core.checks import integer, one_of, real
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.dynamics.sde import SDE, as_operator, shapes_of
from jaxlm.typing import Params, PRNGKey

__all__ = ["WeakError", "ou_moments", "run_optimizer", "simulate", "weak_error"]

SOLVERS = {
    "ito_milstein": "ItoMilstein",
    "heun": "Heun",
    "euler_heun": "EulerHeun",
    "sea": "SEA",
    "shark": "ShARK",
    "sra1": "SRA1",
}
"""Solvers of diffrax; all but the first solve the Stratonovich equation."""


class Interval(NamedTuple):
    """`count` equal steps between two saved times, or a stack of such; `first` counts from 0."""

    start: Any
    end: Any
    width: Any
    count: Any
    first: Any


def simulate(
    key: PRNGKey,
    sde: SDE,
    x0: Any,
    t1: float | int,
    dt0: float | int,
    *,
    n_paths: int,
    solver: str = "euler",
    save_at: Sequence[float | int] | np.ndarray | None = None,
) -> Any:
    r"""Simulate paths of an equation from `sde.t0` to t1.

    `solver="euler"` is Euler-Maruyama, of weak order 1, and needs no other package:

    $$X_{k+1} = X_k + b(t_k, X_k)\,\Delta t + \sqrt{\Delta t}\,s(t_k, X_k)\,\xi_k$$

    The other solvers are those of diffrax. They form the matrix s, so the state may have at most a
    few hundred elements. Use `ito_milstein` for noise that commutes, such as diagonal noise;
    and `shark`, `sra1`, `sea`, `heun` or `euler_heun` for noise that is the same at every state.

    The time between two saved points is divided into equal steps of at most `dt0`. To compile, use
    `jax.jit(functools.partial(simulate, ...))` with t1, dt0 and save_at as Python numbers.

    Args:
        key: a typed key.
        sde: the equation, in the sense of Itô.
        x0: the state at `sde.t0`, a tree of floats; `sde.init(params)` makes one.
        t1: the end time.
        dt0: the largest step.
        n_paths: the number of paths.
        solver: see above.
        save_at: times to save, ascending, from `sde.t0` to t1; None saves t1 alone.

    Returns:
        A tree like x0 of arrays [n_paths, n_save, *shape of the leaf]. Between the saved times the
        state is held in at least float32.

    Raises:
        UserError: if times are out of order, the solver is unknown or is a Stratonovich solver
            although noise depends on the state, or an extra is missing.

    >>> from jaxlm.dynamics.sde import sgd_sde
    >>> sde = sgd_sde(lambda x: x, lambda x: 0.5, 0.1)
    >>> simulate(jax.random.key(0), sde, 1.0, 2.0, 0.1, n_paths=5, save_at=[1.0, 2.0]).shape
    (5, 2)
    """
    integer("n_paths", n_paths)
    one_of("solver", solver, ("euler", *SOLVERS))
    intervals, start = _intervals(sde.t0, t1, dt0, save_at), _wide(x0)
    if solver == "euler":
        return _like(x0, _euler(key, sde, start, intervals, n_paths))
    if solver != "ito_milstein" and not is_additive(sde.diffusion, sde.t0, start):
        raise UserError(
            "solver: solves the Stratonovich equation, which differs from Itô's because the noise "
            f"depends on the state (got {solver!r}). Choose euler or ito_milstein."
        )
    return _like(x0, _diffrax(key, sde, start, intervals, n_paths, solver))


def run_optimizer(
    key: PRNGKey,
    optimizer: optax.GradientTransformation,
    grad: Callable[[Any], Any],
    sqrt_cov: Callable[[Any], Any],
    x0: Params,
    steps: int,
    *,
    sigma: float | int = 1.0,
    n_paths: int,
    save_at: Sequence[int] | np.ndarray | None = None,
) -> Any:
    r"""Run an optimizer on gradients $\nabla f(\theta) + \sigma \Sigma(\theta)^{1/2} \xi$.

    This is the chain that an equation of `dynamics.sde` approximates; compare both by `weak_error`.

    Args:
        key: a typed key.
        optimizer: an optax optimizer; its updates are added to the parameters.
        grad: θ -> ∇f.
        sqrt_cov: θ -> $\Sigma^{1/2}$: a diagonal like θ, a matrix, or a `NoiseOperator`.
        x0: the first parameters, a tree of floats.
        steps: the number of steps.
        sigma: σ.
        n_paths: the number of paths. All run at once, each with an optimizer state.
        save_at: numbers of steps after which parameters are saved, ascending; None saves the last.

    Returns:
        A tree like x0 of arrays [n_paths, n_save, *shape of the leaf]. Between the saved steps the
        parameters are held in at least float32.

    Raises:
        UserError: if `save_at` is out of order.
    """
    integer("n_paths", n_paths)
    intervals, start = _intervals(0, steps, 1, save_at), _wide(x0)

    def step(interval, z, carry):
        x, state = carry
        kick = as_operator(sqrt_cov(x), x).mv(z)
        noisy = jax.tree.map(lambda g, kick: g + sigma * kick, grad(x), kick)
        updates, state = optimizer.update(noisy, state, x)
        return optax.apply_updates(x, updates), state

    structure = as_operator(sqrt_cov(start), start).structure
    carry = start, optimizer.init(start)
    return _like(x0, _run(key, structure, step, carry, intervals, n_paths)[0])


def is_additive(diffusion: Callable[[Any, Any], Any], t: Any, x: Any) -> bool:
    """Return whether the noise is the same at every state.

    The answer comes from the trace and not from values, so `0 * x` counts as depending on x.

    >>> is_additive(lambda t, x: jnp.full_like(x, 0.3), 0.0, jnp.ones(2))
    True
    >>> is_additive(lambda t, x: 0.3 * x, 0.0, jnp.ones(2))
    False
    """
    depends: list[bool] = []

    # A custom JVP rule with symbolic zeros is told which tangents are zero by construction. That is
    # a statement about the traced computation, whereas a tangent that is 0 at one x proves nothing.
    @jax.custom_jvp
    def watch(y):
        return y

    @functools.partial(watch.defjvp, symbolic_zeros=True)
    def _watch_jvp(primals, tangents):
        zero = jax.custom_derivatives.SymbolicZero
        depends.extend(not isinstance(leaf, zero) for leaf in jax.tree.leaves(tangents))
        return primals[0], tangents[0]

    def noise(x):
        operator = as_operator(diffusion(t, x), x)
        return watch(operator.mv(optax.tree.zeros_like(operator.structure)))

    jax.eval_shape(lambda x: jax.jvp(noise, (x,), (x,)), x)
    return not any(depends)


def _as_float(leaf: Any) -> jax.Array:
    dtype = jnp.result_type(leaf)
    return jnp.asarray(leaf, dtype if jnp.issubdtype(dtype, jnp.floating) else float)


def _wide(tree: Any) -> Any:
    # A step is small compared to the state, and bfloat16 would round it away.
    return jax.tree.map(lambda leaf: wide(_as_float(leaf)), tree)


def _like(x0: Any, saved: Any) -> Any:
    return jax.tree.map(lambda x, path: path.astype(_as_float(x).dtype), x0, saved)


def _intervals(t0: float | int, t1: float | int, dt0: float | int, save_at: Any) -> Interval:
    """Divide time into steps; the arrays have one entry for each saved time."""
    real("dt0", dt0, above=0)
    times = np.array([t0, *([t1] if save_at is None else save_at)], np.float64)
    if not t0 < t1 < np.inf:
        raise UserError(f"t1: must be finite and after the start, {t0:g} (got {t1:g}). Correct it.")
    if len(times) < 2 or times[-1] > t1 or not (np.diff(times) >= 0).all():
        raise UserError(
            f"save_at: must ascend from {t0:g} to {t1:g} (got {times[1:].tolist()}). Correct it."
        )
    lengths = np.diff(times)
    # A length that is a whole number of steps up to rounding gets that number, not one more.
    count = np.ceil(lengths / dt0 * (1 - 1e-9))
    if count.sum() >= 2**31:  # steps are counted in int32
        raise UserError(
            f"dt0: {count.sum():.3g} steps are too many (got {dt0:g}). Give a larger step, or an "
            "earlier end."
        )
    count = count.astype(np.int32)
    first = np.cumsum(count) - count
    dtype = jnp.result_type(float)
    return Interval(
        times[:-1].astype(dtype),
        times[1:].astype(dtype),
        (lengths / np.maximum(count, 1)).astype(dtype),
        count,
        first.astype(np.int32),
    )


def _run(
    key: Any,
    structure: Any,
    step: Callable[[Interval, Any, Any], Any],
    start: Any,
    intervals: Interval,
    n_paths: int,
) -> Any:
    """Return the carries at the ends of the intervals, of every path.

    A step is `step(interval that begins now, white noise of that structure, carry) -> carry`.
    """
    leaves, tree = paths.flatten(structure)

    @jax.vmap
    def keys_of(index):
        step_key = jax.random.fold_in(key, index)
        return [prng.leaf_key(step_key, leaf.path, leaf.layer) for leaf in leaves]

    # The keys of all steps are made at once: a state has few numbers, and making a key in the loop
    # would take as long as drawing them.
    keys = keys_of(jnp.arange(int(np.sum(intervals.count))))

    def run_path(path):
        def white(index):
            def normal(leaf, keys):
                # The bits of a row depend on its index alone, and not on `n_paths`.
                z = prng.normal(keys[index], (n_paths, *leaf.value.shape), rows=(path, 1))[0]
                return prng.prevent_recompute(z).astype(leaf.value.dtype)

            return jax.tree.unflatten(tree, map(normal, leaves, keys))

        def run_interval(carry, interval):
            def body(j, carry):
                now = interval._replace(start=interval.start + j * interval.width)
                return step(now, white(interval.first + j), carry)

            carry = lax.fori_loop(0, interval.count, body, carry)
            return carry, carry

        return lax.scan(run_interval, start, intervals)[1]

    # Under vmap, what does not depend on the path, such as an optimizer's count, is computed once
    # for all paths.
    return jax.vmap(run_path)(jnp.arange(n_paths))


def _euler(key: Any, sde: SDE, x0: Any, intervals: Interval, n_paths: int) -> Any:
    def step(interval, z, x):
        kick = as_operator(sde.diffusion(interval.start, x), x).mv(z)
        root = jnp.sqrt(interval.width)

        def add(x, drift, kick):
            return (x + interval.width * drift + root * kick).astype(x.dtype)

        return jax.tree.map(add, x, sde.drift(interval.start, x), kick)

    structure = as_operator(sde.diffusion(sde.t0, x0), x0).structure
    return _run(key, structure, step, x0, intervals, n_paths)


def _diffrax(key: Any, sde: SDE, x0: Any, intervals: Interval, n_paths: int, name: str) -> Any:
    try:
        import diffrax
        import lineax
    except ImportError as missing:
        raise UserError(
            f"solver: {missing.name} is not installed (got {name}, a solver of diffrax). Run: pip "
            "install 'jaxlm[sde]', or choose euler."
        ) from missing

    solver = getattr(diffrax, SOLVERS[name])()
    areas = isinstance(solver, diffrax.AbstractSRK)
    kind = diffrax.SpaceTimeLevyArea if areas else diffrax.BrownianIncrement
    parts = zip(intervals.start, intervals.end, intervals.count, strict=True)
    grid = np.unique([time for a, b, count in parts for time in np.linspace(a, b, count + 1)])
    grid = grid.astype(intervals.start.dtype)

    def linear(t, x, _):
        # These solvers differentiate the noise and map over it, so it must be a matrix.
        noise = as_operator(sde.diffusion(t, x), x)
        columns = jax.jacfwd(noise.mv)(optax.tree.zeros_like(noise.structure))
        return lineax.PyTreeLinearOperator(columns, shapes_of(x0))

    def path(key):
        structure = as_operator(sde.diffusion(sde.t0, x0), x0).structure
        noise = diffrax.ControlTerm(
            # Unsafe: no interval may be evaluated twice. None is, since steps are never rejected.
            linear,
            diffrax.UnsafeBrownianPath(structure, key, levy_area=kind),
        )
        drift = diffrax.ODETerm(lambda t, x, _: sde.drift(t, x))
        return diffrax.diffeqsolve(
            diffrax.MultiTerm(drift, noise),
            solver,
            *(grid[0], grid[-1], None, x0),
            saveat=diffrax.SaveAt(ts=intervals.end),
            stepsize_controller=diffrax.StepTo(jnp.asarray(grid)),
            adjoint=diffrax.DirectAdjoint(),  # allows forward mode
            max_steps=len(grid),
        ).ys

    return jax.vmap(path)(jax.random.split(key, n_paths))


def ou_moments(
    a: ArrayLike, sigma2: ArrayLike, t: ArrayLike, x0: ArrayLike
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    r"""Return the mean and variance of the Ornstein-Uhlenbeck process $dX = -aX\,dt + \sigma\,dW$.

    $$x_0 e^{-at}, \qquad \frac{\sigma^2}{2a}(1 - e^{-2at})$$

    Both are in float64, in the shape that the arguments broadcast to; a is not 0.

    >>> mean, variance = ou_moments(1.0, 2.0, 100.0, 3.0)
    >>> round(float(mean), 6), round(float(variance), 6)
    (0.0, 1.0)
    """
    a, sigma2, t, x0 = (np.asarray(value, np.float64) for value in (a, sigma2, t, x0))
    shape = np.broadcast_shapes(a.shape, sigma2.shape, t.shape, x0.shape)
    mean, variance = x0 * np.exp(-a * t), -sigma2 / (2 * a) * np.expm1(-2 * a * t)
    return np.broadcast_to(mean, shape), np.broadcast_to(variance, shape)


class WeakError(NamedTuple):
    """|E g(X) - E g(Y)| for each of F test functions, and the standard error of the difference."""

    error: Float[np.ndarray, "F ..."]
    standard_error: Float[np.ndarray, "F ..."]


def weak_error(samples: Any, reference: Any, test_fns: Sequence[Callable[[Any], Any]]) -> WeakError:
    r"""Return $|\mathbb E\,g(X) - \mathbb E\,g(Y)|$ for each test function g, in float64.

    Args:
        samples: samples of X: a tree of arrays with one sample per entry of axis 0.
        reference: samples of Y, such a tree; or the exact $\mathbb E\,g(Y)$ of each g, a sequence
            of numbers.
        test_fns: g, from one sample to a number or an array, of one shape for all.

    >>> result = weak_error(np.array([1.0, 3.0]), [2.5], [lambda x: x])
    >>> result.error.tolist(), result.standard_error.tolist()
    ([0.5], [1.0])
    """
    if np.ndim(reference) == 1 and np.ndim(samples) > 1:  # too few axes to be samples
        reference = list(reference)
    exact = all(np.ndim(leaf) == 0 for leaf in jax.tree.leaves(reference))
    if exact and len(reference) != len(test_fns):
        raise UserError(
            f"reference: must have a value for each of {len(test_fns)} test functions (got "
            f"{len(reference)}). Correct it."
        )
    errors, standard_errors = [], []
    for i, test_fn in enumerate(test_fns):
        mean, square = _mean(test_fn, samples)
        other = (float(reference[i]), 0.0) if exact else _mean(test_fn, reference)
        errors.append(np.abs(mean - other[0]))
        standard_errors.append(np.sqrt(square + other[1]))
    return WeakError(np.stack(errors), np.stack(standard_errors))


def _mean(test_fn: Callable[[Any], Any], samples: Any) -> tuple[Any, Any]:
    """Return the mean of a test function and the square of its standard error."""
    values = np.asarray(jax.vmap(test_fn)(samples), np.float64)
    return values.mean(0), values.var(0, ddof=1) / len(values)

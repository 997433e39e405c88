"""Paths of an equation, and of an optimizer on noisy gradients, by the thousand.

Path i is a function of `(key, i)`: of few or of many paths, the first ones are the same. White
noise comes from the counter generator of `jaxlm.core.prng`, 24 bits for each number. Derivatives
of paths are taken forward (`jax.jvp`), not backward.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxlm.core import paths, prng
from jaxlm.core.errors import UserError
from jaxlm.dynamics.diffusion import as_operator, is_additive
from jaxlm.dynamics.sde import SDE
from jaxlm.typing import Params, PRNGKey

ITO = {"ito_milstein": "ItoMilstein"}
STRATONOVICH = {
    "heun": "Heun",
    "euler_heun": "EulerHeun",
    "sea": "SEA",
    "shark": "ShARK",
    "sra1": "SRA1",
}


class Stretch(NamedTuple):
    """Equal steps up to a time that is saved; or such stretches, stacked.

    Attributes:
      start: time of the first.
      end: time that is saved.
      width: of each.
      count: how many.
      first: number of the first, from 0.
    """

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
    r"""Paths of an equation from `sde.t0` to t1.

    `solver="euler"` is Euler-Maruyama, of weak order 1, and needs nothing else:

    $$X_{k+1} = X_k + b(t_k, X_k)\,\Delta t + \sqrt{\Delta t}\,s(t_k, X_k)\,\xi_k$$

    The others are solvers of diffrax, for states of some hundred numbers at most, since they make
    the matrix s: `ito_milstein` for noise that commutes, such as a diagonal one; and for noise that
    is the same at every state `shark`, `sra1`, `sea`, `heun` and `euler_heun`.

    The time between two saved points is divided into equal steps of at most `dt0`. Compile by
    `jax.jit(functools.partial(simulate, ...))`, with t1, dt0 and save_at as Python numbers.

    Args:
      key: a typed key.
      sde: equations are in the sense of Itô.
      x0: state at `sde.t0`, a tree of floats; `sde.init(params)` makes one.
      t1: end.
      dt0: largest step.
      n_paths: how many.
      solver: see above.
      save_at: times to save, ascending, from `sde.t0` to t1; t1 alone if None.

    Returns:
      A tree like x0 of arrays [n_paths, n_save, *shape of the leaf]. Between the saved times the
      state is held in at least float32.

    Raises:
      UserError: times that are out of order, an unknown solver, a solver for Stratonovich
        equations where noise depends on the state, or a missing extra.

    >>> from jaxlm.dynamics.sde import sgd_sde
    >>> sde = sgd_sde(lambda x: x, lambda x: 0.5, 0.1)
    >>> simulate(jax.random.key(0), sde, 1.0, 2.0, 0.1, n_paths=5, save_at=[1.0, 2.0]).shape
    (5, 2)
    """
    _check_paths(n_paths)
    stretches = _stretches(sde.t0, t1, dt0, save_at)
    return _like(x0, _solve(key, sde, _wide(x0), stretches, n_paths, solver))


def _solve(key: Any, sde: SDE, x0: Any, stretches: Stretch, n_paths: int, solver: str) -> Any:
    if solver == "euler":
        return _euler(key, sde, x0, stretches, n_paths)
    known = {**ITO, **STRATONOVICH}
    if solver not in known:
        raise UserError(f"solver is {solver!r}: give one of {', '.join(['euler', *known])}.")
    if solver in STRATONOVICH and not is_additive(sde.diffusion, sde.t0, x0):
        raise UserError(
            f"solver {solver!r} would solve another equation: where noise depends on the state, "
            "as here, the Stratonovich sense that it takes differs from Itô's; take 'euler' or "
            "'ito_milstein'."
        )
    return _diffrax(key, sde, x0, stretches, n_paths, known[solver])


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
    r"""Paths of an optimizer on gradients $\nabla f(\theta) + \sigma \Sigma(\theta)^{1/2} \xi$.

    The chain that an equation of `jaxlm.dynamics.sde` follows, to be held against it.

    Args:
      key: a typed key.
      optimizer: of optax; updates are added to the parameters.
      grad: θ -> ∇f.
      sqrt_cov: θ -> $\Sigma^{1/2}$: diagonal like θ, matrix or operator; see `as_operator`.
      x0: parameters to begin with, a tree of floats.
      steps: how many.
      sigma: σ.
      n_paths: how many; all at once, with an optimizer's state each.
      save_at: numbers of steps after which parameters are saved, ascending; `steps` if None.

    Returns:
      A tree like x0 of arrays [n_paths, n_save, *shape of the leaf]. Between the saved steps the
      parameters are held in at least float32.

    Raises:
      UserError: `save_at` is out of order.
    """
    _check_paths(n_paths)
    given, x0 = x0, _wide(x0)
    stretches = _stretches(0, steps, 1, save_at)

    def move(part, z, carry):
        del part
        x, state = carry
        kick = as_operator(sqrt_cov(x), x).mv(z)
        noisy = jax.tree.map(lambda g, kick: g + sigma * kick, grad(x), kick)
        updates, state = optimizer.update(noisy, state, x)
        return optax.apply_updates(x, updates), state

    white = _white(key, n_paths, as_operator(sqrt_cov(x0), x0).structure, stretches)
    return _like(given, _run(n_paths, white, move, (x0, optimizer.init(x0)), stretches)[0])


def _check_paths(n_paths: int) -> None:
    if n_paths < 1:
        raise UserError(f"n_paths: too few (got {n_paths}). Give 1 or more.")


def _as_float(leaf: Any) -> jax.Array:
    dtype = jnp.result_type(leaf)
    return jnp.asarray(leaf, dtype if jnp.issubdtype(dtype, jnp.floating) else float)


def _wide(tree: Any) -> Any:
    """In at least float32: a step is small beside the state, and bfloat16 would round it away."""
    floats = jax.tree.map(_as_float, tree)
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), floats)


def _like(given: Any, found: Any) -> Any:
    return jax.tree.map(lambda x, path: path.astype(_as_float(x).dtype), given, found)


def _stretches(t0: float | int, t1: float | int, dt0: float | int, save_at: Any) -> Stretch:
    """The steps, as arrays with an entry for each saved time."""
    times = np.array([t0, *([t1] if save_at is None else save_at)], np.float64)
    if not dt0 > 0:
        raise UserError(f"dt0 is {dt0:g}: give a positive step.")
    ascending = len(times) > 1 and times[-1] <= t1 and (np.diff(times) >= 0).all()
    if not (t0 < t1 < np.inf and ascending):
        raise UserError(
            f"time runs from {t0:g} to {t1:g} and is saved at {times[1:].tolist()}: give a later "
            "end, and times between both, ascending."
        )
    lengths = np.diff(times)
    # A length that is a whole number of steps up to rounding has that number.
    count = np.ceil(lengths / dt0 * (1 - 1e-9))
    if count.sum() >= 2**31:
        raise UserError(
            f"dt0: {count.sum():.3g} steps are too many (got {dt0:g}). Give a larger step, or an "
            "earlier end."
        )
    count = count.astype(np.int32)
    first = np.cumsum(count) - count
    dtype = jnp.result_type(float)
    return Stretch(
        times[:-1].astype(dtype),
        times[1:].astype(dtype),
        (lengths / np.maximum(count, 1)).astype(dtype),
        count,
        first.astype(np.int32),
    )


def _white(key: Any, n_paths: int, structure: Any, stretches: Stretch) -> Callable[[Any, Any], Any]:
    """A function of path and step: standard normal numbers, a tree of the structure.

    The keys of all steps are made at once: in a loop over few numbers they would take as long as
    the numbers.
    """

    @jax.vmap
    def keys_of(index):
        step_key = jax.random.fold_in(key, index)
        return [prng.leaf_key(step_key, leaf.path, leaf.layer) for leaf in leaves]

    leaves, tree = paths.flatten(structure)
    keys = keys_of(jnp.arange(int(np.sum(stretches.count))))

    def draw(path, index):
        def normal(leaf, keys):
            shape, dtype = leaf.value.shape, leaf.value.dtype
            z = prng.normal(keys[index], (n_paths, *shape), rows=(path, 1))[0]
            return prng.prevent_recompute(z).astype(dtype)

        return jax.tree.unflatten(tree, map(normal, leaves, keys))

    return draw


def _run(
    n_paths: int,
    white: Callable[[Any, Any], Any],
    move: Callable[[Stretch, Any, Any], Any],
    start: Any,
    stretches: Stretch,
) -> Any:
    """Every path: `move(step, z, carry) -> carry` for all steps, saving carries.

    What does not depend on the path, such as an optimizer's count, is computed once for all.
    """

    def one(path):
        def stretch(carry, part):
            def step(j, carry):
                at = part._replace(start=part.start + j * part.width)
                return move(at, white(path, part.first + j), carry)

            carry = lax.fori_loop(0, part.count, step, carry)
            return carry, carry

        return lax.scan(stretch, start, stretches)[1]

    return jax.vmap(one)(jnp.arange(n_paths))


def _euler(key: Any, sde: SDE, x0: Any, stretches: Stretch, n_paths: int) -> Any:
    def move(part, z, x):
        kick = as_operator(sde.diffusion(part.start, x), x).mv(z)
        root = jnp.sqrt(part.width)

        def add(x, drift, kick):
            return (x + part.width * drift + root * kick).astype(x.dtype)

        return jax.tree.map(add, x, sde.drift(part.start, x), kick)

    white = _white(key, n_paths, as_operator(sde.diffusion(sde.t0, x0), x0).structure, stretches)
    return _run(n_paths, white, move, x0, stretches)


def _diffrax(key: Any, sde: SDE, x0: Any, stretches: Stretch, n_paths: int, name: str) -> Any:
    try:
        import diffrax
        import lineax
    except ImportError as missing:
        raise UserError(
            f"{name} is a solver of diffrax and {missing.name} is not installed: "
            "pip install 'jaxlm[sde]', or take solver='euler'."
        ) from missing

    solver = getattr(diffrax, name)()
    areas = isinstance(solver, diffrax.AbstractSRK)
    kind = diffrax.SpaceTimeLevyArea if areas else diffrax.BrownianIncrement
    parts = zip(stretches.start, stretches.end, stretches.count, strict=True)
    grid = np.unique([time for a, b, count in parts for time in np.linspace(a, b, count + 1)])
    grid = grid.astype(stretches.start.dtype)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x0)

    def linear(t, x, _):
        # These solvers differentiate the noise and map over it: it crosses as a matrix.
        noise = as_operator(sde.diffusion(t, x), x)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), noise.structure)
        return lineax.PyTreeLinearOperator(jax.jacfwd(noise.mv)(nothing), like)

    def path(key):
        structure = as_operator(sde.diffusion(sde.t0, x0), x0).structure
        noise = diffrax.ControlTerm(
            linear, diffrax.UnsafeBrownianPath(structure, key, levy_area=kind)
        )
        drift = diffrax.ODETerm(lambda t, x, _: sde.drift(t, x))
        return diffrax.diffeqsolve(
            diffrax.MultiTerm(drift, noise),
            solver,
            *(grid[0], grid[-1], None, x0),
            saveat=diffrax.SaveAt(ts=stretches.end),
            stepsize_controller=diffrax.StepTo(jnp.asarray(grid)),
            adjoint=diffrax.DirectAdjoint(),
            max_steps=len(grid),
        ).ys

    return jax.vmap(path)(jax.random.split(key, n_paths))

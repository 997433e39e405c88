"""Zeroth-order optimizers: an estimator, a sampler and an update rule, in the memory of inference.

A step draws directions z_j, measures the slopes g_j along them (`jaxlm.zo.estimators`), turns them
into a direction u (`jaxlm.zo.rules`; for MeZO `1/n Σ_j g_j z_j`) and moves

    θ ← θ - η (u + λ θ)

in place, block by block, with z drawn again. `zeroth_order` combines any estimator, sampler and
rule; `mezo` and its successors in `jaxlm.zo.methods` are named combinations.

References: Malladi et al., arXiv:2305.17333. Differences from the authors' code: parameters are
never perturbed in place, the two losses are subtracted in float32, the reported loss is the mean of
both signs, and weight decay excludes biases and norms by their path.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import paths, prng
from jaxlm.core.checks import integer, one_of
from jaxlm.core.errors import UserError
from jaxlm.zo import rules
from jaxlm.zo.checks import MOST_COPIES, is_traced, real
from jaxlm.zo.estimators import (
    Estimator,
    Previous,
    SPSAEstimate,
    central,
    check,
    forward_passes,
    spsa,
)
from jaxlm.zo.perturbation import directions, width
from jaxlm.zo.rules import Drawn, Rule, Setup
from jaxlm.zo.samplers import Gaussian, Sampler
from jaxlm.zo.sites import Site, over_blocks

NO_DECAY = r"(^|[._])(bias|scale)(\.value)?$|norm"
ScalarOrSchedule = float | Array | Callable[[Array], Any]
Rounding = Literal["nearest", "stochastic"]
PROBES: tuple[Any, ...] = (0, 1, 10, 100, 1000)
"""Steps whose learning rates the settings record; trajectories record those of all steps."""
COUNTED_ROWS = 8
"""Rows of a block that `moved_fraction` reads; evenly spaced, so that all shards count."""


class ZerothOrderState(NamedTuple):
    """State of a zeroth-order optimizer.

    Attributes:
      step: number of steps made.
      key: typed PRNG key of the run; step t draws from `fold_in(key, t)`.
      loss_plus: [n], the last losses at θ + ε z_j with finite slopes.
      memory: state of the update rule.
      known: [n], False where `loss_plus` has no such loss yet.
      last: number of the last step with a finite slope; -1 before the first.
    """

    step: Int[Array, ""]
    key: Array
    loss_plus: Float[Array, "n"]
    memory: Any
    known: Bool[Array, "n"]
    last: Int[Array, ""]

    @property
    def previous(self) -> Previous:
        """The losses that an estimator may compare with."""
        return Previous(self.loss_plus, self.known)

    def after(self, est: SPSAEstimate) -> "ZerothOrderState":
        """Return the state with the losses of an estimate."""
        plus, known = self.previous.after(est.loss_plus, est.projected_grad)
        return self._replace(loss_plus=plus, known=known)


class ZerothOrderInfo(NamedTuple):
    """Diagnostics of a step; the projected gradients and the run's key suffice to replay it.

    Attributes:
      loss: the estimator's value of the loss; for `central`, the mean over signs and directions.
      loss_plus, loss_minus: [n], see `SPSAEstimate`.
      projected_grad: [n]; a slope that is not finite moves nothing along its direction, and a step
        without a finite slope leaves parameters and state unchanged.
      learning_rate: η of this step.
      moved_fraction: fraction of the selected parameters that the step changed, counted on some
        rows of each; below 1 if updates are lost to rounding.
      aux: the mean of the auxiliary outputs of the loss; None if it has none.
    """

    loss: Float[Array, ""]
    loss_plus: Float[Array, "n"]
    loss_minus: Float[Array, "n"]
    projected_grad: Float[Array, "n"]
    learning_rate: Float[Array, ""]
    moved_fraction: Float[Array, ""]
    aux: Any


def no_bias_or_norm(path: str) -> bool:
    """Return whether a path is decayed by default: all but biases, scales and norms are."""
    return not paths.path_predicate(NO_DECAY)(path)


def unchanged(params: Any, state: ZerothOrderState) -> Any:
    """The default `finalize`: the parameters of `step` are the result of a run."""
    del state
    return params


class ZerothOrderOptimizer(NamedTuple):
    """An optimizer as a tuple of pure functions.

    Attributes:
      init: `init(params, key) -> state`.
      step: `step(loss_fn, params, state, batch) -> params, state, info`.
      update: `update(params, state, projected_grad, learning_rate=None) -> params, state,
        moved_fraction`, the part of a step that follows the forward passes; None for the
        optimizer's own η.
      settings: settings that a replay must share: JSON values, and functions that choose paths; a
        traced number is None.
      forwards: number of forward passes in a step.
      finalize: `finalize(params, state) -> params`, the result of a run, where it differs from the
        parameters of `step`.
      select: parameters to train.
      learning_rate: `learning_rate(step)`, η of a step.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    update: Callable[..., Any]
    settings: dict[str, Any]
    forwards: int
    finalize: Callable[..., Any] = unchanged
    select: paths.Select = None
    learning_rate: Callable[[Any], Array] | None = None


def value_at(learning_rate: ScalarOrSchedule, step: Any, dtype: Any = jnp.float32) -> Array:
    """Return η of a step."""
    return jnp.asarray(learning_rate(step) if callable(learning_rate) else learning_rate, dtype)


def rates(learning_rate: ScalarOrSchedule) -> list[float] | None:
    """Return η at a few steps, which identify a schedule in a trajectory; None if it is traced."""
    # NumPy rather than JAX: a configuration builds its optimizer once to check itself, and may do
    # so before the JAX backend is set up.
    values = [learning_rate(t) if callable(learning_rate) else learning_rate for t in PROBES]
    return None if any(map(is_traced, values)) else [float(np.float32(value)) for value in values]


def concrete(value: Any) -> float | None:
    """Return a number for a trajectory; None if it is traced."""
    return None if is_traced(value) else float(value)


def first_state(
    num_directions: int, key: Array, memory: Any, dtype: Any = jnp.float32
) -> ZerothOrderState:
    """Return the state before the first step, with losses of a dtype."""
    plus, known = Previous.none(num_directions, dtype)
    step = jnp.zeros((), jnp.int32)
    # A copy of the key, since steps donate the state and the key may be the user's.
    return ZerothOrderState(step, jnp.copy(key), plus, memory, known, step - 1)


def info_of(est: SPSAEstimate, learning_rate: Array, moved_fraction: Array) -> ZerothOrderInfo:
    """Return the diagnostics of a step from its estimate and its update."""
    measured = est.loss, est.loss_plus, est.loss_minus, est.projected_grad
    return ZerothOrderInfo(*measured, learning_rate, moved_fraction, est.aux)


RECORDED = {"reuse_key": "lazy"}
"""Fields that have another name in trajectories, so that old files stay readable."""


def described(value: Any) -> str:
    """Return the text that identifies a sampler in a trajectory, with checksums of its arrays."""
    if dataclasses.is_dataclass(value):
        fields = (
            f"{RECORDED.get(x.name, x.name)}={described(getattr(value, x.name))}"
            for x in dataclasses.fields(value)
        )
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {described(x)}' for name, x in value.items())}}}"
    if hasattr(value, "dtype"):
        return "traced" if is_traced(value) else f"crc32:{zlib.crc32(np.asarray(value).tobytes())}"
    return repr(value)


def zeroth_order(
    learning_rate: ScalarOrSchedule,
    *,
    eps: float | Array = 1e-3,
    estimator: Estimator = central,
    sampler: Sampler = Gaussian(),
    rule: Rule | None = None,
    num_directions: int = 1,
    weight_decay: float | Array = 0.0,
    select: paths.Select = None,
    decay: paths.Select = no_bias_or_norm,
    rounding: Rounding = "nearest",
    mesh: Mesh | None = None,
) -> ZerothOrderOptimizer:
    """Combine an estimator, a sampler and an update rule into an optimizer.

    Args:
      learning_rate: η, or an optax schedule of the step.
      eps: ε; 1e-3 suits all parameters, 1e-1 prefixes, 1e-2 LoRA.
      estimator: how slopes are measured, see `jaxlm.zo.estimators`.
      sampler: distribution of z.
      rule: how slopes become an update, see `jaxlm.zo.rules`; None for `rules.sgd()`.
      num_directions: n; a larger n allows a larger η.
      weight_decay: λ, applied to the parameters that `decay` matches.
      select: parameters to train, a regular expression or predicate on paths. Leaves that are not
        arrays of real floats stay fixed.
      decay: parameters to decay; by default all but those named bias, scale or norm.
      rounding: how parameters below float32 are rounded after the update: to the nearest number,
        or up or down at random such that the mean is exact.
      mesh: spread the directions over its axis `data`, see `spsa`.

    Returns:
      The optimizer. Its `step` is pure; `jit_step` compiles it with donated buffers, so that it
      needs the memory of the forward passes alone. The learning rate, ε and the decay may be
      traced, for example by a `vmap` over learning rates.

    Raises:
      UserError: if a number is out of range or the estimator does not state its forward passes;
        from `init`, if `select` matches nothing or sampler, rule and parameters do not fit.

    >>> from jaxlm import zo
    >>> opt = zeroth_order(
    ...     0.1, estimator=zo.one_sided, sampler=zo.rademacher(), num_directions=4
    ... )
    >>> params = {"w": jnp.ones(3)}
    >>> state = opt.init(params, jax.random.key(0))
    >>> loss = lambda params, batch: ((params["w"] - batch) ** 2).sum()
    >>> params, state, info = opt.step(loss, params, state, jnp.zeros(3))
    >>> opt.forwards
    5
    """
    integer("num_directions", num_directions, most=MOST_COPIES)
    check(eps, num_directions, mesh)
    real("weight_decay", weight_decay, least=0.0)
    if not callable(learning_rate):
        real("learning_rate", learning_rate, least=0.0)
    one_of("rounding", rounding, get_args(Rounding))
    forwards = forward_passes(estimator, num_directions)
    rule = rules.sgd() if rule is None else rule
    rate_at = functools.partial(value_at, learning_rate)

    def init(params, key):
        paths.check_unique_hashes(params)
        paths.mask(params, select)
        sampler.check(params, select)
        memory = rule.init(Setup(params, select, sampler, num_directions))
        return first_state(num_directions, key, memory, width(params, select))

    def step(loss_fn, params, state, batch):
        est = spsa(
            loss_fn,
            params,
            batch,
            key=jax.random.fold_in(state.key, state.step),
            eps=eps,
            sampler=sampler.at(state.key, state.step),
            num_directions=num_directions,
            select=select,
            estimator=estimator,
            previous=state.previous,
            mesh=mesh,
        )
        # A schedule that is fused into several updates may round differently in each, and none
        # might be the rate that is recorded. The barrier makes all of them read one number.
        rate = lax.optimization_barrier(rate_at(state.step, width(params, select)))
        params, state, moved = update(params, state, est.projected_grad, rate)
        return params, state.after(est), info_of(est, rate, moved)

    def update(params, state, projected_grad, learning_rate=None):
        dtype = width(params, select)
        rate = rate_at(state.step, dtype) if learning_rate is None else learning_rate
        finite = jnp.isfinite(projected_grad)
        slopes = jnp.where(finite, projected_grad, 0).astype(dtype)
        moves = finite.any()

        def drawn_at(step):
            key = jax.random.fold_in(state.key, step)
            return directions(key, sampler.at(state.key, step), params, select, num_directions)

        def where_it_moves(new, old):
            return jnp.where(moves, new, old).astype(old.dtype)

        drawn = Drawn(slopes, finite, state.step, state.last, drawn_at)
        memory, block = rule.update(drawn, params, state.memory)
        params, moved = descend(
            block,
            params,
            rate.astype(dtype),
            weight_decay=weight_decay,
            select=select,
            decay=decay,
            rounding=rounding,
            key=jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2),
            moves=moves,
        )
        state = state._replace(
            step=state.step + 1,
            memory=jax.tree.map(where_it_moves, memory, state.memory),
            last=jnp.where(moves, state.step, state.last),
        )
        return params, state, moved

    settings = {
        "learning_rate": rates(learning_rate),
        "eps": concrete(eps),
        "sampler": described(sampler),
        "rule": rule.name,
        "num_directions": num_directions,
        "weight_decay": concrete(weight_decay),
        "select": select,
        "decay": decay if is_traced(weight_decay) or weight_decay else None,
        "rounding": rounding,
    }
    return ZerothOrderOptimizer(
        init, step, update, settings, forwards, select=select, learning_rate=rate_at
    )


def descend(
    block: rules.Block,
    params: Any,
    learning_rate: Array,
    *,
    weight_decay: float | Array = 0.0,
    select: paths.Select = None,
    decay: paths.Select = None,
    rounding: Rounding = "nearest",
    key: Array | None = None,
    moves: Bool[Array, ""] | bool = True,
) -> tuple[Any, Float[Array, ""]]:
    """Return `θ - η (u + λ θ)`, and the fraction of θ that has moved.

    Under `jit` with donated parameters the update happens in place, block by block of rows: only
    one block and its noise are alive beside the parameters.

    Args:
      block: `block(site) -> u`.
      params: θ.
      learning_rate: η.
      weight_decay: λ.
      select: parameters to move.
      decay: parameters to decay.
      rounding: see `zeroth_order`.
      key: key of stochastic rounding.
      moves: False keeps every bit, whatever u and η are.
    """
    takes, decays = paths.leaf_predicate(select), paths.path_predicate(decay)
    counts, sizes = [], []

    def leaf_update(leaf):
        if not takes(leaf.path, leaf.value):
            return leaf.value
        rate = weight_decay if decays(leaf.path) else 0.0

        def moved(site):
            update = block(site)
            old = site.value.astype(jnp.promote_types(site.value.dtype, update.dtype))
            # One product in each sum: with two, compilers differ in which one they contract to a
            # fused multiply-add, and the last bits would depend on the program around it.
            new = old - learning_rate * update
            if is_traced(rate) or rate:
                new = new - learning_rate * rate * old
            rounded = round_to(new, site, rounding, key)
            # Equal numbers keep their bits: subtracting a zero can turn -0 into 0.
            value = jnp.where((new == old) | ~jnp.asarray(moves), site.value, rounded)
            changed = _some_rows(value) != _some_rows(site.value)
            return value, changed.mean(dtype=jnp.float32) * value.size

        value, count = over_blocks(moved, leaf)
        counts.append(count)
        sizes.append(leaf.value.size)
        return value

    params = paths.map_with_path(leaf_update, params)
    total = float(sum(sizes))  # may not fit into int32
    return params, jnp.asarray(sum(counts) / total, jnp.float32)


def _some_rows(value: Array) -> Array:
    rows = jnp.atleast_1d(value)
    return rows[:: max(1, rows.shape[0] // COUNTED_ROWS)]


def round_to(new: Array, site: Site, rounding: Rounding, key: Array | None) -> Array:
    """Round `new` to the dtype of the site: to nearest, or at random to one of two neighbours."""
    near = new.astype(site.value.dtype)
    if key is None or rounding == "nearest" or near.dtype == new.dtype:
        return near
    error = new - near.astype(new.dtype)
    other = jnp.nextafter(near, jnp.where(error > 0, jnp.inf, -jnp.inf).astype(near.dtype))
    gap = jnp.abs(other.astype(new.dtype) - near.astype(new.dtype))
    bits = prng.bits(site.key(key), site.shape, site.rows)
    uniform = (bits >> 8).astype(new.dtype) * 2.0**-24  # float32 holds 24 bits exactly
    return jnp.where(uniform * gap < jnp.abs(error), other, near)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Held:
    """A leaf that is not an array, such as an activation function, as static data of a tree."""

    value: Any


def hold(tree: Any) -> Any:
    """Wrap leaves that are not arrays, so that `jit` accepts the tree; inverse of `release`."""
    arrays = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda x: x if isinstance(x, arrays) else _Held(x), tree)


def release(tree: Any) -> Any:
    """Unwrap the leaves of `hold`."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, _Held) else x,
        tree,
        is_leaf=lambda x: isinstance(x, _Held),
    )


class _JitStep:
    """See `jit_step`; other attributes, such as `lower`, are those of a function under `jit`."""

    def __init__(self, opt: ZerothOrderOptimizer, loss_fn: Callable[..., Any]):
        def step(params, state, batch):
            params, state, info = opt.step(loss_fn, release(params), state, batch)
            return hold(params), state, info

        self._jitted = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def lower(self, params: Any, state: Any, batch: Any) -> Any:
        return self._jitted.lower(hold(params), state, batch)

    def __call__(self, params: Any, state: Any, batch: Any) -> Any:
        _refuse_shared({"params": params, "state": state})
        params, state, info = self._jitted(hold(params), state, batch)
        return release(params), state, info


def _refuse_shared(tree):
    """Raise UserError if one array is in two places, since it cannot be donated twice."""
    seen: dict[int, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        other = seen.setdefault(id(leaf), path) if isinstance(leaf, jax.Array) else path
        if other is not path:
            names = [jax.tree_util.keystr(x, simple=True, separator=".") for x in (other, path)]
            raise UserError(
                f"{names[0]}: must not be shared, since a step donates it (got the same array as "
                f"{names[1]}). Copy one with jnp.copy, or keep it in one place to train it once."
            )


def jit_step(opt: ZerothOrderOptimizer, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `step(params, state, batch) -> params, state, info`, with params and state donated.

    Donated arrays are deleted by the call; use the returned ones. Leaves of `params` that are not
    arrays, such as the activation function of an Equinox module, stay as they are.

    Raises:
      UserError: from the step, if one array is in two places of params and state.
    """
    return _JitStep(opt, loss_fn)

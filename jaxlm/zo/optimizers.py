"""Zeroth-order optimizers: an estimator, a sampler and an update rule, in the memory of inference.

One step draws z_j, measures slopes g_j along them (`jaxlm.zo.estimators`), turns them into a
direction u (`jaxlm.zo.rules`; for MeZO `1/n Σ_j g_j z_j`) and moves

    θ ← θ - η (u + λ θ)

in place, block by block, drawing z again. `zeroth_order` puts any three pieces together; `mezo` and
its successors in `jaxlm.zo.methods` are choices of them.

References: Malladi et al., arXiv:2305.17333. Differences from the authors' code: parameters are
never perturbed in place, the two losses are subtracted in float32, the reported loss is the mean of
both signs, and weight decay spares biases and norms by their path.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import checks, paths, prng
from jaxlm.core.errors import UserError
from jaxlm.zo import rules
from jaxlm.zo.estimators import (
    FORWARDS,
    Estimator,
    Previous,
    SPSAEstimate,
    central,
    check,
    spsa,
)
from jaxlm.zo.perturbation import directions, is_traced, width
from jaxlm.zo.rules import Drawn, Rule, Setup
from jaxlm.zo.samplers import Gaussian, Sampler
from jaxlm.zo.sites import Site, over_blocks

NO_DECAY = r"(^|[._])(bias|scale)(\.value)?$|norm"
ScalarOrSchedule = float | Array | Callable[[Array], Any]
Rounding = Literal["nearest", "stochastic"]
SAMPLE = 8
"""Rows of a block on which `moved_fraction` is counted, evenly spaced: some in each shard."""


class ZerothOrderState(NamedTuple):
    """State of a zeroth-order optimizer.

    Attributes:
      step: steps made so far.
      key: typed PRNG key of the run; step t draws from `fold_in(key, t)`.
      loss_plus: [n], the last ones with finite slopes.
      memory: of the update rule.
      known: [n], where there is such a loss.
      last: number of the last step with a finite slope; -1 before there is one.
    """

    step: Int[Array, ""]
    key: Array
    loss_plus: Float[Array, "n"]
    memory: Any
    known: Bool[Array, "n"]
    last: Int[Array, ""]

    @property
    def previous(self) -> Previous:
        """What an estimator knows of the steps before."""
        return Previous(self.loss_plus, self.known)

    def after(self, est: SPSAEstimate) -> "ZerothOrderState":
        """With the losses of an estimate."""
        plus, known = self.previous.after(est.loss_plus, est.projected_grad)
        return self._replace(loss_plus=plus, known=known)


class ZerothOrderInfo(NamedTuple):
    """What one step saw; with the run's key, the projected gradients replay it.

    Attributes:
      loss: as the estimator knows it: of `central`, the mean over both signs and all directions.
      loss_plus, loss_minus: [n], see `SPSAEstimate`.
      projected_grad: [n]; a direction along which it is not finite moves nothing, and a step
        without a finite one leaves parameters and state as they were.
      learning_rate: η of this step.
      moved_fraction: of the selected parameters, how many have another value after the step,
        counted on some rows of each; below 1 where the update is lost to rounding.
      aux: what the objective returned beside the loss, averaged; or None.
    """

    loss: Float[Array, ""]
    loss_plus: Float[Array, "n"]
    loss_minus: Float[Array, "n"]
    projected_grad: Float[Array, "n"]
    learning_rate: Float[Array, ""]
    moved_fraction: Float[Array, ""]
    aux: Any


def no_bias_or_norm(path: str) -> bool:
    """Whether a path is decayed where nothing else is said: not if it is a bias, scale or norm."""
    return not paths.path_predicate(NO_DECAY)(path)


def as_they_are(params: Any, state: ZerothOrderState) -> Any:
    """The parameters of `step` are those that a run has come to."""
    del state
    return params


class ZerothOrderOptimizer(NamedTuple):
    """Pure functions.

    Attributes:
      init: `init(params, key) -> state`.
      step: `step(loss_fn, params, state, batch) -> params, state, info`.
      update: `update(params, state, projected_grad, learning_rate=None) -> params, state,
        moved_fraction`: the part of a step that follows the forward passes; with the optimizer's
        own η where none is given.
      settings: what a trajectory of this optimizer must be replayed with: JSON values, and
        functions that choose paths; None where a number is traced.
      forwards: forward passes in a step; 0 for an estimator that is not in `estimators.FORWARDS`.
      finalize: `finalize(params, state) -> params`: the parameters that a run has come to, where
        those of `step` are not the whole of them.
      select: parameters that move.
      learning_rate: `learning_rate(step)`, η of a step.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    update: Callable[..., Any]
    settings: dict[str, Any]
    forwards: int
    finalize: Callable[..., Any] = as_they_are
    select: paths.Select = None
    learning_rate: Callable[[Any], Array] | None = None


def value_at(learning_rate: ScalarOrSchedule, step: Any, dtype: Any = jnp.float32) -> Array:
    """η of a step."""
    return jnp.asarray(learning_rate(step) if callable(learning_rate) else learning_rate, dtype)


def rates(learning_rate: ScalarOrSchedule) -> list[float] | None:
    """η at some steps, by which a trajectory knows a schedule; None where it is traced.

    A few, to refuse early and by name; the rates of all steps are beside the slopes.
    """
    values = [value_at(learning_rate, step) for step in (0, 1, 10, 100, 1000)]
    return None if any(map(is_traced, values)) else [float(value) for value in values]


def concrete(value: Any) -> float | None:
    """A number for a trajectory; None where it is traced."""
    return None if is_traced(value) else float(value)


def first_state(
    num_directions: int, key: Array, memory: Any, dtype: Any = jnp.float32
) -> ZerothOrderState:
    """The state before the first step; it has a key of its own, since steps donate it.

    Args:
      num_directions: n.
      key: of the run.
      memory: of the rule.
      dtype: of losses, see `perturbation.width`.
    """
    plus, known = Previous.none(num_directions, dtype)
    step = jnp.zeros((), jnp.int32)
    return ZerothOrderState(step, jnp.copy(key), plus, memory, known, step - 1)


def info_of(est: SPSAEstimate, learning_rate: Array, moved_fraction: Array) -> ZerothOrderInfo:
    """What a step saw, from its estimate and its update."""
    return ZerothOrderInfo(
        loss=est.loss,
        loss_plus=est.loss_plus,
        loss_minus=est.loss_minus,
        projected_grad=est.projected_grad,
        learning_rate=learning_rate,
        moved_fraction=moved_fraction,
        aux=est.aux,
    )


def written(select: paths.Select) -> paths.Select:
    """A selection as settings hold it: a trajectory writes down which paths a function takes."""
    return select


def described(value: Any) -> str:
    """A sampler as a trajectory knows it: its arrays, such as thresholds, by their checksums."""
    if dataclasses.is_dataclass(value):
        fields = (
            f"{x.name}={described(getattr(value, x.name))}" for x in dataclasses.fields(value)
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
    """Any estimator with any sampler and any update rule.

    Args:
      learning_rate: η, or an optax schedule of the step.
      eps: ε; 1e-3 suits all parameters, 1e-1 prefixes, 1e-2 LoRA.
      estimator: how slopes are measured, see `jaxlm.zo.estimators`.
      sampler: distribution of z.
      rule: what is made of them, see `jaxlm.zo.rules`; None for `rules.sgd()`.
      num_directions: n; a larger n wants a larger η.
      weight_decay: λ, on the parameters that `decay` takes.
      select: parameters that are trained, a regular expression or predicate on paths. What is no
        array of real floats is held fixed.
      decay: parameters that are decayed; by default all but those named bias, scale or norm.
      rounding: of parameters below float32 after the update: to nearest, or up or down at random
        such that the mean is exact.
      mesh: spreads the directions over its axis `data`, see `spsa`.

    Returns:
      `init`, `step` and what belongs to them. `step` is pure; `jit_step` compiles it with donated
      buffers, so that its memory is that of the forward passes. The learning rate, eps and the
      decay may be traced, such as by a `vmap` over learning rates.

    Raises:
      ValueError: if a number is out of its range; from init if `select` takes nothing or sampler,
        rule and parameters do not fit.

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
    check(eps, num_directions, mesh)
    rules.at_least_zero(weight_decay=weight_decay)
    if not callable(learning_rate):
        rules.at_least_zero(learning_rate=learning_rate)
    checks.one_of("rounding", rounding, get_args(Rounding))
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
        rate = rate_at(state.step, width(params, select))
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
    forwards = FORWARDS.get(estimator, lambda n: 0)(num_directions)
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
    """`θ - η (u + λ θ)` over layers and blocks of rows, and the fraction of θ that has moved.

    Under `jit` with donated parameters this happens in place: beside the parameters only one block
    and its noise are alive.

    Args:
      block: u at a site.
      params: θ.
      learning_rate: η.
      weight_decay: λ.
      select: parameters that move.
      decay: parameters that are decayed.
      rounding: see `zeroth_order`.
      key: of stochastic rounding.
      moves: where this is False every bit stays, whatever u and η are.
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
            # One product in each sum, so that no compiler has two ways to contract it.
            new = old - learning_rate * update
            if is_traced(rate) or rate:
                new = new - learning_rate * rate * old
            rounded = round_to(new, site, rounding, key)
            value = jnp.where((new == old) | ~jnp.asarray(moves), site.value, rounded)
            changed = _some_rows(value) != _some_rows(site.value)
            return value, changed.mean(dtype=jnp.float32) * value.size

        value, count = over_blocks(moved, leaf)
        counts.append(count)
        sizes.append(leaf.value.size)
        return value

    params = paths.map_with_path(leaf_update, params)
    total = float(sum(sizes))  # which may not fit an int of 32 bits
    return params, jnp.asarray(sum(counts) / total, jnp.float32)


def _some_rows(value: Array) -> Array:
    rows = jnp.atleast_1d(value)
    return rows[:: max(1, rows.shape[0] // SAMPLE)]


def round_to(new: Array, site: Site, rounding: Rounding, key: Array | None) -> Array:
    """`new` in the dtype of the site: the nearest number, or one of its neighbours at random."""
    near = new.astype(site.value.dtype)
    if key is None or rounding == "nearest" or near.dtype == new.dtype:
        return near
    error = new - near.astype(new.dtype)
    other = jnp.nextafter(near, jnp.where(error > 0, jnp.inf, -jnp.inf).astype(near.dtype))
    gap = jnp.abs(other.astype(new.dtype) - near.astype(new.dtype))
    bits = prng.bits(site.key(key), site.shape, site.rows)
    uniform = (bits >> 8).astype(new.dtype) * 2.0**-24
    return jnp.where(uniform * gap < jnp.abs(error), other, near)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Held:
    """A leaf that is no array, such as an activation function, in the structure of a tree."""

    value: Any


def hold(tree: Any) -> Any:
    """The tree as `jit` takes it, with what is no array out of the way; see `release`."""
    arrays = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda x: x if isinstance(x, arrays) else _Held(x), tree)


def release(tree: Any) -> Any:
    """Inverse of `hold`."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, _Held) else x,
        tree,
        is_leaf=lambda x: isinstance(x, _Held),
    )


class _JitStep:
    """See `jit_step`; what else a function under `jit` can do, `lower` for one, it can too."""

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
        _refuse_twins({"params": params, "state": state})
        params, state, info = self._jitted(hold(params), state, batch)
        return release(params), state, info


def _refuse_twins(tree):
    """Raises UserError where one array stands in two places: it cannot be donated twice."""
    seen: dict[int, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        other = seen.setdefault(id(leaf), path) if isinstance(leaf, jax.Array) else path
        if other is not path:
            names = [jax.tree_util.keystr(x, simple=True, separator=".") for x in (other, path)]
            raise UserError(
                f"{names[0]}: is the same array as {names[1]}, and a step gives away both. Copy "
                "one with jnp.copy; to train them as one, keep it in one place."
            )


def jit_step(opt: ZerothOrderOptimizer, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `step(params, state, batch) -> params, state, info`, donating params and state.

    The arrays passed in are gone after the call; use what it returns. Leaves of `params` that are
    no arrays, such as the activation function of a whole Equinox module, stay as they are.

    Raises:
      UserError: from the step, if one array stands in two places of params and state.
    """
    return _JitStep(opt, loss_fn)

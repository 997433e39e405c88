"""MeZO: stochastic gradient descent on SPSA estimates, in the memory of inference.

One step draws z, measures g = (L(θ + εz) - L(θ - εz)) / 2ε, and moves

    θ ← θ - η (1/n Σ_j g_j z_j + λ θ).

`mezo` makes the update in place, block by block, drawing z again. `scale_by_spsa` is the same
estimate as an optax transformation, for chains with momentum, clipping or any other rule; it holds
a gradient.

References: Malladi et al., arXiv:2305.17333. Differences from the authors' code: parameters are
never perturbed in place, the two losses are subtracted in float32, the reported loss is the mean of
both signs, and weight decay spares biases and norms by their path.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.core import paths
from jaxlm.zo.estimators import SPSAEstimate, check, gradient_block, materialize, spsa
from jaxlm.zo.samplers import Gaussian, Sampler

BLOCK = 2**22
NO_DECAY = r"(^|[._])(bias|scale)(\.value)?$|norm"
ScalarOrSchedule = float | Array | Callable[[Array], Any]


class MezoState(NamedTuple):
    """State of `mezo`.

    Attributes:
      step: updates made so far.
      key: typed PRNG key of the run; step t draws from `fold_in(key, t)`.
    """

    step: Int[Array, ""]
    key: Array


class MezoInfo(NamedTuple):
    """What one step of `mezo` saw; with the run's key, the scalars replay it.

    Attributes:
      loss: mean over both signs and all directions.
      loss_plus, loss_minus: [n].
      projected_grad: [n].
      learning_rate: η of this step.
      aux: what the objective returned beside the loss, averaged; or None.
    """

    loss: Float[Array, ""]
    loss_plus: Float[Array, "n"]
    loss_minus: Float[Array, "n"]
    projected_grad: Float[Array, "n"]
    learning_rate: Float[Array, ""]
    aux: Any


class ZerothOrderOptimizer(NamedTuple):
    """A pair of pure functions.

    Attributes:
      init: `init(params, key) -> state`.
      step: `step(loss_fn, params, state, batch) -> params, state, info`.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]


def _value(learning_rate: ScalarOrSchedule, step) -> Array:
    value = learning_rate(step) if callable(learning_rate) else learning_rate
    return jnp.asarray(value, jnp.float32)


def mezo(
    learning_rate: ScalarOrSchedule,
    *,
    eps: float = 1e-3,
    weight_decay: float = 0.0,
    sampler: Sampler = Gaussian(),
    num_directions: int = 1,
    select: paths.Select = None,
    decay: paths.Select = lambda path: not paths.matcher(NO_DECAY)(path),
) -> ZerothOrderOptimizer:
    """Memory-efficient zeroth-order SGD.

    Args:
      learning_rate: η, or an optax schedule of the step.
      eps: ε; 1e-3 suits all parameters, 1e-1 prefixes, 1e-2 LoRA.
      weight_decay: λ, on the parameters that `decay` takes.
      sampler: distribution of z.
      num_directions: n; a larger n wants a larger η.
      select: parameters that are trained, a regular expression or predicate on paths.
      decay: parameters that are decayed; by default all but those named bias, scale or norm.

    Returns:
      `(init, step)`. `step` is pure; `jit_step` compiles it with donated buffers, so that its
      memory is that of the two forward passes.

    Raises:
      ValueError: if eps is not positive, or (from init) if `select` takes nothing.

    >>> opt = mezo(0.1)
    >>> params = {"w": jnp.ones(3)}
    >>> state = opt.init(params, jax.random.key(0))
    >>> loss = lambda params, batch: ((params["w"] - batch) ** 2).sum()
    >>> params, state, info = opt.step(loss, params, state, jnp.zeros(3))
    >>> int(state.step)
    1
    """
    check(eps, num_directions)

    def init(params, key):
        paths.check_unique_hashes(params)
        paths.mask(params, select)
        return MezoState(jnp.zeros((), jnp.int32), key)

    def step(loss_fn, params, state, batch):
        est = spsa(
            loss_fn,
            params,
            batch,
            key=jax.random.fold_in(state.key, state.step),
            eps=eps,
            sampler=sampler,
            num_directions=num_directions,
            select=select,
        )
        rate = _value(learning_rate, state.step)
        params = descend(est, params, rate, weight_decay, decay)
        info = MezoInfo(est.loss, est.loss_plus, est.loss_minus, est.projected_grad, rate, est.aux)
        return params, MezoState(state.step + 1, state.key), info

    return ZerothOrderOptimizer(init, step)


def descend(
    est: SPSAEstimate,
    params: Any,
    learning_rate: Array,
    weight_decay: float = 0.0,
    decay: paths.Select = None,
) -> Any:
    """Returns `θ - η (1/n Σ_j g_j z_j + λ θ)`, made over layers and blocks of rows.

    Under `jit` with donated parameters this happens in place: beside the parameters only one block
    and its noise are alive.
    """
    takes, decays = paths.chooser(est.select), paths.matcher(decay)

    def leaf_update(leaf):
        if not takes(leaf.path, leaf.value):
            return leaf.value
        rate = weight_decay if decays(leaf.path) else 0.0

        def moved(value, shape, layer, rows):
            update = gradient_block(est, leaf.path, shape, layer, rows)
            old = value.astype(jnp.promote_types(value.dtype, update.dtype))
            # One product in each sum, so that no compiler has two ways to contract it.
            new = old - learning_rate * update
            if rate:
                new = new - learning_rate * rate * old
            return jnp.where(new == old, value, new.astype(value.dtype))

        return _over_blocks(moved, leaf)

    return paths.map_with_path(leaf_update, params)


def _over_blocks(moved, leaf: paths.Leaf) -> Array:
    """Applies `moved(block, leaf shape, layer, rows)` over all layers and row blocks of a leaf."""
    if not leaf.stacked:
        return _over_rows(moved, leaf.value, leaf.layer)

    def body(layer, stack):
        value = lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        value = _over_rows(moved, value, layer)
        return lax.dynamic_update_index_in_dim(stack, value, layer, 0)

    return lax.fori_loop(0, leaf.value.shape[0], body, leaf.value)


def _over_rows(moved, value, layer):
    shape = value.shape
    size = max(1, BLOCK // max(1, value[0].size)) if value.ndim else 0
    if value.ndim == 0 or shape[0] <= size:
        return moved(value, shape, layer, None)

    def at(start, size, value):
        rows = (start, size)
        block = moved(lax.dynamic_slice_in_dim(value, *rows), shape, layer, rows)
        return lax.dynamic_update_slice_in_dim(value, block, start, 0)

    count, rest = divmod(shape[0], size)
    value = lax.fori_loop(0, count, lambda i, value: at(i * size, size, value), value)
    return at(count * size, rest, value) if rest else value


def jit_step(opt: ZerothOrderOptimizer, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `step(params, state, batch) -> params, state, info`, donating params and state.

    The arrays passed in are gone after the call; use what it returns.
    """
    return jax.jit(
        lambda params, state, batch: opt.step(loss_fn, params, state, batch),
        donate_argnums=(0, 1),
    )


class ScaleBySpsaState(NamedTuple):
    """State of `scale_by_spsa`.

    Attributes:
      step: estimates made so far.
      key: typed PRNG key of the run; estimate t draws from `fold_in(key, t)`.
      loss: mean loss of the last estimate; NaN before the first.
      projected_grad: [n], of the last estimate.
    """

    step: Int[Array, ""]
    key: Array
    loss: Float[Array, ""]
    projected_grad: Float[Array, "n"]


def scale_by_spsa(
    eps: float = 1e-3,
    *,
    sampler: Sampler = Gaussian(),
    num_directions: int = 1,
    select: paths.Select = None,
    key: Array | None = None,
):
    """The SPSA estimate as the first link of an optax chain.

    `update(None, state, params, *, value_fn)` ignores the incoming updates and returns
    `1/n Σ_j g_j z_j`. `value_fn(params)`, or `value_fn(params, *, view)`, is the loss on the
    current batch. Memory: one gradient beside the parameters.

    Args:
      eps, sampler, num_directions, select: see `spsa`.
      key: typed PRNG key of the run, kept in the state; `jax.random.key(0)` if None.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    >>> import optax
    >>> tx = optax.chain(scale_by_spsa(1e-3), optax.sgd(0.1, momentum=0.9))
    >>> params = {"w": jnp.ones(3)}
    >>> loss = lambda params: (params["w"] ** 2).sum()
    >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
    """
    import optax

    check(eps, num_directions)

    def init(params):
        paths.check_unique_hashes(params)
        paths.mask(params, select)
        run_key = jax.random.key(0) if key is None else key
        unknown = jnp.full(num_directions, jnp.nan, jnp.float32)
        return ScaleBySpsaState(jnp.zeros((), jnp.int32), run_key, unknown[0], unknown)

    def update(updates, state, params=None, *, value_fn, **extra):
        del updates, extra
        if params is None:
            raise ValueError("scale_by_spsa needs update(None, state, params, value_fn=...)")
        est = spsa(
            value_fn,
            params,
            key=jax.random.fold_in(state.key, state.step),
            eps=eps,
            sampler=sampler,
            num_directions=num_directions,
            select=select,
        )
        state = ScaleBySpsaState(state.step + 1, state.key, est.loss, est.projected_grad)
        return materialize(est, params), state

    return optax.GradientTransformationExtraArgs(init, update)

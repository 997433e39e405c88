"""Gradients from forward passes alone.

Simultaneous perturbation (SPSA) measures the slope of a loss along random directions z_j:

    g_j = (L(θ + ε z_j) - L(θ - ε z_j)) / 2ε,        ∇L ≈ 1/n Σ_j g_j z_j.

The directions are never stored. Each element of z_j is a function of (key, path, layer, index),
made where a weight is read and made again where it is updated. An objective with a keyword `view`
sees `W + ε z` one layer at a time and needs the memory of inference; one without is called on a
perturbed copy of the parameters, one copy alive at a time.

References: Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation", 1992; Malladi et al., "Fine-Tuning Language Models with Just Forward Passes",
arXiv:2305.17333.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxlm.core import paths, prng, views
from jaxlm.core.precision import Packed
from jaxlm.zo.samplers import Gaussian, Sampler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perturbation:
    """The view `W + scale z`: what a model reads while its loss is measured along z.

    Attributes:
      key: of the direction z.
      scale: ε, or -ε; a vmap over it runs both signs with z drawn once.
      sampler: distribution of z.
      select: parameters that move.
    """

    key: Array
    scale: Float[Array, ""]
    sampler: Sampler
    select: paths.Select = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, path: str, leaf: Any, layer, *, rows: prng.Rows = None) -> Any:
        if isinstance(leaf, Packed):
            return views.unpack(
                leaf, lambda name, part, rows: self(f"{path}.{name}", part, layer, rows=rows), rows
            )
        if not paths.chooser(self.select)(path, leaf):
            return views.take(leaf, rows)
        shape = views.shape_of(leaf, rows)
        z = _direction(self.key, self.sampler, path, shape, layer, rows)
        seen = views.take(leaf, rows)
        return views.add(seen, self.scale * z)


def _direction(
    key: Array, sampler: Sampler, path: str, shape, layer=None, rows: prng.Rows = None
) -> Float[Array, "..."]:
    """z of one leaf. The barrier keeps later fusions from changing its last bits."""
    noise = sampler.sample(prng.leaf_key(key, path, layer), shape, rows)
    return lax.optimization_barrier(noise)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SPSAEstimate:
    """A gradient estimate as n scalars and a key; `materialize` makes the gradient of it.

    Attributes:
      loss: mean over all 2n evaluations.
      loss_plus, loss_minus: [n], at θ + ε z_j and θ - ε z_j.
      projected_grad: [n], g_j.
      key: typed key of all n directions.
      aux: what the objective returned beside the loss, averaged over the evaluations; or None.
      sampler, eps, select: the choices it was made with.
    """

    loss: Float[Array, ""]
    loss_plus: Float[Array, "n"]
    loss_minus: Float[Array, "n"]
    projected_grad: Float[Array, "n"]
    key: Array
    aux: Any
    sampler: Sampler
    eps: float = dataclasses.field(metadata={"static": True})
    select: paths.Select = dataclasses.field(default=None, metadata={"static": True})


def _accepts(function: Callable, keyword: str) -> bool:
    return keyword in inspect.signature(function).parameters


def _measure(loss_fn, params, args, view: Perturbation, loss_key, materialize_params: bool):
    """The loss at `θ + view.scale z`, in at least float32, and the aux output or None."""
    options = {"key": loss_key} if _accepts(loss_fn, "key") else {}
    if _accepts(loss_fn, "view") and not materialize_params:
        options["view"] = view
    else:
        params = _materialized(view, params)
    out = loss_fn(params, *args, **options)
    loss, aux = out if isinstance(out, tuple) else (out, None)
    if jnp.shape(loss) != ():
        raise ValueError(f"the loss must be a scalar, not an array of shape {jnp.shape(loss)}")
    return jnp.asarray(loss, jnp.promote_types(jnp.result_type(loss), jnp.float32)), aux


def _materialized(view: Perturbation, params):
    def leaf_view(leaf):
        if leaf.stacked:
            layers = jnp.arange(leaf.value.shape[0])
            return jax.vmap(lambda value, layer: view(leaf.path, value, layer))(leaf.value, layers)
        return view(leaf.path, leaf.value, leaf.layer)

    return paths.map_with_path(leaf_view, params)


def check(eps: float, num_directions: int) -> None:
    """Raises ValueError for an ε that is not positive, or no direction at all."""
    if not eps > 0:
        raise ValueError(f"eps must be positive, not {eps}")
    if num_directions < 1:
        raise ValueError(f"num_directions must be at least 1, not {num_directions}")


def spsa(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    key: Array,
    eps: float = 1e-3,
    sampler: Sampler = Gaussian(),
    num_directions: int = 1,
    select: paths.Select = None,
    materialize_params: bool = False,
) -> SPSAEstimate:
    """Estimates the gradient of a loss by central differences along random directions.

    Memory, with P the parameters: P plus one layer and its noise if `loss_fn` has a keyword `view`;
    2P if it has none, or with `materialize_params=True`.

    Args:
      loss_fn: `loss_fn(params, *args, [key], [view]) -> loss` or `(loss, aux)`, a scalar loss.
        `key` is passed if it is among the parameters, the same for all evaluations of the estimate.
      params: any pytree of arrays.
      *args: what `loss_fn` takes besides, usually one batch.
      key: typed PRNG key of this estimate.
      eps: ε, in the units of the parameters.
      sampler: distribution of z.
      num_directions: n; directions run one after another.
      select: a regular expression or predicate on paths; other parameters stay where they are.
      materialize_params: perturb a copy of the parameters even if `loss_fn` has a keyword `view`.

    Returns:
      The estimate, as scalars.

    Raises:
      ValueError: if eps is not positive, there is no direction, `select` takes nothing, or the loss
        is not a scalar.

    >>> loss = lambda params: (params["w"] ** 2).sum()
    >>> est = spsa(loss, {"w": jnp.ones(3)}, key=jax.random.key(0))
    >>> est.projected_grad.shape
    (1,)
    """
    check(eps, num_directions)
    paths.mask(params, select)
    lean = _accepts(loss_fn, "view") and not materialize_params
    over_signs = (lambda f, x: jax.vmap(f)(x)) if lean else lax.map
    signs = jnp.array([eps, -eps], jnp.float32)

    def along(direction):
        def at(scale):
            view = Perturbation(_direction_key(key, direction), scale, sampler, select)
            loss_key = jax.random.fold_in(key, 1)
            return _measure(loss_fn, params, args, view, loss_key, materialize_params)

        return over_signs(at, signs)

    losses, aux = lax.map(along, jnp.arange(num_directions))
    plus, minus = losses[:, 0], losses[:, 1]
    return SPSAEstimate(
        loss=losses.mean(),
        loss_plus=plus,
        loss_minus=minus,
        projected_grad=(plus - minus) / (signs[0] - signs[1]),
        key=key,
        aux=jax.tree.map(lambda x: x.astype(jnp.result_type(x, jnp.float32)).mean((0, 1)), aux),
        sampler=sampler,
        eps=eps,
        select=select,
    )


def _direction_key(key: Array, direction) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, 0), direction)


def gradient_block(
    est: SPSAEstimate, path: str, shape, layer=None, rows: prng.Rows = None
) -> Float[Array, "..."]:
    """`1/n Σ_j g_j z_j` for a leaf of the given shape, or some of its rows, at least in float32."""
    count = est.projected_grad.shape[0]

    def term(j):
        z = _direction(_direction_key(est.key, j), est.sampler, path, shape, layer, rows)
        return est.projected_grad[j] / count * z

    if count == 1:
        return term(0)
    return lax.fori_loop(1, count, lambda j, total: total + term(j), term(0))


def materialize(est: SPSAEstimate, params: Any) -> Any:
    """Returns the gradient estimate `1/n Σ_j g_j z_j` as a pytree like `params`.

    Parameters that the estimate did not perturb get zeros. For optimizers that need a gradient in
    memory; `jaxlm.zo.mezo` updates in place without it.
    """
    takes = paths.chooser(est.select)

    def gradient(leaf):
        if not takes(leaf.path, leaf.value):
            return jnp.zeros_like(leaf.value)
        if leaf.stacked:
            count, *shape = leaf.value.shape
            block = functools.partial(gradient_block, est, leaf.path, tuple(shape))
            return lax.map(block, jnp.arange(count)).astype(_wide(leaf.value))
        whole = gradient_block(est, leaf.path, leaf.value.shape, leaf.layer)
        return whole.astype(_wide(leaf.value))

    return paths.map_with_path(gradient, params)


def _wide(leaf):
    return jnp.promote_types(leaf.dtype, jnp.float32)


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    eps: float = 1e-3,
    has_aux: bool = False,
    sampler: Sampler = Gaussian(),
    num_directions: int = 1,
    select: paths.Select = None,
) -> Callable[..., Any]:
    """A drop-in for `jax.value_and_grad` that uses forward passes alone.

    Returns:
      `f(params, *args, key) -> (loss, grads)`, or `((loss, aux), grads)` with `has_aux`, where
      `loss` is the mean over both signs and `grads` is like `params`. See `spsa` for the arguments.
    """

    def function(params, *args, key):
        est = spsa(
            loss_fn,
            params,
            *args,
            key=key,
            eps=eps,
            sampler=sampler,
            num_directions=num_directions,
            select=select,
        )
        return ((est.loss, est.aux) if has_aux else est.loss), materialize(est, params)

    return function

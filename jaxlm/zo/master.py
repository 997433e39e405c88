"""A float32 copy of the parameters, for updates that are smaller than half precision can hold."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import paths
from jaxlm.zo.optimizers import ZerothOrderOptimizer, as_they_are


class MasterMemory(NamedTuple):
    """What `float32_master` puts in `ZerothOrderState.memory`.

    Attributes:
      rule: the memory of the update rule.
      params: the selected parameters in at least float32, None in place of the others.
    """

    rule: Any
    params: Any


def float32_master(opt: ZerothOrderOptimizer) -> ZerothOrderOptimizer:
    r"""Moves a float32 copy of the parameters, of which the parameters are the rounding.

    $m \leftarrow m - \eta (u + \lambda m)$, $\theta = \mathrm{round}(m)$: losses are measured at
    θ, no part of an update is lost, and `moved_fraction` is that of m. The copy is of the selected
    parameters and stands in the state: 4 bytes for each beside the 2 of θ.

    Args:
      opt: the optimizer that moves the copy.

    Returns:
      An optimizer of the same steps, updates and settings.

    Raises:
      ValueError: if opt keeps what it adds beside the parameters, as `lozo_residual` does.

    >>> from jaxlm import zo
    >>> opt = float32_master(zo.mezo(1e-5, eps=0.1))
    >>> params = {"w": jnp.ones(3, jnp.bfloat16)}
    >>> state = opt.init(params, jax.random.key(0))
    >>> loss = lambda params, batch: params["w"].astype(jnp.float32).sum()
    >>> params, state, info = opt.step(loss, params, state, None)
    >>> params["w"].dtype.name, state.memory.params["w"].dtype.name, float(info.moved_fraction)
    ('bfloat16', 'float32', 1.0)
    """
    if opt.finalize is not as_they_are:
        raise ValueError(
            "float32_master takes no optimizer that has a residual: lozo_residual alone keeps "
            "small steps"
        )

    def unwrapped(state):
        return state._replace(memory=state.memory.rule)

    def init(params, key):
        master = jax.tree.map(_wide, paths.split(params, opt.select)[0])
        state = opt.init(paths.merge(master, params), key)
        return state._replace(memory=MasterMemory(state.memory, master))

    def step(loss_fn, params, state, batch):
        # What this step makes of the rounded parameters is not used, and not compiled.
        _, measured, info = opt.step(loss_fn, params, unwrapped(state), batch)
        params, state, moved = update(params, state, info.projected_grad, info.learning_rate)
        state = state._replace(loss_plus=measured.loss_plus, known=measured.known)
        return params, state, info._replace(moved_fraction=moved)

    def update(params, state, projected_grad, learning_rate=None):
        whole = paths.merge(state.memory.params, params)
        whole, new, moved = opt.update(whole, unwrapped(state), projected_grad, learning_rate)
        master, _ = paths.split(whole, opt.select)
        low, rest = paths.split(params, opt.select)
        params = paths.merge(jax.tree.map(lambda x, m: m.astype(x.dtype), low, master), rest)
        return params, new._replace(memory=MasterMemory(new.memory, master)), moved

    settings = opt.settings | {"master": "float32"}
    return opt._replace(init=init, step=step, update=update, settings=settings)


def _wide(leaf):
    """A copy, never the leaf itself: both are donated to one step."""
    return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))

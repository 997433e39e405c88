"""A float32 copy of the parameters, for updates that half precision would round away."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import paths
from jaxlm.core.dtypes import wide_dtype
from jaxlm.core.errors import UserError
from jaxlm.zo.optimizers import ZerothOrderOptimizer, unchanged


class MasterMemory(NamedTuple):
    """The `ZerothOrderState.memory` of `float32_master`.

    Attributes:
      rule: state of the update rule.
      params: the selected parameters in at least float32, None in place of the others.
    """

    rule: Any
    params: Any


def float32_master(opt: ZerothOrderOptimizer) -> ZerothOrderOptimizer:
    r"""Move a float32 copy m of the parameters, and round the parameters from it.

    $m \leftarrow m - \eta (u + \lambda m)$, $\theta = \mathrm{round}(m)$. Losses are measured at θ,
    no part of an update is lost, and `moved_fraction` counts m. The state holds the copy of the
    selected parameters: 4 bytes for each, beside the 2 of θ.

    Args:
      opt: the optimizer that moves the copy.

    Returns:
      An optimizer with the same steps, updates and settings.

    Raises:
      UserError: if `opt` keeps a residual beside the parameters, as `lozo_residual` does.

    >>> from jaxlm import zo
    >>> opt = float32_master(zo.mezo(1e-5, eps=0.1))
    >>> params = {"w": jnp.ones(3, jnp.bfloat16)}
    >>> state = opt.init(params, jax.random.key(0))
    >>> loss = lambda params, batch: params["w"].astype(jnp.float32).sum()
    >>> params, state, info = opt.step(loss, params, state, None)
    >>> params["w"].dtype.name, state.memory.params["w"].dtype.name, float(info.moved_fraction)
    ('bfloat16', 'float32', 1.0)
    """
    if opt.finalize is not unchanged:
        raise UserError(
            "opt: must not keep a residual under float32_master (got the rule "
            f"{opt.settings['rule']}). Use it alone: it loses no small steps."
        )

    def unwrapped(state):
        return state._replace(memory=state.memory.rule)

    def init(params, key):
        master = jax.tree.map(_wide, paths.split(params, opt.select)[0])
        state = opt.init(paths.merge(master, params), key)
        return state._replace(memory=MasterMemory(state.memory, master))

    def step(loss_fn, params, state, batch):
        # Only the slopes are used. XLA removes the update of the rounded parameters as dead code.
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
    # Always a copy, since a step donates both the leaf and the copy.
    return jnp.array(leaf, wide_dtype(leaf))

"""The arguments that all methods share, checked: the kind, and Adam's moments in an optax state."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.kernels import gram


def features_of(
    kind: str,
    params: Any,
    select: paths.Select,
    sign_threshold: float | int | None,
    adam_state: Any,
    b1: float | int,
    b2: float | int,
    eps: float | int,
) -> gram.Features:
    """The features of a kind, from the arguments of the public functions.

    Raises:
      UserError: for an unknown kind, a threshold outside [0, 1), a state without Adam's moments of
        every selected leaf, one where none is used, or none where one is.
    """
    if kind not in gram.KINDS:
        raise UserError(f"kind={kind!r} is not known; give one of {', '.join(gram.KINDS)}")
    if sign_threshold is not None and not 0 <= sign_threshold < 1:
        raise UserError(f"sign_threshold={sign_threshold} is impossible; give 0 <= τ < 1 or None")
    if (adam_state is None) == (kind == "adam"):
        raise UserError(
            "kind='adam' needs adam_state, the state of an optax chain with scale_by_adam"
            if kind == "adam"
            else f"adam_state is given, but kind={kind!r} does not use it; give kind='adam'"
        )
    threshold = None if sign_threshold is None else float(sign_threshold)
    moments = None if adam_state is None else _moments(params, select, adam_state, b1, b2, eps)
    return gram.Features(moments, kind, threshold)


def _moments(params, select, state, b1, b2, eps) -> gram.Moments:
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise UserError(f"{name}={value} is impossible; give 0 <= {name} < 1")
    found = _adam_states(state)
    if not found:
        raise UserError(
            "adam_state has no ScaleByAdamState; give the state of an optax chain with adam, adamw "
            "or scale_by_adam"
        )
    tables = [
        [{(leaf.path, leaf.layer): leaf.value for leaf in paths.flatten(tree)[0]} for tree in pair]
        for pair in ((each.mu, each.nu) for each in found)
    ]
    first, second, counts = [], [], []
    for leaf in paths.flatten(paths.split(params, select)[0])[0]:
        place = (leaf.path, leaf.layer)
        having = [i for i, (mu, _) in enumerate(tables) if place in mu]
        if len(having) != 1:
            raise UserError(
                f"adam_state has {len(having)} moments of {leaf.path}; "
                + ("give one state" if having else "leave it out by select")
            )
        mu, nu = (table[place] for table in tables[having[0]])
        if jnp.shape(mu) != jnp.shape(leaf.value):
            raise UserError(
                f"adam_state has moments of shape {jnp.shape(mu)} for {leaf.path}, which is "
                f"{jnp.shape(leaf.value)}; give the state of these parameters"
            )
        slices = leaf.value.shape[0] if leaf.stacked else 1
        first.append(jnp.reshape(mu, (slices, -1)))
        second.append(jnp.reshape(nu, (slices, -1)))
        counts.append(having[0])
    if len(set(counts)) > 1:
        raise UserError("adam_state has several ScaleByAdamStates; select what one of them trains")
    count = jnp.asarray(found[counts[0]].count, jnp.result_type(float))
    return gram.Moments(first, second, count, float(b1), float(b2), float(eps))


def _adam_states(state) -> list[Any]:
    from optax import ScaleByAdamState

    def is_adam(node):
        return isinstance(node, ScaleByAdamState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]

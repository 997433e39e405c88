"""The arguments that all methods share, checked: the kind, and Adam's moments in an optax state."""

from typing import Any

import jax.numpy as jnp

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.gradients import adam
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
    adam.check(adam.Constants(b1, b2, eps))
    first, second, count = adam.moments(state, params, select)
    leaves = paths.flatten(paths.split(params, select)[0])[0]
    slices = [leaf.value.shape[0] if leaf.stacked else 1 for leaf in leaves]
    first, second = (
        [jnp.reshape(a, (n, -1)) for a, n in zip(side, slices, strict=True)]
        for side in (first, second)
    )
    count = jnp.asarray(count, jnp.result_type(float))
    return gram.Moments(first, second, count, float(b1), float(b2), float(eps))

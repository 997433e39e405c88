"""Type aliases of the public functions: parameters, batches, losses, keys."""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, Key, PyTree

Params: TypeAlias = PyTree
"""Parameters: a nested dict of arrays, or any other pytree that a model reads."""

Batch: TypeAlias = PyTree
"""One batch of data: a pytree whose leaves share their leading axis."""

PRNGKey: TypeAlias = Key[Array, ""]
"""One typed random key, as made by `jax.random.key`."""

LossFn: TypeAlias = Callable[..., Any]
"""`(params, batch, *, key=None, view=None) -> loss` or `(loss, aux)`.

Only `params` and `batch` are required: a keyword that the function does not take is not passed.
"""

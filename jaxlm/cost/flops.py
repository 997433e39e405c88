"""FLOPs of a function, counted on its jaxpr; the body of a loop counts as often as it runs.

The compiler's own count takes the body of a loop once, so a scan over 24 layers would seem to cost
one layer.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr

from jaxlm.core.taps import traces_in


class Flops(NamedTuple):
    """Operations on numbers.

    Attributes:
        products: of matrix products and convolutions; a multiplication with its addition counts 2.
        others: of all other operations, 1 for each element of the result or of a reduced operand.
    """

    products: int = 0
    others: int = 0

    @property
    def total(self) -> int:
        """Products and others together."""
        return self.products + self.others

    def plus(self, other: "Flops", times: int = 1) -> "Flops":
        """Return `self + times * other`."""
        return Flops(self.products + times * other.products, self.others + times * other.others)


def count_flops(function: Callable[..., Any], *args: Any) -> Flops:
    """Count the operations of `function(*args)`, which need only have shapes, without running it.

    A conditional counts as its largest branch. The body of a `while_loop` counts once, since its
    trip count depends on the data. A `shard_map` counts for all its devices together.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> count_flops(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=5)[0], x).products
    5120
    """
    return _jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr(jaxpr: Jaxpr) -> Flops:
    total = Flops()
    for equation in jaxpr.eqns:
        total = total.plus(_equation(equation))
    return total


def _equation(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name in _FREE:
        return Flops()
    if name in _PRODUCTS:
        return Flops(products=_PRODUCTS[name](equation))
    if name.startswith(_REDUCED):
        return Flops(others=_size(equation.invars[0]))
    if name.startswith("scatter"):
        return Flops(others=_size(equation.invars[2]))  # the updates
    if name == "cond":
        branches = [_jaxpr(branch.jaxpr) for branch in params["branches"]]
        return max(branches, key=lambda branch: branch.total)
    inner = list(traces_in(equation))
    if inner:
        total = Flops()
        for jaxpr in inner:
            total = total.plus(_jaxpr(jaxpr), times=_turns(name, params))
        return total
    return Flops(others=sum(map(_size, equation.outvars)))


def _turns(name: str, params: dict[str, Any]) -> int:
    """Return how often the jaxprs in an equation run."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        mesh = params["mesh"]
        return math.prod(mesh.shape[axis] for axis in params.get("manual_axes", mesh.shape))
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _size(var: Any) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * _size(equation.outvars[0]) * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    kernel = equation.invars[1].aval.shape
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * _size(equation.outvars[0]) * (math.prod(kernel) // features)


def _cholesky(equation: Any) -> int:
    *_, size = equation.invars[0].aval.shape
    return _size(equation.invars[0]) * size // 3


def _triangular(equation: Any) -> int:
    left = equation.params["left_side"]
    return _size(equation.invars[1]) * equation.invars[1].aval.shape[-2 if left else -1]


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "cholesky": _cholesky,
    "triangular_solve": _triangular,
}
_REDUCED = ("reduce", "arg", "cum", "sort")  # one operation for each element of the operand
_FREE = frozenset(
    (
        *("all_gather", "all_to_all", "axis_index", "bitcast_convert_type", "broadcast_in_dim"),
        *("concatenate", "convert_element_type", "copy", "copy_p", "device_put", "dynamic_slice"),
        *("dynamic_update_slice", "expand_dims", "gather", "iota", "layout_constraint", "name"),
        *("optimization_barrier", "pad", "pcast", "ppermute", "pvary", "random_unwrap"),
        *("random_wrap", "reduce_precision", "reshape", "reshard", "rev", "scatter"),
        *("sharding_constraint", "slice", "split", "squeeze", "stack", "stop_gradient"),
        *("transpose", "unstack"),
    )
)

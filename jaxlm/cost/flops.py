"""What a function computes, counted on its jaxpr: loops as often as they turn.

The compiler's own count takes the body of a loop once, so that a scan over 24 layers would seem to
cost one of them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


class Flops(NamedTuple):
    """Operations on numbers.

    Attributes:
        products: of matrix products and convolutions, 2 for a multiplication with its addition.
        others: of all else that computes: 1 for an element of the result, or of what is reduced.
    """

    products: int = 0
    others: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.products + self.others

    def plus(self, other: "Flops", times: int = 1) -> "Flops":
        """The sum with `times` as much as `other`."""
        return Flops(self.products + times * other.products, self.others + times * other.others)


def count_flops(function: Callable[..., Any], *args: Any) -> Flops:
    """Counts the operations of `function(*args)` without running it.

    Of a conditional the branch with the most counts. A `while_loop` whose trip count only the data
    tell counts once, and so do calls of foreign code. Of a `shard_map` all devices count together.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> count_flops(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=5)[0], x).products
    5120

    Args:
      function: anything that JAX can trace.
      args: arrays or `jax.ShapeDtypeStruct`s.
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
    inner = _inner(params)
    if inner:
        total = Flops()
        for jaxpr in inner:
            total = total.plus(_jaxpr(jaxpr), times=_turns(name, params))
        return total
    return Flops(others=sum(map(_size, equation.outvars)))


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    values = [each for value in params.values() for each in _several(value)]
    closed = [each.jaxpr if isinstance(each, ClosedJaxpr) else each for each in values]
    return [each for each in closed if isinstance(each, Jaxpr)]


def _several(value: Any) -> tuple[Any, ...] | list[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _turns(name: str, params: dict[str, Any]) -> int:
    """How often the jaxprs in an equation are run."""
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
_REDUCED = ("reduce", "arg", "cum", "sort")  # an operation for an element of the operand
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

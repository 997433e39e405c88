"""Compile user functions: trace them for each `Program`, compile once for each distinct trace.

`jax.jit` identifies a function by object identity. Closed-over values, and the attributes of a
bound method's object, are read at the first trace and never again. A library that compiles user
functions must see later changes of them, so here each `Program` makes a new trace, and the trace
itself is the key of the compiled program.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

KEPT = 64
"""Largest number of compiled programs in the cache."""

_compiled: OrderedDict[Any, Any] = OrderedDict()


def is_array(leaf: Any) -> bool:
    """Return whether a leaf is an array, or a Python float that acts as one."""
    if isinstance(leaf, float):
        return True
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "biufcV"  # V: the narrow floats of ml_dtypes
    return isinstance(leaf, jax.Array)


def held(function: Callable[..., Any], params: Any) -> tuple[Callable[..., Any], Any]:
    """Return a function of only the arrays in `params`, and `params` with None for other leaves.

    The other leaves keep their present values. The function, with the same signature
    `function(params, *args, **options)`, is a new object, so that no cache of JAX confuses it with
    an earlier one.

    >>> function, arrays = held(lambda p, x: p["f"](p["w"] * x), {"w": 2.0, "f": jnp.tanh})
    >>> arrays["f"] is None, float(function(arrays, 0.0))
    (True, 0.0)
    """
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(params)
    rest = [None if is_array(leaf) else leaf for leaf in leaves]
    arrays = [jnp.asarray(leaf) if is_array(leaf) else None for leaf in leaves]

    @functools.wraps(function, updated=())
    def fresh(arrays, *args, **options):
        given = structure.flatten_up_to(arrays)
        merged = [a if b is None else b for a, b in zip(given, rest, strict=True)]
        return function(structure.unflatten(merged), *args, **options)

    return fresh, structure.unflatten(arrays)


def has_values(*trees: Any) -> bool:
    """Return whether no leaf is a tracer, so that values can be inspected."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


class Program:
    """A function of arrays, traced once for each set of shapes; with tracers it is just called."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._traced: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        if not has_values(args):
            return self._function(*args)
        leaves, structure = jax.tree.flatten(args)
        shapes = (structure, *map(jax.typeof, leaves))
        if shapes not in self._traced:
            self._traced[shapes] = _traced(self._function, args)
        return self._traced[shapes](leaves)


def _traced(function: Callable[..., Any], args: Any) -> Callable[..., Any]:
    # A new lambda, since JAX caches traces by the identity of the function.
    closed, shapes = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    key = _as_value(closed.jaxpr)
    if key not in _compiled:
        # Arrays that the function closes over become arguments, since they may change.
        _compiled[key] = (
            closed.jaxpr,
            jax.jit(lambda consts, leaves: jax.core.eval_jaxpr(closed.jaxpr, consts, *leaves)),
        )
    _compiled.move_to_end(key)
    while len(_compiled) > KEPT:
        _compiled.popitem(last=False)
    program, structure = _compiled[key][1], jax.tree.structure(shapes)
    return lambda leaves: jax.tree.unflatten(structure, program(closed.consts, leaves))


_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "checkpoint", "remat2")
"""Primitives whose parameters hold rules for differentiation, batching or memory.

A finished trace no longer uses these rules, and they are new objects in every trace.
"""


def _as_value(part: Any) -> Any:
    """Return a hashable value that is equal for traces that compute the same.

    Objects in the trace that cannot be compared count by identity, which is not reused: the cache
    keeps the trace alive.
    """
    if isinstance(part, core.ClosedJaxpr):
        return _as_value(part.jaxpr), tuple(map(_as_value, part.consts))
    if isinstance(part, core.Jaxpr):
        return _equations(part)
    if isinstance(part, np.ndarray | np.generic):
        return str(part.dtype), part.shape, part.tobytes()
    if isinstance(part, tuple | list):
        return tuple(map(_as_value, part))
    if isinstance(part, dict):
        return tuple((name, _as_value(part[name])) for name in sorted(part, key=str))
    if isinstance(part, float | complex):
        return type(part), repr(part)  # so that NaN equals itself, and 0.0 differs from -0.0
    try:
        hash(part)
    except TypeError:
        return "object", id(part)
    return type(part), part


def _equations(jaxpr: Any) -> Any:
    numbers: dict[Any, int] = {}

    def of(variable):
        if isinstance(variable, core.Literal):
            return variable.aval, np.asarray(variable.val).tobytes()
        return numbers.setdefault(variable, len(numbers)), variable.aval

    rows = [tuple(map(of, (*jaxpr.constvars, *jaxpr.invars)))]
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        params = {
            key: value
            for key, value in equation.params.items()
            if name not in _RULES or isinstance(value, core.Jaxpr | core.ClosedJaxpr)
        }
        sides = (tuple(map(of, side)) for side in (equation.invars, equation.outvars))
        rows.append((equation.primitive, *sides, _as_value(params)))
    rows.append(tuple(map(of, jaxpr.outvars)))
    return tuple(rows)

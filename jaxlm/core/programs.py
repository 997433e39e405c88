"""Functions of a user, traced at every call and compiled once for each trace.

`jax.jit` knows a function by its identity, and goes on with what it closed over, or with what the
object of a bound method had, when it was first traced. A library that compiles a function which it
was given must not: here the trace itself, made anew, is what a compiled program is found by.
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
"""Compiled programs, at most."""

_compiled: OrderedDict[Any, Any] = OrderedDict()


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is an array, or a Python float that stands for one.

    Functions, texts, sizes and switches, of which modules of Equinox have many, are not.
    """
    if isinstance(leaf, float):
        return True
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "biufcV"  # V: the narrow floats of ml_dtypes
    return isinstance(leaf, jax.Array)


def held(function: Callable[..., Any], params: Any) -> tuple[Callable[..., Any], Any]:
    """A function of the arrays of `params` alone, and these; all else is as it is now.

    The function is a new one, so that no cache of JAX takes it for an earlier one.

    Args:
      function: `function(params, *args, **options)`.
      params: any pytree.

    Returns:
      The function, with the signature of the given one; and `params` with None for what is no
      array.

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
    """Whether all arrays have values, so that they can be looked at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


class Program:
    """A function of arrays that is traced once for their shapes; within a trace it is itself."""

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
    closed, shapes = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    key = _as_value(closed.jaxpr)
    if key not in _compiled:
        # The arrays that the function closes over are arguments: they may be others next time.
        _compiled[key] = (
            closed.jaxpr,
            jax.jit(lambda consts, leaves: jax.core.eval_jaxpr(closed.jaxpr, consts, *leaves)),
        )
    _compiled.move_to_end(key)
    while len(_compiled) > KEPT:
        _compiled.popitem(last=False)
    program, structure = _compiled[key][1], jax.tree.structure(shapes)
    return lambda leaves: jax.tree.unflatten(structure, program(closed.consts, leaves))


RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "checkpoint", "remat2")
"""Primitives with rules for derivatives, batches or memory, which a finished trace is past."""


def _as_value(part: Any) -> Any:
    """A trace as something to compare: equal where the same is computed from the arguments.

    What the trace holds beside equations counts by its value, or else by its identity; the cache
    keeps the trace, so that no identity is used twice.
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
        return type(part), repr(part)  # a NaN is itself, and 0.0 is not -0.0
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
            if name not in RULES or isinstance(value, core.Jaxpr | core.ClosedJaxpr)
        }
        sides = (tuple(map(of, side)) for side in (equation.invars, equation.outvars))
        rows.append((equation.primitive, *sides, _as_value(params)))
    rows.append(tuple(map(of, jaxpr.outvars)))
    return tuple(rows)

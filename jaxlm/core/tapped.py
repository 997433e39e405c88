"""Which parameters a function uses where its tap stands, how often, and with which shapes.

Every use is marked by a name in the trace of the function, where those that a loop repeats can be
counted; the trace also says which parameters matter at all.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.core.programs import Program

Key = tuple[str, str]
"""Path and op of a use: a table that is tied to the head has two."""


class Use(NamedTuple):
    """How a function uses a parameter.

    Attributes:
      x, y: shapes and dtypes of what goes in and comes out; ids count as float32.
      rows: of the ids of a restricted head, or None.
      stacked: whether it is used in a layer.
      times: how often, over all layers.
    """

    x: jax.ShapeDtypeStruct
    y: jax.ShapeDtypeStruct
    rows: jax.ShapeDtypeStruct | None
    stacked: bool
    times: int


MARK = "tap "


class _Recorder:
    """Notes the shapes that pass, and marks the uses in the trace so that they can be counted."""

    layers = None

    def __init__(self):
        self.seen: dict[Key, Use] = {}

    def __call__(self, path, op, x, y, layer, *, rows=None):
        ids = None if rows is None else jax.ShapeDtypeStruct(jnp.shape(rows), jnp.float32)
        shape = jax.ShapeDtypeStruct(x.shape, carrier(x))
        self.seen[path, op] = Use(
            shape, jax.ShapeDtypeStruct(y.shape, y.dtype), ids, layer is not None, 0
        )
        return checkpoint_name(y, f"{MARK}{path} {op}")


def carrier(x: Any) -> Any:
    """The dtype that factors carry `x` in: ids become exact integers in float32."""
    return jnp.float32 if jnp.issubdtype(x.dtype, jnp.integer) else x.dtype


def uses(f: Callable[..., Array], params: Any, x: Any) -> dict[Key, Use]:
    """The uses of parameters that pass a tap.

    Args:
      f: `f(params, x, *, tap)`.
      params, x: arrays or their shapes.
    """
    recorder = _Recorder()
    traced = jax.make_jaxpr(lambda params, x: f(params, x, tap=recorder))(params, x)
    counts: Counter[str] = Counter()
    for name, times in _marks(traced.jaxpr, 1):
        counts[name] += times
    return {
        (path, op): use._replace(times=counts[f"{MARK}{path} {op}"])
        for (path, op), use in recorder.seen.items()
    }


def read(f: Callable[..., Any], params: Any, x: Any) -> set[str]:
    """Paths of the parameters that the value of f depends on, by its trace.

    Args:
      f: `f(params, x)`.
      params, x: arrays or their shapes.
    """
    jaxpr = jax.make_jaxpr(f)(params, x).jaxpr
    reached = _reached(jaxpr)
    pairs = zip(paths.flatten(params)[0], jaxpr.invars, strict=False)
    return {leaf.path for leaf, variable in pairs if variable in reached}


def check_ids(f: Callable[..., Any], params: Any, x: Any, name: str) -> None:
    """Checks the ids that f looks up outside layers, where a table would give another row.

    Args:
      f: `f(params, x, *, tap)`.
      params, x: arrays with values.
      name: of x, for messages.

    Raises:
      UserError: naming an example with an id that is no row of its table.
    """

    def run(params, x):
        seen: dict[str, Array] = {}

        def tap(path, op, x, y, layer, *, rows=None):
            del rows
            if op == "embed" and layer is None:
                seen[path] = x
            return y

        tap.layers = None  # type: ignore[attr-defined]
        f(params, x, tap=tap)
        return seen

    shapes = {leaf.path: jnp.shape(leaf.value) for leaf in paths.flatten(params)[0]}
    for path, ids in Program(run)(params, x).items():
        if path not in shapes or not ids.is_fully_addressable:  # no process has all ids
            continue
        size, ids = shapes[path][0], np.asarray(ids)
        wrong = np.argwhere((ids < 0) | (ids >= size))
        if len(wrong):
            at = tuple(wrong[0])
            raise UserError(
                f"{name}: ids of {path} must be from 0 to {size - 1} (got {ids[at]} in example "
                f"{at[0]}). Is the tokenizer that of the model?"
            )


def _reached(jaxpr) -> set[Any]:
    """The variables of a trace on which an output depends."""
    found = {variable for variable in jaxpr.outvars if not isinstance(variable, Literal)}
    for equation in reversed(jaxpr.eqns):
        if found.isdisjoint(equation.outvars):
            continue
        taken = equation.invars
        inner = list(_inner(equation))
        if len(inner) == 1 and len(inner[0].invars) == len(taken):  # a scan, or a call
            needed = _reached(inner[0])
            pairs = zip(taken, inner[0].invars, strict=True)
            taken = [outer for outer, variable in pairs if variable in needed]
        found.update(v for v in taken if not isinstance(v, Literal))
    return found


def _inner(equation) -> Iterator[Any]:
    """The traces in an equation."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield inner


def _marks(jaxpr, times) -> Iterator[tuple[str, int]]:
    """Each marked name in a trace, with how often it runs (for a loop of unknown length, twice)."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "name":
            yield equation.params["name"], times
        again = {"scan": equation.params.get("length"), "while": 2}.get(name, 1)
        for inner in _inner(equation):
            yield from _marks(inner, times * again)

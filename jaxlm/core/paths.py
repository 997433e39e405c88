"""Every parameter has a path: `layers.attention.q_proj.kernel`.

Selection, noise, sharding, weight decay and export all speak of these strings. A model that keeps
its layers in one array declares so (`declare_stacked`); every other tree is read as it stands, what
it calls `layers` too. Where such a model has a list of layers instead, the index after `layers`
is taken out of the path, so that both trees name a parameter alike.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core.errors import UserError
from jaxlm.core.patterns import searcher

LAYERS = "layers"
Select = str | Callable[[str], bool] | None

_INDEX = re.compile("0|[1-9][0-9]{0,8}")
_AXES: dict[str, set[int]] = {}


class Leaf(NamedTuple):
    """One leaf of a parameter tree.

    Attributes:
      path: dotted path; without the index of the layer where the model is declared.
      layer: that index, or None.
      stacked: whether axis 0 of the value runs over layers.
      value: the leaf.
    """

    path: str
    layer: int | None
    stacked: bool
    value: Any


def declare_stacked(axes: Mapping[str, int]) -> None:
    """Declares leaves that have the layers of a model as their first axis.

    Call it once, beside the model; like the registration of a pytree node it holds for the whole
    process. A leaf is stacked if it has this path and one axis more than one layer has, so that
    `{"layers": {"mlp": {"kernel": [in, out]}}}` stays a tree of plain matrices.

    Args:
      axes: path from `layers` on -> number of axes of one layer's value.

    Raises:
      UserError: if a path does not begin with `layers`, or a number is negative.

    >>> declare_stacked({"layers.block.kernel": 2, "layers.block.bias": 1})
    >>> [leaf] = flatten({"layers": {"block": {"kernel": jnp.ones((12, 8, 8))}}})[0]
    >>> leaf.stacked
    True
    """
    for path, count in axes.items():
        if not path.startswith(LAYERS + ".") or count < 0:
            raise UserError(
                f"{path}: stacked leaves have a path that begins with {LAYERS!r} and an axis for "
                f"layers (got {count} axes of one layer). Give paths such as 'layers.mlp.kernel'."
            )
    for path, count in axes.items():
        _AXES.setdefault(path, set()).add(count)


def _own_models() -> dict[str, int]:
    norms = ["attention_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm"]
    norms += ["attention.q_norm", "attention.k_norm"]
    dense = [f"attention.{name}_proj" for name in "qkvo"]
    dense += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    matrices = ["kernel", "kernel.values", "kernel.scale", "lora_a", "lora_b"]
    return {
        **{f"{LAYERS}.{path}.{part}": 1 for path in norms for part in ("scale", "bias")},
        **{f"{LAYERS}.{path}.{part}": 2 for path in dense for part in matrices},
        **{f"{LAYERS}.{path}.bias": 1 for path in dense},
        **{f"{LAYERS}.attention.prefix_{part}": 3 for part in ("keys", "values")},
    }


# Here and not in `jaxlm.models`, or a tree would be read by what else has been imported.
declare_stacked(_own_models())


def _names(key_path) -> Iterator[str]:
    for entry in key_path:
        for attribute in ("key", "idx", "name"):
            if hasattr(entry, attribute):
                yield str(getattr(entry, attribute))
                break
        else:
            yield str(entry)


def _without_index(names: list[str]) -> tuple[list[str], int | None]:
    """The names, and the index after `layers` apart from them."""
    after = names.index(LAYERS) + 1 if LAYERS in names else len(names)
    if after < len(names) and _INDEX.fullmatch(names[after]):
        return names[:after] + names[after + 1 :], int(names[after])
    return names, None


def _axes(names: list[str]) -> set[int]:
    """How many axes one layer of a declared leaf has; empty for all others."""
    return _AXES.get(".".join(names[names.index(LAYERS) :]), set()) if LAYERS in names else set()


def _leaf(key_path, value) -> Leaf:
    names = list(_names(key_path))
    rest, layer = _without_index(names)
    if layer is not None and _axes(rest):
        return Leaf(".".join(rest), layer, False, value)
    path = ".".join(names)
    return Leaf(path, None, is_stacked(path, getattr(value, "ndim", 0)), value)


def is_stacked(path: str, ndim: int) -> bool:
    """Whether a leaf with so many axes is declared to have the layers as the first of them."""
    return ndim - 1 in _axes(path.split("."))


def is_declared(path: str) -> bool:
    """Whether a path is that of a declared leaf, or of a part of one."""
    names = path.split(".")
    return any(_axes(names[:count]) for count in range(len(names), 0, -1))


def identity(path: str, layer: Any = None) -> tuple[str, Any]:
    """What noise is drawn by: a path without the index of a layer, and that index or None.

    It is the same for a stack and for a list of layers, declared or not.

    >>> identity("layers.3.kernel"), identity("layers.kernel", 3), identity("blocks.3.kernel")
    (('layers.kernel', 3), ('layers.kernel', 3), ('blocks.3.kernel', None))
    """
    if layer is not None:
        return path, layer
    names, index = _without_index(path.split("."))
    return ".".join(names), index


def indexed(path: str, layer: int | None) -> str:
    """Inverse of `identity`: the path with the index of the layer in it.

    >>> indexed("layers.kernel", 3), indexed("head.kernel", None)
    ('layers.3.kernel', 'head.kernel')
    """
    if layer is None:
        return path
    names = path.split(".")
    after = names.index(LAYERS) + 1
    return ".".join([*names[:after], str(layer), *names[after:]])


def flatten(tree) -> tuple[list[Leaf], Any]:
    """Returns the leaves of `tree` with their paths, in pytree order, and the tree's structure.

    >>> leaves, _ = flatten({"blocks": [{"w": 1}, {"w": 2}], "head": {"w": 3}})
    >>> [leaf.path for leaf in leaves]
    ['blocks.0.w', 'blocks.1.w', 'head.w']
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [_leaf(key_path, value) for key_path, value in leaves], structure


def map_with_path(function: Callable[..., Any], tree, *rest):
    """Maps `function(leaf, *others)` over the `Leaf`s of `tree` and the plain values of `rest`."""
    leaves, structure = flatten(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    return structure.unflatten(function(*items) for items in zip(leaves, *others, strict=True))


def path_hash(path: str) -> int:
    """A stable 32-bit hash of a path (CRC-32 of its UTF-8 bytes), the same on every machine."""
    return zlib.crc32(path.encode())


def check_unique_hashes(tree) -> None:
    """Raises UserError if two leaves of `tree` would share noise: by their path, or by its hash."""
    hashes: dict[int, str] = {}
    layers: dict[str, set[Any]] = {}
    for leaf in flatten(tree)[0]:
        path, layer = identity(leaf.path, leaf.layer)
        other = hashes.setdefault(path_hash(path), path)
        if other != path:
            raise UserError(
                f"{path}: {other!r} and {path!r} share a hash and would share their noise. Rename "
                "one of them."
            )
        own, taken = "all" if leaf.stacked else layer, layers.setdefault(path, set())
        if own in taken or (taken and "all" in {own, *taken}):
            raise UserError(
                f"{indexed(path, layer)}: two parameters have this path and would share their "
                "noise. Rename one of them."
            )
        taken.add(own)


def matcher(select: Select) -> Callable[[str], bool]:
    """Turns a selection into a predicate on paths.

    Args:
      select: None for every path, a regular expression searched in the path, or a predicate.
    """
    if select is None:
        return lambda path: True
    if callable(select):
        return select
    return searcher(select, "select")


def chooser(select: Select) -> Callable[[str, Any], bool]:
    """Like `matcher`, of path and leaf; what is not a non-empty array of floats is never taken.

    The predicate raises UserError at a complex leaf that `select` takes.
    """
    takes = matcher(select)

    def chosen(path: str, leaf: Any) -> bool:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or leaf.size == 0 or not jnp.issubdtype(dtype, jnp.inexact):
            return False
        if takes(path) and jnp.issubdtype(dtype, jnp.complexfloating):
            raise UserError(
                f"{path}: parameters are real numbers (got {dtype}). Leave it out by `select`, or "
                "keep its real and imaginary parts as two arrays."
            )
        return takes(path)

    return chosen


def mask(tree, select: Select):
    """Returns a tree of Python booleans, True where `select` takes the path of a leaf of floats.

    Raises:
      UserError: if nothing is selected, and the message lists some paths; if a complex leaf is.
    """
    takes = chooser(select)
    result = map_with_path(lambda leaf: takes(leaf.path, leaf.value), tree)
    if not any(jax.tree.leaves(result)):
        known = sorted({leaf.path for leaf in flatten(tree)[0]})
        shown = ", ".join(known[:8]) + (" and others" if len(known) > 8 else "")
        raise UserError(f"select: takes no parameter (got {select!r}). Choose among {shown}.")
    return result


def split(tree, select: Select):
    """Splits a tree into `(selected, rest)`, each with None in the other's places.

    >>> split({"a": jnp.ones(1), "b": 2}, None)
    ({'a': Array([1.], dtype=float32), 'b': None}, {'a': None, 'b': 2})
    """
    chosen = mask(tree, select)
    taken = jax.tree.map(lambda keep, leaf: leaf if keep else None, chosen, tree)
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, chosen, tree)
    return taken, rest


def merge(selected, rest):
    """Inverse of `split`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, selected, rest, is_leaf=lambda x: x is None
    )


def lookup(tree, path: str):
    """Returns the entry of a nested dict at a dotted path, or None where there is none."""
    for name in path.split("."):
        if tree is None or name not in tree:
            return None
        tree = tree[name]
    return tree

"""Every parameter has a path: `layers.attention.q_proj.kernel`.

Selection, noise, sharding, weight decay and export all speak of these strings. A leaf under
`layers` is stacked: its leading axis is the layer. In an unstacked tree an integer stands right
after `layers`; it is taken out of the path and becomes the layer, so that both trees name a
parameter alike.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LAYERS = "layers"
Select = str | Callable[[str], bool] | None


class Leaf(NamedTuple):
    """One leaf of a parameter tree.

    Attributes:
      path: dotted path without a layer index.
      layer: the index that stood after `layers`, or None.
      stacked: whether axis 0 of the value runs over layers.
      value: the leaf.
    """

    path: str
    layer: int | None
    stacked: bool
    value: Any


def _names(key_path) -> Iterator[str]:
    for entry in key_path:
        for attribute in ("key", "idx", "name"):
            if hasattr(entry, attribute):
                yield str(getattr(entry, attribute))
                break
        else:
            yield str(entry)


def _leaf(key_path, value) -> Leaf:
    names = list(_names(key_path))
    layer = None
    if LAYERS in names:
        after = names.index(LAYERS) + 1
        if after < len(names) and names[after].isdigit():
            layer = int(names.pop(after))
    stacked = LAYERS in names and layer is None and getattr(value, "ndim", 0) > 0
    return Leaf(".".join(names), layer, stacked, value)


def flatten(tree) -> tuple[list[Leaf], Any]:
    """Returns the leaves of `tree` with their paths, in pytree order, and the tree's structure.

    >>> leaves, _ = flatten({"layers": [{"w": 1}, {"w": 2}], "head": {"w": 3}})
    >>> [(leaf.path, leaf.layer) for leaf in leaves]
    [('head.w', None), ('layers.w', 0), ('layers.w', 1)]
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
    """Raises ValueError if two paths of `tree` share a hash, since they would share noise."""
    seen: dict[int, str] = {}
    for leaf in flatten(tree)[0]:
        other = seen.setdefault(path_hash(leaf.path), leaf.path)
        if other != leaf.path:
            raise ValueError(f"paths {other!r} and {leaf.path!r} share a hash; rename one of them")


def matcher(select: Select) -> Callable[[str], bool]:
    """Turns a selection into a predicate on paths.

    Args:
      select: None for every path, a regular expression searched in the path, or a predicate.
    """
    if select is None:
        return lambda path: True
    if callable(select):
        return select
    pattern = re.compile(select)
    return lambda path: pattern.search(path) is not None


def chooser(select: Select) -> Callable[[str, Any], bool]:
    """Like `matcher`, of path and leaf: arrays that are no floats are never taken."""
    takes = matcher(select)
    return lambda path, leaf: (
        takes(path) and jnp.issubdtype(getattr(leaf, "dtype", jnp.float32), jnp.inexact)
    )


def mask(tree, select: Select):
    """Returns a tree of Python booleans, True where `select` takes the path of a leaf of floats.

    Raises:
      ValueError: if nothing is selected; the message lists some paths.
    """
    takes = chooser(select)
    result = map_with_path(lambda leaf: takes(leaf.path, leaf.value), tree)
    if not any(jax.tree.leaves(result)):
        known = sorted({leaf.path for leaf in flatten(tree)[0]})
        shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise ValueError(f"select={select!r} takes no parameter; paths are {shown}")
    return result


def split(tree, select: Select):
    """Splits a tree into `(selected, rest)`, each with None in the other's places.

    >>> split({"a": 1, "b": 2}, "a")
    ({'a': 1, 'b': None}, {'a': None, 'b': 2})
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

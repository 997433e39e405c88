"""Every parameter has a path: `layers.attention.q_proj.kernel`.

Selection, noise, sharding, weight decay and export all use these strings. A model that stacks its
layers in one array declares it with `declare_stacked`. Every other tree is used as it is, even if
it has a key `layers`. If a declared model holds a list of layers instead of a stack, the index
after `layers` is left out of the path, so that both trees give a parameter the same name.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import checks
from jaxlm.core.errors import UserError

LAYERS = "layers"
Select = str | Callable[[str], bool] | None

_INDEX = re.compile("0|[1-9][0-9]{0,8}")
_AXES: dict[str, set[int]] = {}


class Leaf(NamedTuple):
    """One leaf of a parameter tree.

    Attributes:
      path: dotted path, without the index of the layer if the model is declared.
      layer: that index, or None.
      stacked: whether axis 0 of the value runs over layers.
      value: the leaf.
    """

    path: str
    layer: int | None
    stacked: bool
    value: Any


def declare_stacked(axes: Mapping[str, int]) -> None:
    """Declare leaves whose first axis runs over the layers of a model.

    `axes` maps a path that begins with `layers` to the number of axes of one layer's value. Call it
    once, where the model is defined; like the registration of a pytree node, it holds for the whole
    process. A leaf is stacked if it has a declared path and one axis more than the value of one
    layer, so `{"layers": {"mlp": {"kernel": [in, out]}}}` stays a tree of plain matrices.

    >>> declare_stacked({"layers.block.kernel": 2, "layers.block.bias": 1})
    >>> [leaf] = flatten({"layers": {"block": {"kernel": jnp.ones((12, 8, 8))}}})[0]
    >>> leaf.stacked
    True
    """
    for path, count in axes.items():
        if not path.startswith(LAYERS + ".") or count < 0:
            raise UserError(
                f"{path}: a stacked leaf must have a path that begins with {LAYERS!r} and at least "
                f"0 axes a layer (got {count} axes). Give paths such as 'layers.mlp.kernel'."
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


# Not in `jaxlm.models`: the paths of a tree would then depend on whether it has been imported.
declare_stacked(_own_models())


def _without_index(names: list[str]) -> tuple[list[str], int | None]:
    """Return the names without the index after `layers`, and that index."""
    after = names.index(LAYERS) + 1 if LAYERS in names else len(names)
    if after < len(names) and _INDEX.fullmatch(names[after]):
        return names[:after] + names[after + 1 :], int(names[after])
    return names, None


def _axes(names: list[str]) -> set[int]:
    """Return the numbers of axes that one layer of this leaf may have; empty if undeclared."""
    return _AXES.get(".".join(names[names.index(LAYERS) :]), set()) if LAYERS in names else set()


def _leaf(key_path, value) -> Leaf:
    names = [jax.tree_util.keystr((entry,), simple=True) for entry in key_path]
    rest, layer = _without_index(names)
    if layer is not None and _axes(rest):
        return Leaf(".".join(rest), layer, False, value)
    path = ".".join(names)
    return Leaf(path, None, is_stacked(path, getattr(value, "ndim", 0)), value)


def is_stacked(path: str, ndim: int) -> bool:
    """Return whether a leaf with `ndim` axes is declared as a stack of layers."""
    return ndim - 1 in _axes(path.split("."))


def is_declared(path: str) -> bool:
    """Return whether a path belongs to a declared leaf or to a part of one."""
    names = path.split(".")
    return any(_axes(names[:count]) for count in range(len(names), 0, -1))


def identity(path: str, layer: Any = None) -> tuple[str, Any]:
    """Return the two keys of a leaf's noise: its path without the layer index, and that index.

    A stack of layers and a list of layers have the same identities, declared or not.

    >>> identity("layers.3.kernel"), identity("layers.kernel", 3), identity("blocks.3.kernel")
    (('layers.kernel', 3), ('layers.kernel', 3), ('blocks.3.kernel', None))
    """
    if layer is not None:
        return path, layer
    names, index = _without_index(path.split("."))
    return ".".join(names), index


def indexed(path: str, layer: int | None) -> str:
    """Return the path with the index of its layer, the inverse of `identity`.

    >>> indexed("layers.kernel", 3), indexed("head.kernel", None)
    ('layers.3.kernel', 'head.kernel')
    """
    if layer is None:
        return path
    names = path.split(".")
    after = names.index(LAYERS) + 1
    return ".".join([*names[:after], str(layer), *names[after:]])


def flatten(tree) -> tuple[list[Leaf], Any]:
    """Return the leaves of `tree` with their paths, in pytree order, and the tree's structure.

    >>> leaves, _ = flatten({"blocks": [{"w": 1}, {"w": 2}], "head": {"w": 3}})
    >>> [leaf.path for leaf in leaves]
    ['blocks.0.w', 'blocks.1.w', 'head.w']
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [_leaf(key_path, value) for key_path, value in leaves], structure


def map_with_path(function: Callable[..., Any], tree, *rest):
    """Map `function(leaf, *others)` over the `Leaf`s of `tree` and the plain values of `rest`."""
    leaves, structure = flatten(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    return structure.unflatten(function(*items) for items in zip(leaves, *others, strict=True))


def path_hash(path: str) -> int:
    """Return the CRC-32 of a path in UTF-8, the same on every machine."""
    return zlib.crc32(path.encode())


def check_unique_hashes(tree) -> None:
    """Raise UserError if two leaves share a path or its hash, and would thus share their noise."""
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
        # A stack covers all layers, so no other leaf may have its path.
        own, taken = "all" if leaf.stacked else layer, layers.setdefault(path, set())
        if own in taken or (taken and "all" in {own, *taken}):
            raise UserError(
                f"{indexed(path, layer)}: two parameters have this path and would share their "
                "noise. Rename one of them."
            )
        taken.add(own)


def path_predicate(select: Select, key: str = "select") -> Callable[[str], bool]:
    """Return a selection as a predicate on paths; `key` names the option in messages."""
    return select if callable(select) else checks.regex(key, select)


def leaf_predicate(select: Select) -> Callable[[str, Any], bool]:
    """Return a selection as a predicate on a path and its leaf, true for arrays of floats only.

    The predicate raises UserError for a selected complex leaf.
    """
    takes = path_predicate(select)

    def chosen(path: str, leaf: Any) -> bool:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or leaf.size == 0 or not jnp.issubdtype(dtype, jnp.inexact):
            return False
        if takes(path) and jnp.issubdtype(dtype, jnp.complexfloating):
            raise UserError(
                f"{path}: parameters must be real (got {dtype}). Exclude it with `select`, or keep "
                "its real and imaginary parts as two arrays."
            )
        return takes(path)

    return chosen


def mask(tree, select: Select):
    """Return a tree of booleans, True where a leaf of floats is selected; one has to be."""
    takes = leaf_predicate(select)
    result = map_with_path(lambda leaf: takes(leaf.path, leaf.value), tree)
    if not any(jax.tree.leaves(result)):
        known = sorted({leaf.path for leaf in flatten(tree)[0]})
        shown = ", ".join(known[:8]) + (" and others" if len(known) > 8 else "")
        raise UserError(f"select: takes no parameter (got {select!r}). Choose among {shown}.")
    return result


def split(tree, select: Select):
    """Split a tree into `(selected, rest)`, each with None in the other's places.

    >>> split({"a": jnp.ones(1), "b": 2}, None)
    ({'a': Array([1.], dtype=float32), 'b': None}, {'a': None, 'b': 2})
    """
    chosen = mask(tree, select)
    taken = jax.tree.map(lambda keep, leaf: leaf if keep else None, chosen, tree)
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, chosen, tree)
    return taken, rest


def merge(selected, rest):
    """Join the two trees of `split`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, selected, rest, is_leaf=lambda x: x is None
    )


def lookup(tree, path: str):
    """Return the entry of a nested dict at a dotted path, or None where there is none."""
    for name in path.split("."):
        if tree is None or name not in tree:
            return None
        tree = tree[name]
    return tree

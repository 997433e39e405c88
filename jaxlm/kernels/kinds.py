r"""The kinds of kernels: what a gradient becomes on either side of the inner product.

    K[n, c, m, d] = ⟨φ1(∇f_c(x_n)), φ2(∇f_d(x'_m))⟩

| kind             | φ1(g)  | φ2(g)                      | is to first order the change of   |
|------------------|--------|----------------------------|-----------------------------------|
| SGD              | g      | g                          | f(x) by a step of SGD on x'       |
| AsymmetricSignGD | g      | sign g                     | f(x) by a step of SignGD on x'    |
| SignGD           | sign g | sign g                     | nothing: a symmetric surrogate    |
| Adam             | g      | m̂ / (√v̂ + ε) of state + g  | f(x) by a step of Adam on x'      |

Gradients are lists with one array [N, C, S, p] per leaf: N examples, C outputs, and S slices of p
entries. A slice is one layer of a stacked leaf, or the whole leaf.

References: Malladi et al., "A Kernel-Based View of Language Model Fine-Tuning", arXiv:2210.05643.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import paths
from jaxlm.core.checks import number, one_of
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.gradients import adam


class Moments(NamedTuple):
    """Adam's moments of the selected leaves, [S, p] each in the order of the tree."""

    first: Any
    second: Any
    count: Any  # steps that the moments have seen


class Kind:
    """Base class of the kinds, which `ntk` accepts by their names too.

    `signed` says whether φ1 and φ2 take signs, `symmetric` whether φ1 is φ2.
    """

    name: ClassVar[str]
    signed: ClassVar[tuple[bool, bool]] = (False, False)
    symmetric: ClassVar[bool] = False
    threshold: Any = None

    def bind(self, params: Any, select: paths.Select) -> "Kind":
        """Return this kind with everything that depends on the parameters filled in."""
        del params, select
        return self

    def left(self, gradients: list[Array]) -> list[Array]:
        """Return φ1, the features of x."""
        return signs(gradients, self.threshold) if self.signed[0] else gradients

    def right(self, gradients: list[Array]) -> list[Array]:
        """Return φ2, the features of x', the examples that a step is made on."""
        return signs(gradients, self.threshold) if self.signed[1] else gradients


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SGD(Kind):
    """The kernel of SGD, and on average of MeZO: inner products of gradients."""

    name: ClassVar[str] = "sgd"
    symmetric: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class _Signed(Kind):
    threshold: float | int | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self):
        number(self, "threshold", least=0, below=1)

    def bind(self, params: Any, select: paths.Select) -> Kind:
        threshold = self.threshold
        if threshold is None:
            dtype = jnp.result_type(*jax.tree.leaves(paths.split(params, select)[0]))
            threshold = 1e-12 if dtype == jnp.float64 else 1e-6
        return dataclasses.replace(self, threshold=float(threshold))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SignGD(_Signed):
    """The symmetric sign kernel: inner products of the signs of gradients.

    Attributes:
      threshold: τ of `signs`. By default 1e-6, and 1e-12 in float64; 0 is the authors' code.
    """

    name: ClassVar[str] = "signgd"
    signed: ClassVar[tuple[bool, bool]] = (True, True)
    symmetric: ClassVar[bool] = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AsymmetricSignGD(_Signed):
    """The kernel of SignGD, and of early Adam: inner products of gradients with signs of gradients.

    Attributes:
      threshold: see `SignGD`.
    """

    name: ClassVar[str] = "asymmetric_signgd"
    signed: ClassVar[tuple[bool, bool]] = (False, True)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["state"],
    meta_fields=["b1", "b2", "eps", "variant"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Adam(adam.Adam, Kind):
    """The kernel of Adam in a given state: inner products of gradients with Adam's steps on others.

    From a fresh state and with ε → 0 the step is a sign: early Adam is SignGD. From a trained state
    it is not odd in g, since it includes the momentum, which all examples share.

    Attributes:
      state: the state of an optax chain that contains a `ScaleByAdamState`.
      b1, b2, eps, variant: see `jaxlm.gradients.adam.Adam`.
    """

    name: ClassVar[str] = "adam"

    def bind(self, params: Any, select: paths.Select) -> "Adam":
        first, second, count = adam.moments(self.state, params, select)
        leaves = paths.flatten(paths.split(params, select)[0])[0]
        slices = [leaf.value.shape[0] if leaf.stacked else 1 for leaf in leaves]
        first, second = (
            [jnp.reshape(a, (n, -1)) for a, n in zip(moments, slices, strict=True)]
            for moments in (first, second)
        )
        state = Moments(first, second, jnp.asarray(count, jnp.result_type(float)))
        return Adam(state, *self.constants)

    def right(self, gradients: list[Array]) -> list[Array]:
        first, second, count = self.state
        return [
            self.step(g, Moments(m, v, count))
            for g, m, v in zip(gradients, first, second, strict=True)
        ]

    def step(self, g: Array, moments: Moments) -> Array:
        """Return Adam's step on g, whose last axes are those of the moments."""
        lead = tuple(range(g.ndim - moments.first.ndim))
        first, second = (jnp.expand_dims(m, lead) for m in moments[:2])
        return adam.step(g, first, second, moments.count, self.constants)[0]


_NAMED: dict[str, Any] = {kind.name: kind for kind in (SGD, SignGD, AsymmetricSignGD)}


def kind_of(kind: str | Kind) -> Kind:
    """Return a kind, given one or its name."""
    if isinstance(kind, Kind):
        return kind
    if kind == Adam.name:
        raise UserError(
            "kind: Adam's kernel depends on the state of the optimizer (got 'adam'). Give "
            "kernels.Adam(state)."
        )
    one_of("kind", kind, _NAMED)
    return _NAMED[kind]()


def signs(gradients: list[Array], threshold: float | int | None) -> list[Array]:
    """Return sign(g), with zero for entries that are rounding errors of zero.

    An entry keeps its sign if |g| > τ max|g| over its slice, and that maximum is above τ max|g|
    over all leaves, both for the same example and output. The second condition removes slices of
    pure noise: the bias of attention keys shifts all scores of a query equally, so its exact
    gradient is zero, and the computed one is rounding errors with random signs.

    [N, C, S, p] per leaf gives -1, 0 and 1, and NaN throughout a slice with an entry that is not
    finite. With τ = 0 all nonzero entries keep their sign, as in the authors' code.
    """
    # 0 * largest is 0, or NaN if an entry is not finite, which the sign alone would hide.
    return [
        jnp.where(kept, jnp.sign(g), 0) + (0 * largest)[..., None].astype(g.dtype)
        for g, (kept, largest) in zip(gradients, _kept(gradients, threshold), strict=True)
    ]


def dropped(gradients: list[Array], threshold: float | int | None) -> Float[Array, "N"]:
    """Return the fraction of each example's nonzero entries that `signs` sets to zero."""
    lost = jnp.zeros((), jnp.float32)
    nonzero = jnp.zeros((), jnp.float32)
    for g, (kept, _) in zip(gradients, _kept(gradients, threshold), strict=True):
        lost += ((g != 0) & ~kept).sum((1, 2, 3), dtype=jnp.float32)
        nonzero += (g != 0).sum((1, 2, 3), dtype=jnp.float32)
    return lost / jnp.maximum(nonzero, 1)


def _kept(gradients, threshold):
    """Yield for each leaf which entries keep their sign, and the largest |g| of each slice."""
    sizes = [wide(jnp.abs(g)) for g in gradients]
    largest = [size.max(-1, initial=0) for size in sizes]
    of_all = jnp.stack([top.max(-1, initial=0) for top in largest]).max(0)
    for size, top in zip(sizes, largest, strict=True):
        noise = top <= threshold * of_all[..., None]
        yield (size > threshold * top[..., None]) & ~noise[..., None], top

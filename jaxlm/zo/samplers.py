"""Distributions of the perturbation z, drawn leaf by leaf or some rows at a time."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from jaxlm.core import prng


@runtime_checkable
class Sampler(Protocol):
    """A distribution with mean 0 and covariance I over the elements of a leaf."""

    def sample(
        self, key: Array, shape: tuple[int, ...], rows: prng.Rows = None
    ) -> Float[Array, "..."]:
        """Draws float32 noise of a leaf of `shape`, or of its `rows`; see `jaxlm.core.prng`."""


def _static(cls):
    fields = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=[], meta_fields=fields)


@_static
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Standard normal; see `gaussian`."""

    generator: prng.Generator = "counter"

    def sample(self, key, shape, rows=None):
        return prng.normal(key, shape, rows, self.generator)


@_static
@dataclasses.dataclass(frozen=True)
class Rademacher:
    """Random signs; see `rademacher`."""

    generator: prng.Generator = "counter"

    def sample(self, key, shape, rows=None):
        return prng.rademacher(key, shape, rows, self.generator)


def gaussian(generator: prng.Generator = "counter") -> Gaussian:
    """z ~ N(0, I), the perturbation of MeZO: E||g z||^2 = (d + n + 1)/n ||grad||^2."""
    return Gaussian(generator)


def rademacher(generator: prng.Generator = "counter") -> Rademacher:
    """z uniform on {-1, +1}^d: E||g z||^2 = (d + n - 1)/n ||grad||^2, the smallest there is."""
    return Rademacher(generator)

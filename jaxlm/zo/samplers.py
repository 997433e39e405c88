"""Distributions of the perturbation z, drawn leaf by leaf or some rows at a time.

A sampler is a frozen dataclass. What it draws for a leaf is a function of a key and a `Site`, so
that a perturbed weight can be made where it is read and made again where it is updated. Samplers
here are dense; those that live on a part of the parameters, or in a few factors, are in
`jaxlm.zo.structured`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import paths, prng
from jaxlm.core.views import LowRank
from jaxlm.zo.sites import Site, sum_over_blocks


class Sampler:
    """A distribution with mean 0 and, where nothing else is said, covariance I.

    To add one, write a frozen dataclass with `sample` and register it by
    `jax.tree_util.register_dataclass`; the other methods are for distributions that change with the
    step or need all parameters at once.

    Attributes:
      factored: whether z of a matrix has few factors, so that many directions run in one pass.
    """

    factored = False

    def sample(self, key: Array, site: Site) -> Float[Array, "..."] | LowRank:
        """Draws z at a site, in float32.

        Args:
          key: of the direction, the same for all leaves; `site.key(key)` is that of the leaf.
          site: where.
        """
        raise TypeError(f"{type(self).__name__} has no method sample")

    def direction(self, key: Array, site: Site) -> Float[Array, "..."] | LowRank:
        """What a slope along z is multiplied by in the gradient estimate; z itself as a rule."""
        return self.sample(key, site)

    def at(self, key: Array, step: Any) -> "Sampler":
        """The sampler of one step of a run, from the run's key and the step's number."""
        del key, step
        return self

    def along(self, key: Array, params: Any, select: paths.Select) -> "Sampler":
        """The sampler of one direction, after a look at all parameters."""
        del key, params, select
        return self

    def check(self, params: Any, select: paths.Select) -> None:
        """Raises ValueError where the sampler does not fit the selected parameters."""


Class = TypeVar("Class", bound=type)


def register(*data: str) -> Callable[[Class], Class]:
    """A decorator: makes a frozen dataclass a pytree whose arrays are the fields named."""

    def decorate(cls: Class) -> Class:
        static = [field.name for field in dataclasses.fields(cls) if field.name not in data]
        return jax.tree_util.register_dataclass(cls, data_fields=list(data), meta_fields=static)

    return decorate


@register()
@dataclasses.dataclass(frozen=True)
class Gaussian(Sampler):
    """Standard normal; see `gaussian`."""

    generator: prng.Generator = "counter"

    def sample(self, key, site):
        return prng.normal(site.key(key), site.shape, site.rows, self.generator)


@register()
@dataclasses.dataclass(frozen=True)
class Rademacher(Sampler):
    """Random signs; see `rademacher`."""

    generator: prng.Generator = "counter"

    def sample(self, key, site):
        return prng.rademacher(site.key(key), site.shape, site.rows, self.generator)


@register("base", "scale")
@dataclasses.dataclass(frozen=True)
class Sphere(Sampler):
    """Uniform on a sphere; see `sphere`."""

    base: Sampler
    scale: Any = None

    def along(self, key, params, select):
        takes = paths.leaf_predicate(select)
        square, size = jnp.zeros((), jnp.float32), 0
        for leaf in paths.flatten(params)[0]:
            if takes(leaf.path, leaf.value):
                square += sum_over_blocks(lambda site: self._square(key, site), leaf)
                size += leaf.value.size
        # A float: the number of parameters may not fit an int of 32 bits.
        return dataclasses.replace(self, scale=jnp.sqrt(float(size) / square))

    def _square(self, key, site):
        # Where there is a number, so that z has the sharding of the parameter, or each device would
        # draw the whole of it.
        z = jnp.asarray(self.base.sample(key, site))
        return jnp.sum(jnp.square(jnp.where(site.value == site.value, z, 0)))

    def sample(self, key, site):
        if self.scale is None:
            raise ValueError("a sphere is drawn through spsa or an optimizer, which know all of z")
        return self.scale * self.base.sample(key, site)


def gaussian(generator: prng.Generator = "counter") -> Gaussian:
    """z ~ N(0, I), the perturbation of MeZO: E||g z||^2 = (d + n + 1)/n ||grad||^2."""
    return Gaussian(generator)


def rademacher(generator: prng.Generator = "counter") -> Rademacher:
    """z uniform on {-1, +1}^d: E||g z||^2 = (d + n - 1)/n ||grad||^2, the smallest there is."""
    return Rademacher(generator)


def sphere(generator: prng.Generator = "counter") -> Sphere:
    """z uniform on the sphere of radius sqrt(d): E||g z||^2 = (d + n - 1)/n ||grad||^2.

    The norm of a Gaussian z over all selected parameters is found first, by one more sweep over
    them. The last bits of that norm depend on how parameters are sharded and stacked.
    """
    return Sphere(Gaussian(generator))

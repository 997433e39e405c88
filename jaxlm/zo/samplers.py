"""Distributions of the perturbation z, drawn for a leaf or for some of its rows.

A sampler is a frozen dataclass. The numbers it draws for a leaf are a function of a key and a
`Site`, so they can be drawn where a weight is read and again where it is updated. The
samplers here are dense; low-rank, sparse and rescaled ones are in `jaxlm.zo.structured`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import paths, prng
from jaxlm.core.errors import UserError
from jaxlm.core.views import LowRank
from jaxlm.zo.sites import Site, sum_over_blocks


class Sampler:
    """A distribution with mean 0 and, unless stated otherwise, covariance I.

    To add one, write a frozen dataclass with a method `sample` under the decorator `register`.
    The other methods are for distributions that change with the step or need all parameters.

    Attributes:
      factored: whether z of a matrix has low-rank factors, so that directions can share a pass.
    """

    factored = False

    def sample(self, key: Array, site: Site) -> Float[Array, "..."] | LowRank:
        """Draw z at a site, in float32.

        Args:
          key: key of the direction, shared by all leaves; `site.key(key)` is that of the leaf.
          site: the leaf, or some of its rows.
        """
        raise NotImplementedError

    def direction(self, key: Array, site: Site) -> Float[Array, "..."] | LowRank:
        """Return the direction that a slope multiplies in the gradient estimate; z by default."""
        return self.sample(key, site)

    def at(self, key: Array, step: Any) -> "Sampler":
        """Return the sampler of one step of a run, given the key of the run."""
        del key, step
        return self

    def along(self, key: Array, params: Any, select: paths.Select) -> "Sampler":
        """Return the sampler of one direction, given all parameters."""
        del key, params, select
        return self

    def check(self, params: Any, select: paths.Select) -> None:
        """Raise UserError if the sampler does not fit the selected parameters."""


Class = TypeVar("Class", bound=type)


def register(*data: str) -> Callable[[Class], Class]:
    """Decorate a frozen dataclass to be a pytree whose children are the named fields."""

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
        # As a float, since the number of parameters may not fit into int32.
        return dataclasses.replace(self, scale=jnp.sqrt(float(size) / square))

    def _square(self, key, site):
        # The comparison makes z depend on the parameter, so that XLA gives it the same sharding.
        # Otherwise each device would draw all of z.
        z = jnp.asarray(self.base.sample(key, site))
        return jnp.sum(jnp.square(jnp.where(site.value == site.value, z, 0)))

    def sample(self, key, site):
        if self.scale is None:
            raise UserError(
                "sampler: a sphere needs the norm of all of z (got one leaf). Draw it through "
                "zo.spsa or an optimizer."
            )
        return self.scale * self.base.sample(key, site)


def gaussian(generator: prng.Generator = "counter") -> Gaussian:
    """z ~ N(0, I), the perturbation of MeZO: E||g z||^2 = (d + n + 1)/n ||grad||^2."""
    return Gaussian(generator)


def rademacher(generator: prng.Generator = "counter") -> Rademacher:
    """z uniform on {-1, +1}^d: E||g z||^2 = (d + n - 1)/n ||grad||^2, the smallest possible."""
    return Rademacher(generator)


def sphere(generator: prng.Generator = "counter") -> Sphere:
    """z uniform on the sphere of radius sqrt(d): E||g z||^2 = (d + n - 1)/n ||grad||^2.

    The norm of a Gaussian z over all selected parameters is computed first, by one more sweep over
    them. Its last bits depend on how parameters are sharded and stacked.
    """
    return Sphere(Gaussian(generator))

"""Configurations of the optimizers without gradients; `jaxlm.zo` says what each of them does."""

from dataclasses import dataclass
from typing import Any, Literal

from jaxlm import zo
from jaxlm.core.checks import one_of, whole
from jaxlm.train.settings import SECTION, Optimizer, check

MOST_DIRECTIONS, MOST_RANK, MOST_STEPS_REPLAYED = 2**16, 2**16, 2**16
"""Far above every use; arrays of that length are made at once."""


@dataclass(frozen=True, kw_only=True)
class ZerothOrder(Optimizer):
    """What every optimizer without gradients has.

    The learning rates are such that the model of the package learns; larger models want lower ones.

    Attributes:
        eps: size of the perturbation.
        num_directions: directions of a step.
        rounding: of parameters below float32 after an update: to the nearest number, or at random
            such that the mean is exact.
    """

    learning_rate: float = 1e-4
    eps: float = 1e-3
    num_directions: int = 1
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self):
        super().__post_init__()
        check(self, "eps", positive=True)
        whole(self, "num_directions", most=MOST_DIRECTIONS, section=SECTION)
        one_of("optimizer.rounding", self.rounding, ("nearest", "stochastic"))

    def build(self, steps: int) -> zo.ZerothOrderOptimizer:
        """The optimizer for a run of `steps` steps."""
        raise TypeError(f"{type(self).__name__} is not an optimizer by itself")

    def _common(self, steps: int) -> dict[str, Any]:
        return {
            "learning_rate": self.rate(steps),
            "eps": self.eps,
            "num_directions": self.num_directions,
            "weight_decay": self.weight_decay,
            "select": self.select,
            "rounding": self.rounding,
        }


@dataclass(frozen=True, kw_only=True)
class Dense(ZerothOrder):
    """What those with dense perturbations have.

    Attributes:
        sampler: distribution of the direction.
    """

    sampler: Literal["gaussian", "rademacher", "sphere"] = "gaussian"

    def __post_init__(self):
        super().__post_init__()
        one_of("optimizer.sampler", self.sampler, ("gaussian", "rademacher", "sphere"))

    def _common(self, steps: int) -> dict[str, Any]:
        return {**super()._common(steps), "sampler": getattr(zo, self.sampler)()}


@dataclass(frozen=True, kw_only=True)
class Mezo(Dense):
    """`jaxlm.zo.mezo`: two forward passes for each direction."""

    name: str = "mezo"
    learning_rate: float = 2e-4

    def build(self, steps: int) -> zo.ZerothOrderOptimizer:
        """See `ZerothOrder`."""
        return zo.mezo(**self._common(steps))


@dataclass(frozen=True, kw_only=True)
class Meazo(Dense):
    """`jaxlm.zo.meazo`: slopes divided by their running size.

    Attributes:
        decay_rate: of the running mean of their squares.
    """

    name: str = "meazo"
    learning_rate: float = 1e-4
    decay_rate: float = 0.99

    def __post_init__(self):
        super().__post_init__()
        check(self, "decay_rate", below=1.0)

    def build(self, steps: int) -> zo.ZerothOrderOptimizer:
        """See `ZerothOrder`."""
        return zo.meazo(decay_rate=self.decay_rate, **self._common(steps))


@dataclass(frozen=True, kw_only=True)
class MezoMomentum(Dense):
    """`jaxlm.zo.mezo_momentum`: momentum replayed from scalars.

    Attributes:
        momentum: decay of the running mean.
        horizon: steps that are replayed.
    """

    name: str = "mezo_momentum"
    momentum: float = 0.9
    horizon: int = 20

    def __post_init__(self):
        super().__post_init__()
        check(self, "momentum", below=1.0)
        whole(self, "horizon", most=MOST_STEPS_REPLAYED, section=SECTION)

    def build(self, steps: int) -> zo.ZerothOrderOptimizer:
        """See `ZerothOrder`."""
        return zo.mezo_momentum(momentum=self.momentum, horizon=self.horizon, **self._common(steps))


@dataclass(frozen=True, kw_only=True)
class MezoAdam(Dense):
    """`jaxlm.zo.mezo_adam`: Adam's moments replayed from scalars.

    Attributes:
        b1: decay of the first moment.
        b2: decay of the second moment.
        horizon: steps that are replayed.
    """

    name: str = "mezo_adam"
    learning_rate: float = 3e-3
    b1: float = 0.9
    b2: float = 0.999
    horizon: int = 20

    def __post_init__(self):
        super().__post_init__()
        check(self, "b1", "b2", below=1.0)
        whole(self, "horizon", most=MOST_STEPS_REPLAYED, section=SECTION)

    def build(self, steps: int) -> zo.ZerothOrderOptimizer:
        """See `ZerothOrder`."""
        return zo.mezo_adam(b1=self.b1, b2=self.b2, horizon=self.horizon, **self._common(steps))


@dataclass(frozen=True, kw_only=True)
class Fzoo(Dense):
    """`jaxlm.zo.fzoo`: one-sided slopes divided by their standard deviation."""

    name: str = "fzoo"
    learning_rate: float = 1e-4
    num_directions: int = 8
    sampler: Literal["gaussian", "rademacher", "sphere"] = "rademacher"

    def __post_init__(self):
        super().__post_init__()
        whole(self, "num_directions", least=2, most=MOST_DIRECTIONS, section=SECTION)

    def build(self, steps: int) -> zo.ZerothOrderOptimizer:
        """See `ZerothOrder`."""
        return zo.fzoo(**self._common(steps))


@dataclass(frozen=True, kw_only=True)
class Lozo(ZerothOrder):
    """`jaxlm.zo.lozo`: low-rank directions; with `momentum` LOZO-M, `jaxlm.zo.lozo_momentum`.

    Attributes:
        rank: of the directions.
        interval: steps for which one factor stays.
        momentum: decay of the running mean of the other factor; 0 for none.
    """

    name: str = "lozo"
    rank: int = 2
    interval: int = 50
    momentum: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check(self, "momentum", below=1.0)
        whole(self, "rank", most=MOST_RANK, section=SECTION)
        whole(self, "interval", section=SECTION)

    def build(self, steps: int) -> zo.ZerothOrderOptimizer:
        """See `ZerothOrder`."""
        common = {"rank": self.rank, "interval": self.interval, **self._common(steps)}
        if self.momentum:
            return zo.lozo_momentum(momentum=self.momentum, **common)
        return zo.lozo(**common)


@dataclass(frozen=True, kw_only=True)
class ZoMuon(ZerothOrder):
    """`jaxlm.zo.zo_muon`: an orthogonalized step in a subspace of each matrix.

    Attributes:
        rank: of the subspace.
        interval: steps for which it stays.
        vector_scale: learning rate of leaves that are no matrices, over that of matrices.
    """

    name: str = "zo_muon"
    learning_rate: float = 1e-2
    num_directions: int = 4
    rank: int = 64
    interval: int = 100
    vector_scale: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        check(self, "vector_scale")
        whole(self, "rank", most=MOST_RANK, section=SECTION)
        whole(self, "interval", section=SECTION)

    def build(self, steps: int) -> zo.ZerothOrderOptimizer:
        """See `ZerothOrder`."""
        return zo.zo_muon(
            rank=self.rank,
            interval=self.interval,
            vector_scale=self.vector_scale,
            **self._common(steps),
        )

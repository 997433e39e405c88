"""Configurations of the optimizers with gradients."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.core.paths import map_with_path
from jaxlm.dynamics.scaling import OptHParams
from jaxlm.train.settings import Optimizer, check


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Optimizer):
    """Options shared by all optimizers with gradients.

    Attributes:
        clip: largest global norm of the gradient; null for no clipping.
    """

    learning_rate: float = 1e-3
    clip: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check(self, "clip", positive=True)

    def scale(self) -> Any:
        """Return the optax transformation between clipping and weight decay."""
        raise NotImplementedError

    def hparams(self, steps: int) -> OptHParams:
        """Return the hyperparameters that a scaling rule changes, for a run of `steps` steps."""
        raise UserError(
            f"optimizer.name: no scaling rule is known for it (got {self.name}). Give sgd or adamw."
        )

    def with_hparams(self, hp: OptHParams) -> "FirstOrder":
        """Return the optimizer with the hyperparameters that a scaling rule returned."""
        raise NotImplementedError

    def transform(self, steps: int) -> Any:
        """Return the whole optax transformation for a run of `steps` steps."""
        import optax

        clip = optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip)
        decay = optax.add_decayed_weights(self.weight_decay, decay_mask)
        return optax.chain(
            clip, self.scale(), decay, optax.scale_by_learning_rate(self.rate(steps))
        )


@dataclass(frozen=True, kw_only=True)
class Sgd(FirstOrder):
    """Stochastic gradient descent.

    Attributes:
        momentum: decay rate of the running sum of gradients.
    """

    name: str = "sgd"
    momentum: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check(self, "momentum", below=1.0)

    def scale(self) -> Any:
        import optax

        return optax.trace(self.momentum) if self.momentum else optax.identity()

    def hparams(self, steps: int) -> OptHParams:
        """See `FirstOrder`."""
        # Rules assume averages; the sum of gradients is 1 / (1 - momentum) times their average.
        rest = 1 - self.momentum
        return OptHParams(
            self.learning_rate / rest,
            b1=self.momentum or None,
            weight_decay=self.weight_decay * rest,
            steps=steps,
            warmup=self.warmup,
        )

    def with_hparams(self, hp: OptHParams) -> "Sgd":
        momentum = hp.b1 or 0.0
        return dataclasses.replace(
            self,
            learning_rate=hp.lr * (1 - momentum),
            momentum=momentum,
            weight_decay=hp.weight_decay / (1 - momentum),
            warmup=hp.warmup,
        )


@dataclass(frozen=True, kw_only=True)
class Adam(FirstOrder):
    """Adam, or AdamW with `weight_decay`; the names adam and adamw mean the same.

    Attributes:
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
    """

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        check(self, "b1", "b2", below=1.0)
        check(self, "eps", positive=True)

    def scale(self) -> Any:
        import optax

        return optax.scale_by_adam(self.b1, self.b2, self.eps)

    def hparams(self, steps: int) -> OptHParams:
        return OptHParams(
            self.learning_rate,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            steps=steps,
            warmup=self.warmup,
        )

    def with_hparams(self, hp: OptHParams) -> "Adam":
        return dataclasses.replace(
            self,
            learning_rate=hp.lr,
            b1=hp.b1 or 0.0,
            b2=hp.b2 or 0.0,
            eps=hp.eps,
            weight_decay=hp.weight_decay,
            warmup=hp.warmup,
        )


@dataclass(frozen=True, kw_only=True)
class Muon(FirstOrder):
    """Muon for the matrices of the layers, Adam for everything else.

    Attributes:
        momentum: decay rate of Muon's running mean of gradients.
        adam_learning_rate: highest learning rate of the parameters that Adam trains.
    """

    name: str = "muon"
    learning_rate: float = 1e-2
    momentum: float = 0.95
    adam_learning_rate: float = 3e-3

    def __post_init__(self):
        super().__post_init__()
        check(self, "momentum", below=1.0)
        check(self, "adam_learning_rate")

    def scale(self) -> Any:
        from optax import contrib

        # `transform` multiplies all updates by -learning_rate. So Muon's own rate is -1, and Adam's
        # is relative to `learning_rate`.
        ratio = self.adam_learning_rate / self.learning_rate if self.learning_rate else 1.0
        return contrib.muon(
            -1.0,
            beta=self.momentum,
            adam_learning_rate=-ratio,
            muon_weight_dimension_numbers=_layer_matrices,
        )


def decay_mask(params: Any) -> Any:
    """Return True for the parameters that weight decay shrinks: all but biases and norm scales."""
    return map_with_path(lambda leaf: leaf.path.split(".")[-1] not in ("bias", "scale"), params)


def _layer_matrices(params: Any) -> Any:
    from optax import contrib

    def axes(leaf: Any) -> Any:
        if not (leaf.path.startswith("layers.") and leaf.path.endswith("kernel")):
            return None
        rows = leaf.value.ndim - 2
        return contrib.MuonDimensionNumbers(reduction_axis=rows, output_axis=rows + 1)

    return map_with_path(axes, params)

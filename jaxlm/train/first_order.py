"""Configurations of the optimizers with gradients."""

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jaxlm.core import checks
from jaxlm.core.checks import in_float32, one_of, real
from jaxlm.core.errors import UserError
from jaxlm.core.paths import map_with_path
from jaxlm.dynamics.scaling import OptHParams
from jaxlm.train.settings import Optimizer, check, meanings, scheduled


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters with a learning rate or a weight decay of their own.

    Attributes:
        select: regular expression searched in parameter paths.
        learning_rate: highest learning rate, of the optimizer's schedule; 0 keeps the parameters
            as they are, null takes the optimizer's.
        weight_decay: of every parameter in the group; null takes the optimizer's, which spares
            biases and norms.
    """

    select: str
    learning_rate: float | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        checks.regex("select", self.select)
        for name in ("learning_rate", "weight_decay"):
            real(name, getattr(self, name), least=0.0)
            in_float32(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Optimizer):
    """Options shared by all optimizers with gradients.

    Attributes:
        clip: largest global norm of the gradient; null for no clipping.
        groups: parameters with a learning rate or a weight decay of their own; a parameter belongs
            to the first group that selects it.
    """

    learning_rate: float = 1e-3
    clip: float | None = None
    groups: tuple[Group, ...] = ()

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

    def check_one_rate(self) -> None:
        """Refuse groups, whose rates and decays a scaling rule would not change."""
        if self.groups:
            raise UserError(
                "optimizer.groups: a scaling rule changes one learning rate and weight decay (got "
                f"{len(self.groups)} groups). Leave them out."
            )

    def with_hparams(self, hp: OptHParams) -> "FirstOrder":
        """Return the optimizer with the hyperparameters that a scaling rule returned."""
        raise NotImplementedError

    def transform(self, steps: int) -> Any:
        """Return the whole optax transformation for a run of `steps` steps."""
        import optax

        def rest(group: Group) -> Any:
            peak = self.learning_rate if group.learning_rate is None else group.learning_rate
            decay, mask = group.weight_decay, None
            if decay is None:
                decay, mask = self.weight_decay, decay_mask
            return optax.chain(
                optax.add_decayed_weights(decay, mask),
                optax.scale_by_learning_rate(scheduled(self, peak, steps)),
            )

        clip = optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip)
        if not self.groups:
            decay = optax.add_decayed_weights(self.weight_decay, decay_mask)
            rate = optax.scale_by_learning_rate(self.rate(steps))
            return optax.chain(clip, self.scale(), decay, rate)
        others = {len(self.groups): rest(Group(select=""))}
        parts = others | {i: rest(group) for i, group in enumerate(self.groups)}
        return optax.chain(clip, self.scale(), optax.partition(parts, self.labels))

    def labels(self, params: Any) -> Any:
        """Return the place of each parameter's group, or the number of groups if it has none.

        Raises:
            UserError: a group has no parameter.
        """
        chosen = [checks.regex("optimizer.groups", group.select) for group in self.groups]
        found: set[int] = set()

        def label(leaf: Any) -> int:
            place = next((i for i, has in enumerate(chosen) if has(leaf.path)), len(chosen))
            found.add(place)
            return place

        labels = map_with_path(label, params)
        for place, group in enumerate(self.groups):
            if place not in found:
                raise UserError(
                    f"optimizer.groups[{place}].select: selects none of the trained parameters "
                    f"that are left (got {checks.show(group.select)}). Correct it."
                )
        return labels


@dataclass(frozen=True, kw_only=True)
class Derived(FirstOrder):
    """Base class of the configurations that `derived` makes; `own` are the method's arguments."""

    method: ClassVar[Callable[..., Any]]
    own: ClassVar[Mapping[str, type]]

    def __post_init__(self):
        super().__post_init__()
        for name, kind in self.own.items():
            rate = name in ("b1", "b2", "decay", "decay_rate", "momentum")
            if kind is not bool:
                check(self, name, below=1.0 if rate else math.inf)

    def scale(self) -> Any:
        # The rate and the weight decay follow in `transform`, which multiplies by -learning_rate.
        options = {name: getattr(self, name) for name in self.own}
        if "weight_decay" in inspect.signature(type(self).method).parameters:
            options["weight_decay"] = 0.0
        return type(self).method(learning_rate=-1.0, **options)


def derived(method: Callable[..., Any], learning_rate: float) -> type[Any]:
    """Derive the configuration of an optimizer of optax from its signature and docstring.

    Arguments that are numbers become keys of the same name and default. The learning rate with its
    schedule, clipping and weight decay are those of `FirstOrder`, the same for every optimizer.

    Args:
        method: such as `optax.lion`.
        learning_rate: default of the highest learning rate.

    Returns:
        A frozen dataclass, a subclass of `FirstOrder`.
    """
    parameters: Mapping[str, Any] = inspect.signature(method).parameters
    own: dict[str, Any] = {}
    for key, given in parameters.items():
        kind = float if key == "momentum" else type(given.default)  # None is no momentum
        if kind in (bool, int, float) and key not in ("learning_rate", "weight_decay"):
            optional = type(None) in typing.get_args(given.annotation)
            own[key] = kind | None if optional else kind
    fields = [("name", str, method.__name__), ("learning_rate", float, learning_rate)]
    fields += [(key, kind, parameters[key].default) for key, kind in own.items()]
    return dataclasses.make_dataclass(
        method.__name__.title(),
        [(key, kind, dataclasses.field(default=default)) for key, kind, default in fields],
        bases=(Derived,),
        namespace={
            "__doc__": meanings(method, without=parameters.keys() - own.keys()),
            "__module__": __name__,
            "method": staticmethod(method),
            "own": own,
        },
        frozen=True,
        kw_only=True,
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
        self.check_one_rate()
        # Rules assume averages; the sum of gradients is 1 / (1 - momentum) times their average.
        rest = 1 - self.momentum
        return OptHParams(
            self.learning_rate / rest,
            b1=self.momentum or None,
            weight_decay=self.weight_decay * rest,
            steps=steps,
            warmup=self.warmup_steps(steps),
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
        self.check_one_rate()
        return OptHParams(
            self.learning_rate,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            steps=steps,
            warmup=self.warmup_steps(steps),
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


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(FirstOrder):
    """AdamW that averages its iterates in place of a falling learning rate.

    As `optax.contrib.schedule_free_adamw`, except for what a run calls its parameters. optax holds
    the point y at which the gradient is taken; a run holds the average x, so that evaluations,
    checkpoints and the result are those of x. Parameters below float32 would lose the average.

    Attributes:
        b1: weight of the average x in y; the rest is that of the last iterate z.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
        weight_lr_power: an iterate counts in the average with this power of the highest rate so
            far.
    """

    name: str = "schedule_free_adamw"
    learning_rate: float = 2.5e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_lr_power: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        check(self, "b1", "b2", below=1.0)
        check(self, "b1", "eps", positive=True)
        check(self, "weight_lr_power")
        one_of("optimizer.schedule", self.schedule, ("constant",))

    def scale(self) -> Any:
        import optax

        return optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True)

    def transform(self, steps: int) -> Any:
        """See `FirstOrder`; the parameters of the transformation are y."""
        from optax import contrib

        base, rate = super().transform(steps), self.rate(steps)
        return contrib.schedule_free(base, rate, self.b1, self.weight_lr_power)

    def point(self, params: Any, opt_state: Any) -> Any:
        """Return y, given x and the state that holds z."""
        b1 = self.b1
        return jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, params, opt_state.z)

    def average(self, params: Any, opt_state: Any) -> Any:
        """Return x, given y."""
        from optax import contrib

        return contrib.schedule_free_eval_params(opt_state, params)


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

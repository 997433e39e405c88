"""Configurations of the optimizers without gradients, derived from the functions of `jaxlm.zo`.

A method's keyword arguments are the keys of its section, with the same defaults, bounds and
meaning. To add a method, add it to `ZEROTH_ORDER` with the learning rate at which the model of the
package learns; larger models need lower ones.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxlm import zo
from jaxlm.artifacts.keys import without_none
from jaxlm.core.checks import one_of
from jaxlm.core.errors import UserError
from jaxlm.train.settings import SECTION, Optimizer, check, meanings

SAMPLERS = Literal["gaussian", "rademacher", "sphere"]
SCHEDULED = ("schedule", "warmup", "floor", "cooldown")
"""Keys that make the learning rate; an argument of a method with such a name is another thing."""


@dataclass(frozen=True, kw_only=True)
class ZerothOrder(Optimizer):
    """Options shared by all optimizers without gradients.

    Attributes:
        eps: size of the perturbation; 1e-3 suits all parameters, 1e-1 prefixes, 1e-2 LoRA.
        num_directions: number of directions in a step.
        rounding: how parameters below float32 are rounded after an update: to the nearest number,
            or at random such that the mean is exact.
        sampler: distribution of the directions.
    """

    learning_rate: float = 1e-4
    eps: float = 1e-3
    num_directions: int = 1
    rounding: Literal["nearest", "stochastic"] = "nearest"
    method: ClassVar[Callable[..., zo.ZerothOrderOptimizer]]

    def __post_init__(self):
        super().__post_init__()
        check(self, *(f.name for f in dataclasses.fields(self) if f.type is float))
        try:
            self._build(self.learning_rate)
        except UserError as error:
            raise UserError(f"{SECTION}{error}") from None

    def build(self, steps: int) -> zo.ZerothOrderOptimizer:
        """Return the optimizer for a run of `steps` steps."""
        return self._build(self.rate(steps))

    def _build(self, rate: Any) -> zo.ZerothOrderOptimizer:
        keys = inspect.signature(type(self).method).parameters.keys()
        names = (f.name for f in dataclasses.fields(self) if f.name not in SCHEDULED)
        options = {name: getattr(self, name) for name in names} | {"learning_rate": rate}
        if "sampler" in options:
            one_of("sampler", options["sampler"], typing.get_args(SAMPLERS))
            options["sampler"] = getattr(zo, options["sampler"])()
        return type(self).method(**{key: options[key] for key in keys & options.keys()})


def configuration(
    method: Callable[..., zo.ZerothOrderOptimizer],
    learning_rate: float,
) -> type[Any]:
    """Derive the configuration of a method, such as `zo.mezo`, from its signature and docstring.

    Keywords become keys of the same name and default; a keyword that is not annotated as a number,
    a text or a truth value has the type of its default. Objects that a file cannot hold (`decay`,
    `mesh`), and those named as keys of the schedule (`SCHEDULED`), stay with the function. A
    sampler is given by its name.

    Args:
        method: a function with a whole signature.
        learning_rate: its default, which the function lacks.

    Returns:
        A frozen dataclass, a subclass of `ZerothOrder`.
    """
    fields: list[tuple[str, Any, Any]] = [("name", str, method.__name__)]
    fields.append(("learning_rate", float, learning_rate))
    inherited = {f.name: f for f in dataclasses.fields(Optimizer)}
    parameters = inspect.signature(method, eval_str=True).parameters
    declared = typing.get_type_hints(ZerothOrder)
    shared = {f.name for f in dataclasses.fields(ZerothOrder)} - {"name", *SCHEDULED}
    if missing := sorted(shared - parameters.keys()):  # otherwise the key would be ignored
        raise TypeError(f"{method.__name__} lacks the arguments {', '.join(missing)}")
    for key in sorted(parameters, key=lambda key: key != "sampler"):  # first in saved files, too
        default = parameters[key].default
        if key in inherited or key in ("decay", "mesh"):
            continue
        if key == "sampler":
            if (sampler := type(default).__name__.lower()) not in typing.get_args(SAMPLERS):
                raise TypeError(
                    f"{method.__name__}: sampler must default to one of {typing.get_args(SAMPLERS)}"
                )
            fields.append((key, SAMPLERS, sampler))
        else:
            annotated = parameters[key].annotation
            plain = without_none(annotated) in (bool, int, float, str)
            kind = declared.get(key, annotated if plain else type(default))
            fields.append((key, kind, default))
    name = method.__name__.title().replace("_", "")
    return dataclasses.make_dataclass(
        name,
        [(key, kind, dataclasses.field(default=default)) for key, kind, default in fields],
        bases=(ZerothOrder,),
        namespace={
            "__doc__": meanings(method, without={"sampler", *shared, *SCHEDULED}),
            "__module__": __name__,
            "method": staticmethod(method),
        },
        frozen=True,
        kw_only=True,
    )


ZEROTH_ORDER: dict[str, type[Any]] = {
    "mezo": configuration(zo.mezo, 2e-4),
    "mezo_momentum": configuration(zo.mezo_momentum, 1e-4),
    "mezo_adam": configuration(zo.mezo_adam, 3e-3),
    "meazo": configuration(zo.meazo, 3e-3),
    "fzoo": configuration(zo.fzoo, 1e-2),
    "lozo": configuration(zo.lozo, 1e-4),
    "zo_muon": configuration(zo.zo_muon, 1e-1),
}
Mezo = ZEROTH_ORDER["mezo"]

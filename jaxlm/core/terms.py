"""Losses with options: from a function to the row of a registry.

A loss is a function of arrays whose options are keywords. `configuration` derives a dataclass from
it, a `Term`, so that Python, a configuration file and error messages know the same options.
`terms` reads what a user gives: a name, a name with options, or a list with weights.
"""

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from jaxlm.core.checks import in_float32, integer, one_of, real, show
from jaxlm.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Term:
    """A loss with its options.

    Attributes:
        name: key in its registry.
        weight: factor in a sum of losses.
    """

    name: str
    weight: float = 1.0

    function: ClassVar[Callable[..., Any]]
    section: ClassVar[str] = "loss"
    """Key of the losses of the registry, for error messages."""
    bounds: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    """Bounds by `OPTION` or, for one loss, `NAME.OPTION`; other options are at least 0."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, key = getattr(self, field.name), f"{self.section}.{field.name}"
            if _is_choice(field.type):
                one_of(key, value, typing.get_args(field.type))
            elif field.type is int:
                integer(key, value, least=0)
            elif field.type is float:
                free = {} if field.name == "weight" else {"least": 0.0}
                of_option = self.bounds.get(field.name, free)
                real(key, value, **self.bounds.get(f"{self.name}.{field.name}", of_option))
                in_float32(key, value)

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `function`."""
        return {name: getattr(self, name) for name in _options(type(self).function)}


def _options(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {name: x for name, x in parameters.items() if x.kind is x.KEYWORD_ONLY}


def _is_choice(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal


def configuration(
    function: Callable[..., Any], base: type[Term], meanings: Mapping[str, str], **attributes: Any
) -> type[Any]:
    """Derive the dataclass of a loss from its function: keywords become fields of the same name.

    Args:
        function: named as the loss. An option is a whole number or one of several words if it is
            annotated so, and otherwise a number.
        base: a subclass of `Term`.
        meanings: what each option is.
        attributes: class attributes.
    """
    options = _options(function)
    kinds = {
        name: x.annotation if x.annotation is int or _is_choice(x.annotation) else float
        for name, x in options.items()
    }
    first = inspect.cleandoc(function.__doc__ or "").partition("\n")[0]
    lines = [f"{name}: {meanings[name]}" for name in options]
    fields: list[Any] = [("name", str, dataclasses.field(default=function.__name__))]
    fields += [(k, kinds[k], dataclasses.field(default=x.default)) for k, x in options.items()]
    return dataclasses.make_dataclass(
        function.__name__.title().replace("_", ""),
        fields,
        bases=(base,),
        namespace={
            "__doc__": "\n".join([first, "", "Attributes:", *lines]),
            "__module__": function.__module__,
            "function": staticmethod(function),
            **attributes,
        },
        frozen=True,
        kw_only=True,
    )


TermSpec: TypeAlias = str | Term | Mapping[str, Any] | Sequence[Any]
"""A name, a loss, `{name: dpo, weight: 0.8, beta: 0.1}`, `("dpo", 0.8)`, or a list of these."""


def terms(losses: TermSpec, registry: Mapping[str, type[Any]], **shared: Any) -> tuple[Any, ...]:
    """Return the losses of a specification, see `TermSpec`.

    Args:
        losses: a name, or several with their options.
        registry: the losses by their names; the first is the default.
        shared: options that replace those of every loss that has them; None replaces nothing.

    Raises:
        UserError: a name or an option is unknown, or its value out of range.
    """
    shared = {option: value for option, value in shared.items() if value is not None}
    section = next(iter(registry.values())).section
    if isinstance(losses, Term):
        own = {option: value for option, value in shared.items() if hasattr(losses, option)}
        return (dataclasses.replace(losses, **own),)
    if isinstance(losses, str):
        losses = {"name": losses}
    elif isinstance(losses, tuple) and len(losses) == 2 and isinstance(losses[1], int | float):
        losses = {"name": losses[0], "weight": losses[1]}
    if not isinstance(losses, Mapping):
        if not losses or not isinstance(losses, list | tuple):
            raise UserError(
                f"{section}: must name a loss (got {show(losses)}). Give one, or a list."
            )
        return tuple(term for each in losses for term in terms(each, registry, **shared))
    name = losses.get("name", next(iter(registry)))
    if not isinstance(name, str) or name not in registry:
        raise _refuse(section, name, "not known", [*registry])
    known = [field.name for field in dataclasses.fields(registry[name])]
    for option in losses:
        if option not in known:
            raise _refuse(section, option, f"not an option of {name}", known)
    own = {option: value for option, value in shared.items() if option in known}
    return (registry[name](**dict(losses) | own),)


def _refuse(key: str, value: Any, what: str, choices: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(choices)}."
    return UserError(f"{key}: {what} (got {show(value)}). {hint}")

"""The keys of a configuration: their types, defaults and meanings, read from its dataclasses."""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any, Literal, NamedTuple, cast


class Key(NamedTuple):
    """A key of a configuration.

    Attributes:
        dotted: its path.
        kind: its declared type as text.
        default: `MISSING` if required.
        meaning: what the docstring of its dataclass says about it.
        form: which of `forms` of its section has the key; empty if there is only one form.
    """

    dotted: str
    kind: str
    default: Any
    meaning: str
    form: str = ""
    forms: tuple[str, ...] = ("",)


def keys_of(cls: Any, prefix: str = "", instance: Any = None) -> Iterator[Key]:
    """Yield every key of a dataclass and of its sections; `instance` gives other defaults."""
    hints, meanings = typing.get_type_hints(cls), _attributes(cls)
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        dotted, kind, default = prefix + f.name, hints[f.name], default_of(f, instance)
        registry = f.metadata.get("registry", {})
        text = " | ".join(registry) or _kind_text(kind)
        yield Key(dotted, text, default, meanings.get(f.name, ""))
        for name, section in registry.items():
            for key in keys_of(section, f"{dotted}."):
                if key.dotted != f"{dotted}.name":
                    yield key if key.form else key._replace(form=name, forms=tuple(registry))
        kind = without_none(kind)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if not registry and dataclasses.is_dataclass(kind):
            inner = default if isinstance(default, cast(type, kind)) else None
            yield from keys_of(kind, f"{dotted}.", inner)
        elif origin is dict and dataclasses.is_dataclass(arguments[1]):
            yield from keys_of(arguments[1], f"{dotted}.NAME.")
        elif origin is tuple and not registry and dataclasses.is_dataclass(arguments[0]):
            yield from keys_of(arguments[0], f"{dotted}[0].")


def default_of(f: Any, instance: Any = None) -> Any:
    """Return the default of a field, or `MISSING`; `instance` gives another one."""
    if instance is not None:
        return getattr(instance, f.name)
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _attributes(cls: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass and its bases say about each attribute."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, lines = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        name = ""
        for line in textwrap.dedent(lines.split("\n\n")[0]).splitlines():
            found = re.match(r"(\w+): (.*)", line)
            name, text = found.groups() if found else (name, line.strip())
            meanings[name] = text if found else f"{meanings.get(name, '')} {text}"
    # Docstrings use Python's None, while readers of the help write YAML.
    return {name: re.sub(r"\bNone\b", "null", text) for name, text in meanings.items()}


def listing(cls: Any) -> str:
    """Return every key of a configuration with type, default and meaning, for a command's help.

    A key that forms of a section share is listed once, with the forms that have each default.
    """
    rows: dict[Key, dict[str, list[str]]] = {}
    for key in keys_of(cls):
        row = rows.setdefault(key._replace(default=None, form=""), {})
        row.setdefault(_default_text(key.default), []).append(key.form)
    lines = [
        "Keys of the file (`a: {b: 1}`), which are flags too (`--a.b=1`), with their defaults:"
    ]
    for key, defaults in rows.items():
        shared = len(defaults) == 1 and [*key.forms] in defaults.values()
        texts = [
            text if shared else f"{text} ({', '.join(forms)})" for text, forms in defaults.items()
        ]
        head = f"{key.dotted}: {key.kind} = {', '.join(texts)}"
        lines += textwrap.wrap(head, 98, initial_indent="  ", subsequent_indent=" " * 8)
        lines += textwrap.wrap(key.meaning, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _kind_text(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(_kind_text(a) for a in arguments)
    if origin is Literal:
        return " | ".join(map(choice_text, arguments))
    if origin is tuple:
        return f"list of {_kind_text(arguments[0])}"
    if kind is type(None):
        return "null"
    return kind.__name__ if kind in (int, float, bool, str) else "section"


def _default_text(default: Any) -> str:
    if default is MISSING:
        return "required"
    if default is None:
        return "null"
    if isinstance(default, tuple) and [*map(dataclasses.is_dataclass, default)] == [True]:
        default = default[0]  # one stands for the list of it
    if isinstance(default, tuple) and not any(map(dataclasses.is_dataclass, default)):
        return f"[{', '.join(map(choice_text, default))}]"
    if isinstance(default, tuple | dict) or dataclasses.is_dataclass(default):
        return getattr(default, "name", "{}" if default == {} else "see below")
    return choice_text(default) or '""'


def without_none(kind: Any) -> Any:
    """Return `X` for the type `X | None`."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return next(a for a in typing.get_args(kind) if a is not type(None)) if union else kind


def choice_text(choice: Any) -> str:
    """Return a choice as YAML spells it."""
    return str(choice).lower() if isinstance(choice, bool) else str(choice)

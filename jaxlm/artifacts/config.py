"""Configurations: YAML files and flags become frozen dataclasses.

Scalars stay text until the declared type of their field converts them, since YAML's own types are
traps: PyYAML reads `1e-3` as text and the label word `no` as false. Flags are read like the file.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import yaml

from jaxlm.artifacts.keys import choice_text, default_of, keys_of, without_none
from jaxlm.artifacts.yaml import parse_yaml, read_yaml
from jaxlm.core.checks import show
from jaxlm.core.errors import UserError

T = TypeVar("T")

COMMAND_LINE = "command line"


def load(
    cls: type[T],
    path: str | Path | None,
    overrides: Mapping[str, str] | None = None,
    *,
    only: Collection[str] | None = None,
) -> T:
    """Read a YAML file, None for the defaults alone, apply the flags, and build `cls`.

    `overrides` are flags, dotted key to text; `only` names the first-level keys to read.
    """
    data = read_yaml(path) if path else {}
    data = {key: value for key, value in data.items() if only is None or key in only}
    flags = overrides or {}
    for dotted, value in flags.items():
        if part := next((name for name in flags if name.startswith(f"{dotted}.")), None):
            raise UserError(f"--{dotted}: contains --{part} (got both). Keep one.")
        put(data, dotted, value, COMMAND_LINE)
    return build(cls, data, str(path or COMMAND_LINE), flags=flags)


def build(
    cls: type[T],
    data: Mapping[str, Any],
    where: str,
    section: str = "",
    flags: Collection[str] = (),
) -> T:
    """Build the frozen dataclass `cls` from text, or from values of Python.

    If a field has metadata `registry` (name to dataclass), the key `name` of its section chooses
    the dataclass; the default is the first. Metadata `make` is a function that builds the field
    from the mapping of its converted values. For messages, `where` is the file, `section` the
    dotted path of this dataclass in it, and `flags` the dotted keys that the command line gave.
    """
    prefix = f"{section}." if section else ""
    known = tuple(dict.fromkeys(key.dotted for key in keys_of(cls, prefix)))
    reader = _Reader(where, known, frozenset(flags))
    if not isinstance(data, Mapping):
        raise reader.error(section, data, "must be a section", "Give keys with values.")
    return reader.section(cls, data, section)


def put(data: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Set a dotted key in nested sections, in place; `where` is for messages."""
    *sections, last = dotted.split(".")
    for name in sections:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise UserError(
                f"{where}: {dotted}: {name} is not a section (got {show(data)}). Correct it."
            )
    data[last] = value


@dataclass(frozen=True)
class _Reader:
    """Converts text, lists and mappings to the declared types.

    `known` are the dotted keys of the whole configuration, for suggestions.
    """

    where: str
    known: tuple[str, ...]
    flags: frozenset[str]

    def source(self, key: str) -> str:
        """Return the origin of a key: the command line if it gave it, its section or a part."""
        pairs = ((f"{key.split('[')[0]}.", f"{flag}.") for flag in self.flags)
        given = any(a.startswith(b) or b.startswith(a) for a, b in pairs)
        return COMMAND_LINE if given else self.where

    def error(self, key: str, value: Any, what: str, todo: str) -> UserError:
        """Return the error about the value of a key."""
        return UserError(f"{self.source(key)}: {key}: {what} (got {_shown(value)}). {todo}")

    def section(
        self,
        cls: type[T],
        data: Mapping[str, Any],
        section: str,
        make: Callable[..., T] | None = None,
    ) -> T:
        """Build a dataclass, or what `make` returns for its converted values."""
        fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
        hints, prefix = typing.get_type_hints(cls), f"{section}." if section else ""
        values: dict[str, Any] = {}
        for name, value in data.items():
            key = f"{prefix}{name}"
            if name not in fields:
                todo = self._suggestion(name, prefix, fields)
                raise self.error(key, value, "is not a key", todo)
            values[name] = self.convert(value, hints[name], key, fields[name].metadata)
        for name, f in fields.items():
            if make is None and name not in values and default_of(f) is MISSING:
                where = self.source(section)
                raise UserError(f"{where}: {prefix}{name}: is missing (got nothing). Add it.")
        try:
            if make is not None:
                return make(values)
            return cls(**values)
        except UserError as error:
            key, colon, message = str(error).partition(":")
            key = _full_key(key, section, fields)
            raise UserError(f"{self.source(key)}: {key}{colon}{message}") from None

    def convert(
        self,
        value: Any,
        kind: Any,
        key: str,
        metadata: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> Any:
        """Convert text, a list or a mapping to the declared type `kind`."""
        value = _as_read(value)
        if value in _NULL and type(None) in typing.get_args(kind):
            return None
        kind = without_none(kind)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if "registry" in metadata:
            if origin is tuple:  # one, or a list of several
                items = self._parsed(value, key)
                items = items if isinstance(items, list | tuple) else [items]
                one = arguments[0]
                return tuple(
                    self.convert(item, one, f"{key}[{i}]" if len(items) > 1 else key, metadata)
                    for i, item in enumerate(items)
                )
            registry, data = metadata["registry"], self._mapping(value, key)
            self._one_of(name := data.get("name", next(iter(registry))), registry, f"{key}.name")
            return self.section(registry[name], data, key)
        if dataclasses.is_dataclass(kind):
            data = self._mapping(value, key)
            return self.section(cast(Any, kind), data, key, metadata.get("make"))
        if origin is dict:
            data = self._mapping(value, key)
            inner = arguments[1] if arguments else Any
            return {
                self.convert(name, str, key): item
                if inner is Any
                else self.convert(item, inner, f"{key}.{name}")
                for name, item in data.items()
            }
        if origin is tuple:
            items = self._parsed(value, key)
            if not isinstance(items, list | tuple):
                raise self.error(key, value, "must be a list", "Write [a, b].")
            return tuple(
                self.convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(items)
            )
        if origin is Literal:
            choices = {choice_text(argument): argument for argument in arguments}
            self._one_of(value, choices, key)
            return choices[value]
        wanted, scalar = _SCALARS[kind]
        try:
            if isinstance(value, str):
                return scalar(value)
        except (ValueError, KeyError):
            pass
        raise self.error(key, value, f"must be {wanted}", "Correct it.")

    def _mapping(self, value: Any, key: str) -> dict[str, Any]:
        """Return a section; text stands for its key `name`."""
        data = self._parsed(value, key)
        if isinstance(data, str) and data:
            data = {"name": data}
        if not isinstance(data, dict):
            raise self.error(key, value, "must be a section", "Give keys with values.")
        return data

    def _parsed(self, value: Any, key: str) -> Any:
        """Parse text as YAML where a list or a section is wanted, as in `--seeds='[0, 1]'`."""
        try:
            return parse_yaml(value) if isinstance(value, str) else value
        except yaml.YAMLError:
            return value
        except UserError as error:
            raise UserError(f"{self.source(key)}: {error}") from None

    def _one_of(self, value: Any, choices: Collection[str], key: str) -> None:
        if not isinstance(value, str) or value not in choices:
            near = (
                difflib.get_close_matches(value, choices, 1, 0.65) if isinstance(value, str) else ()
            )
            todo = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(choices)}."
            raise self.error(key, value, "is not known", todo)

    def _suggestion(self, name: str, prefix: str, fields: Mapping[str, Any]) -> str:
        """Name the most similar key of all levels, preferring those of the same section."""

        def likeness(dotted: str) -> float:
            section, _, last = dotted.rpartition(".")
            near = difflib.SequenceMatcher(None, str(name), last).ratio()
            return near + (0.15 if f"{section}." == prefix or section == prefix else 0)

        here = (prefix + field for field in fields)  # first, to win ties with sections.NAME.field
        best = max((*here, *self.known), key=likeness, default="")
        # A key that is known but not accepted here belongs to another form: sgd has no eps.
        if best and likeness(best) >= 0.6 and f"{prefix}{name}" not in self.known:
            return f"Did you mean {best}?"
        return f"The keys are {', '.join(fields)}."


def _as_read(value: Any) -> Any:
    """Return a value of Python as files have it: text, or a list or mapping of such values."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _as_read(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_read(item) for item in value]
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return repr(value).lower()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _full_key(key: str, section: str, fields: Collection[str]) -> str:
    """Prefix the section to the key in a dataclass's own message, which names only its field."""
    first, last = (re.split(r"[.\[]", name)[0] for name in (key, section.rpartition(".")[2]))
    if not section or key.startswith(section):
        return key
    if first in fields:
        return f"{section}.{key}"
    return f"{section}{key.removeprefix(first)}" if first == last else key


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return show(value) if value else "nothing"
    kinds = ((list | tuple, "a list"), (Mapping, "a section"))
    return next((name for kind, name in kinds if isinstance(value, kind)), show(value))


def _whole(text: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise ValueError
    return int(text) if text.lstrip("+-").isdecimal() else int(number)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _unicode(text: str) -> str:
    text.encode()  # fails for half of a surrogate pair, from an argument in another encoding
    if "\0" in text:
        raise ValueError
    return text


_NULL = ("null", "~", "")
_SCALARS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", _whole),
    float: ("a finite number", _finite),
    bool: ("true or false", {"true": True, "false": False}.__getitem__),
    str: ("a text in UTF-8 without NUL", _unicode),
}

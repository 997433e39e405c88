"""Configurations: a YAML file and `--dotted.path=value` flags become a frozen dataclass.

Every scalar stays text until the declared type of its field converts it. So `1e-3` is a number
where a number is wanted, `yes` and `no` are words where words are wanted, and a flag is read like
the file.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from jaxlm.core.errors import UserError
from jaxlm.train.run_folder import differences, to_dict

__all__ = [
    "build",
    "differences",
    "load",
    "parse_args",
    "put",
    "read_yaml",
    "split_args",
    "to_dict",
]

T = TypeVar("T")


class _Flag(str):
    """A value from the command line; parsed as YAML only where a list or a section is wanted."""


def split_args(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits arguments into words and flags; `--name value` is read like `--name=value`."""
    words: list[str] = []
    flags: dict[str, str] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key} has no value: write --{key}=value.")
            value = rest.pop(0)
        flags[key.replace("-", "_")] = value
    return words, flags


def parse_args(args: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Splits `[config.yaml | --config config.yaml] --dotted.path=value ...` into file and flags."""
    files, overrides = split_args(args)
    if "config" in overrides:
        files.append(str(overrides.pop("config")))
    if len(files) > 1:
        raise UserError(f"two configuration files, {files[0]} and {files[1]}: give one.")
    return (files[0] if files else None), overrides


def load(
    cls: type[T],
    path: str | Path | None,
    overrides: Mapping[str, str] | None = None,
    *,
    only: Container[str] | None = None,
) -> T:
    """Reads `path` (None: nothing but defaults), applies the overrides, and builds `cls`.

    Args:
        cls: see `build`.
        path: YAML file.
        overrides: dotted path to text.
        only: first-level keys of the file that are read; None for all.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, or a value does not fit.
    """
    data = read_yaml(path) if path else {}
    data = {key: value for key, value in data.items() if only is None or key in only}
    for dotted, value in (overrides or {}).items():
        put(data, dotted, _Flag(value), "command line")
    return build(cls, data, str(path or "command line"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping with every scalar as text."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file: give the path of a configuration."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason}): give a YAML file.") from None
    try:
        data = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: not valid YAML: put text with braces, colons or # in quotes."
        ) from None
    if data is None or data == "":
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a configuration: write it as lines `key: value`.")
    return data


def build(
    cls: type[T],
    data: Mapping[str, Any],
    where: str,
    section: str = "",
    make: Callable[..., T] | None = None,
) -> T:
    """Builds the frozen dataclass `cls` from text values.

    Args:
        cls: the dataclass. A field with metadata `registry` (name to dataclass) is built as the
            dataclass that its `name` key chooses, the first one where there is none; null stays
            None where that is the default. One with metadata `make` is built by that function from
            the mapping of its converted values.
        data: key to text, list or mapping.
        where: the file, for messages.
        section: dotted path of this dataclass in the file, for messages.
        make: function of the mapping of values to call in place of `cls`.
    """
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
    hints = typing.get_type_hints(cls)
    prefix = f"{section}." if section else ""
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in fields:
            raise UserError(f"{where}: unknown key '{prefix}{name}': {_offer(name, fields)}")
        kind, extra = hints[name], fields[name].metadata
        none = value in _NULL and fields[name].default is None
        if "registry" in extra and not none:
            value = _section(value, where, prefix + name)
            kind = _chosen(extra["registry"], value, where, name)
        if "make" in extra and not none:
            kind = next((a for a in typing.get_args(kind) if a is not type(None)), kind)
            value = _section(value, where, prefix + name)
            values[name] = build(kind, value, where, prefix + name, extra["make"])
        else:
            values[name] = _convert(value, kind, where, prefix + name)
    try:
        if make is not None:
            return make(values)
        for name, f in fields.items():
            default = f.default is not MISSING or f.default_factory is not MISSING
            if name not in values and not default:
                raise UserError(f"{prefix}{name} is missing: add it.")
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _chosen(registry: Mapping[str, Any], section: dict[str, Any], where: str, name: str) -> Any:
    chosen = section.get("name", next(iter(registry)))
    if chosen not in registry:
        known = ", ".join(registry)
        raise UserError(f"{where}: unknown {name} '{chosen}': choose one of {known}.")
    return registry[chosen]


def put(data: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Sets the value of a dotted key in nested sections, in place; `where` is for messages."""
    *sections, last = dotted.split(".")
    for name in sections:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise UserError(f"{where}: {dotted} is below {name}, which is no section: correct it.")
    data[last] = value


def _offer(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"the keys are {', '.join(known)}."


def _section(value: Any, where: str, dotted: str) -> dict[str, Any]:
    if isinstance(value, str) and value:
        value = _parse_flag(value) if isinstance(value, _Flag) else value
    if isinstance(value, str) and value:
        value = {"name": value}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {dotted} is {_show(value)}: give a section of keys.")
    return value


def _parse_flag(value: str) -> Any:
    import yaml

    try:
        return yaml.load(value, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return str(value)


def _convert(value: Any, kind: Any, where: str, dotted: str) -> Any:
    """Turns text, a list or a mapping into the declared type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value in _NULL and type(None) in arguments:
            return None
        kind = next(a for a in arguments if a is not type(None))
        return _convert(value, kind, where, dotted)
    if dataclasses.is_dataclass(kind):
        data = _section(value, where, dotted)
        return build(cast(Any, kind), data, where, dotted)
    if origin is dict:
        section = _section(value, where, dotted)
        if arguments[1:] in ((), (Any,)):
            return section
        return {k: _convert(v, arguments[1], where, f"{dotted}.{k}") for k, v in section.items()}
    if origin is tuple:
        value = _parse_flag(value) if isinstance(value, _Flag) else value
        if not isinstance(value, list):
            raise UserError(f"{where}: {dotted} is {_show(value)}: give a list [a, b].")
        return tuple(
            _convert(v, arguments[0], where, f"{dotted}[{i}]") for i, v in enumerate(value)
        )
    if origin is Literal:
        choices = {_text(argument): argument for argument in arguments}
        if value not in choices:
            raise UserError(f"{where}: {dotted} is '{value}': choose one of {', '.join(choices)}.")
        return choices[value]
    if isinstance(value, str):
        try:
            return _SCALARS[kind](str(value))
        except (ValueError, KeyError):
            pass
    raise UserError(f"{where}: {dotted} is {_show(value)}: give {_WORDS[kind]}.")


def _text(choice: Any) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _whole(text: str) -> int:
    number = float(text)
    if number != int(number):
        raise ValueError
    return int(text) if text.lstrip("+-").isdecimal() else int(number)


_NULL = ("null", "~", "")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_SCALARS: dict[Any, Callable[[str], Any]] = {
    int: _whole,
    float: float,
    bool: {"true": True, "false": False}.__getitem__,
    str: str,
}


def _show(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'" if value else "empty"
    return "a list" if isinstance(value, list) else "a section"

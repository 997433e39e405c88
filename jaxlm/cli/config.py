"""Configurations: a YAML file and `--dotted.path=value` flags become a frozen dataclass.

Every scalar stays text until the declared type of its field converts it. So `1e-3` is a number
where a number is wanted, `yes` and `no` are words where words are wanted, and a flag is read like
the file.
"""

import dataclasses
import difflib
import inspect
import itertools
import math
import re
import stat
import textwrap
import types
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml

from jaxlm.artifacts.files import file_path, read_text
from jaxlm.core.checks import show
from jaxlm.core.errors import UserError
from jaxlm.train.run_folder import differences, to_dict

__all__ = [
    "build",
    "differences",
    "listing",
    "load",
    "parse_args",
    "parse_model_args",
    "put",
    "read_yaml",
    "split_args",
    "to_dict",
]

T = TypeVar("T")

COMMAND_LINE = "command line"

_MOST_BYTES, _MOST_VALUES, _MOST_DEPTH = 2**22, 100_000, 50
"""Of a file: more is no configuration, or one whose aliases unfold without an end."""


class _Flag(str):
    """A value from the command line; parsed as YAML only where a list or a section is wanted."""


class _Loader(yaml.BaseLoader):
    """Scalars are text, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, key.value
            if isinstance(key, yaml.ScalarNode) and name in lines:
                where = f"lines {lines[name]} and {line}" if line > lines[name] else f"line {line}"
                raise UserError(f"{name}: stands twice, in {where}. Keep one.")
            if isinstance(key, yaml.ScalarNode):
                lines[name] = line
        return super().construct_mapping(node, deep=deep)


def split_args(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits arguments into words and flags; `--name value` is read like `--name=value`.

    Raises:
        UserError: a flag has no value, or stands twice.
    """
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
                raise UserError(f"--{key}: has no value (got nothing). Write --{key}=VALUE.")
            value = rest.pop(0)
        name = key.replace("-", "_")
        if name in flags:
            raise UserError(
                f"--{key}: stands twice (got {show(flags[name])} and {show(value)}). Keep one."
            )
        flags[name] = value
    return words, flags


def parse_args(args: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Splits `[config.yaml | --config config.yaml] --dotted.path=value ...` into file and flags."""
    files, overrides = split_args(args)
    if "config" in overrides:
        files.append(str(overrides.pop("config")))
    if len(files) > 1:
        raise UserError(
            f"{COMMAND_LINE}: two configuration files (got {files[0]} and {files[1]}). Give one."
        )
    if not files:
        return None, overrides
    path = str(file_path(files[0], "config"))
    # As it was typed: `./x` is a folder, and `x` may be a name of the hub.
    return path if files[0].startswith("~") else files[0], overrides


def parse_model_args(args: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """`parse_args` where the word may be a model, which then becomes the flag `model`."""
    path, flags = parse_args(args)
    if path is None or path.endswith((".yaml", ".yml")):
        return path, flags
    if "model" in flags:
        raise UserError(f"--model: is given beside {path} (got {show(flags['model'])}). Keep one.")
    return None, {**flags, "model": path}


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
    flags = overrides or {}
    for dotted, value in flags.items():
        if below := next((name for name in flags if name.startswith(f"{dotted}.")), None):
            raise UserError(
                f"--{dotted}: is given beside --{below}, which is a part of it. Keep one."
            )
        put(data, dotted, _Flag(value), COMMAND_LINE)
    return build(cls, data, str(path or COMMAND_LINE))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping with every scalar as text.

    Raises:
        UserError: there is no such file, it is none that a configuration can be, or no YAML.
    """
    file = file_path(path, "config")
    try:
        status = file.stat()
        # A shell gives the output of a command as /dev/fd/63; any other pipe may wait for ever.
        if not stat.S_ISREG(status.st_mode) and file.parent != Path("/dev/fd"):
            raise UserError(f"{path}: is no file. Give a YAML file.")
        if status.st_size > _MOST_BYTES:
            raise UserError(f"{path}: larger than {_MOST_BYTES >> 20} MiB. Give a YAML file.")
        text = read_text(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: there is no such file. Give the path of a configuration."
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give a YAML file.") from None
    try:
        data = _parse(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: not valid YAML. Put text with braces, colons or # in quotes."
        ) from None
    if data is None or data == "":
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a configuration. Write it as lines `key: value`.")
    return data


def _parse(text: str) -> Any:
    """The value of a YAML text; `yaml.YAMLError` where it is none."""
    try:
        # Before it is parsed, since PyYAML takes the square of the depth.
        steps = ((letter in "[{") - (letter in "]}") for letter in text)
        if max(itertools.accumulate(steps), default=0) > _MOST_DEPTH:
            raise RecursionError
        data = yaml.load(text, Loader=_Loader)
        if _size(data, {}) > _MOST_VALUES:
            raise UserError(f"aliases: unfold to more than {_MOST_VALUES} values. Write fewer.")
    except RecursionError:
        raise UserError("sections: nested too deeply. Write fewer inside each other.") from None
    return data


def _size(value: Any, known: dict[int, int], key: str = "text") -> int:
    """How many texts there are when each alias is written out; what is shared is counted once."""
    if isinstance(value, str):
        try:
            _unicode(value)
        except ValueError:
            raise UserError(
                f"{key}: must be {_WORDS[str]} (got {value[:20]!a}). Correct it."
            ) from None
        return 1
    if value is None:  # an empty text
        return 1
    if id(value) not in known:
        is_section = isinstance(value, dict)
        items = value.items() if is_section else ((key, item) for item in value)
        known[id(value)] = 1 + sum(
            _size(item, known, str(name)) + (is_section and _size(name, known, key))
            for name, item in items
        )
    return known[id(value)]


def build(
    cls: type[T],
    data: Mapping[str, Any],
    where: str,
    section: str = "",
) -> T:
    """Builds the frozen dataclass `cls` from text values.

    Args:
        cls: the dataclass. A field with metadata `registry` (name to dataclass) is built as the
            dataclass that its `name` key chooses, the first one where there is none; null stays
            None where that is the default. One with metadata `make` is built by that function from
            the mapping of its converted values.
        data: key to text, list or mapping.
        where: the file, for messages; values of flags are said to be of the command line.
        section: dotted path of this dataclass in the file, for messages.

    Raises:
        UserError: a key is unknown or missing, or a value does not fit.
    """
    if not isinstance(data, Mapping):
        raise UserError(
            f"{where}: {section}: must be a section (got {show(data)}). Give keys with values."
        )
    prefix = f"{section}." if section else ""
    known = tuple(dict.fromkeys(key.dotted for key in _keys(cls, prefix)))
    return _Reader(where, known).build(cls, data, section)


def put(data: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Sets the value of a dotted key in nested sections, in place; `where` is for messages."""
    *sections, last = dotted.split(".")
    for name in sections:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise UserError(f"{where}: {dotted}: is below {name}, which is no section. Correct it.")
    data[last] = value


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Turns text, lists and mappings into values of declared types.

    Attributes:
        where: the file, for messages.
        known: dotted keys of the whole configuration.
    """

    where: str
    known: tuple[str, ...]

    def error(self, dotted: str, value: Any, what: str, todo: str) -> UserError:
        """What is wrong with the value of a key, or of a flag."""
        return UserError(
            f"{_source(value, self.where)}: {dotted}: {what} (got {_shown(value)}). {todo}."
        )

    def build(
        self,
        cls: type[T],
        data: Mapping[str, Any],
        section: str,
        make: Callable[..., T] | None = None,
    ) -> T:
        """See `jaxlm.cli.config.build`; `make` is a function of the values to call for `cls`."""
        fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
        hints = typing.get_type_hints(cls)
        prefix = f"{section}." if section else ""
        values: dict[str, Any] = {}
        for name, value in data.items():
            if name not in fields:
                source, offer = _source(value, self.where), self._offer(name, prefix, fields)
                raise UserError(f"{source}: {prefix}{name}: is no key. {offer}")
            kind, extra = hints[name], fields[name].metadata
            none = value in _NULL and fields[name].default is None
            reader, dotted = self.of(value), prefix + name
            if none or not ("registry" in extra or "make" in extra):
                values[name] = reader.convert(value, kind, dotted)
                continue
            value = reader.section(value, dotted)
            if "registry" in extra:
                values[name] = reader.build(
                    reader.chosen(extra["registry"], value, dotted), value, dotted
                )
            else:
                values[name] = reader.build(_given(kind), value, dotted, extra["make"])
        try:
            if make is not None:
                return make(values)
            for name, f in fields.items():
                if name not in values and _default(f, None) is MISSING:
                    raise UserError(f"{prefix}{name}: is missing. Add it.")
            return cls(**values)
        except UserError as error:
            message, key = _completed(str(error), section, fields)
            source = _source(_lookup(data, key.removeprefix(prefix)), self.where)
            raise UserError(f"{source}: {message}") from None

    def of(self, value: Any) -> "_Reader":
        """The reader of what a flag holds, or this one."""
        return dataclasses.replace(self, where=_source(value, self.where))

    def chosen(self, registry: Mapping[str, Any], section: dict[str, Any], dotted: str) -> Any:
        """The dataclass that a section names, or the first one."""
        name = section.get("name", next(iter(registry)))
        if not isinstance(name, str) or name not in registry:
            known = ", ".join(registry)
            raise self.error(f"{dotted}.name", name, "is not known", f"Choose one of {known}")
        return registry[name]

    def section(self, value: Any, dotted: str) -> dict[str, Any]:
        """A mapping; a text that is none stands for its key `name`."""
        if isinstance(value, str) and value:
            value = self.parsed(value) if isinstance(value, _Flag) else value
        if isinstance(value, str) and value:
            value = {"name": value}
        if not isinstance(value, dict):
            raise self.error(dotted, value, "must be a section", "Give keys with values")
        return value

    def parsed(self, value: str) -> Any:
        """What a flag holds, or its text where that is no YAML."""
        try:
            return _parse(value)
        except yaml.YAMLError:
            return str(value)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None

    def convert(self, value: Any, kind: Any, dotted: str) -> Any:
        """Turns text, a list or a mapping into the declared type `kind`."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (types.UnionType, typing.Union):
            if value in _NULL and type(None) in arguments:
                return None
            return self.convert(value, _given(kind), dotted)
        if dataclasses.is_dataclass(kind):
            return self.build(cast(Any, kind), self.section(value, dotted), dotted)
        if origin is dict:
            section = self.section(value, dotted)
            if arguments[1:] in ((), (Any,)):
                return section
            return {
                key: self.of(item).convert(item, arguments[1], f"{dotted}.{key}")
                for key, item in section.items()
            }
        if origin is tuple:
            found = self.parsed(value) if isinstance(value, _Flag) else value
            if not isinstance(found, list):
                raise self.error(dotted, value, "must be a list", "Write [a, b]")
            return tuple(
                self.convert(item, arguments[0], f"{dotted}[{i}]") for i, item in enumerate(found)
            )
        if origin is Literal:
            choices = {_text(argument): argument for argument in arguments}
            if not isinstance(value, str) or value not in choices:
                raise self.error(
                    dotted, value, "is not known", f"Choose one of {', '.join(choices)}"
                )
            return choices[value]
        if isinstance(value, str):
            try:
                return _SCALARS[kind](str(value))
            except (ValueError, KeyError):
                pass
        raise self.error(dotted, value, f"must be {_WORDS[kind]}", "Correct it")

    def _offer(self, name: str, prefix: str, fields: Mapping[str, Any]) -> str:
        """A key that may be meant: of this section rather than of another one."""

        def likeness(dotted: str) -> float:
            section, _, last = dotted.rpartition(".")
            near = difflib.SequenceMatcher(None, str(name), last).ratio()
            return near + (0.15 if f"{section}." == prefix or section == prefix else 0)

        here = (prefix + field for field in fields)  # before sections.NAME.field
        best = max((*here, *self.known), key=likeness, default="")
        # A key that is known is of another form of the section: sgd has no eps.
        if best and likeness(best) >= 0.6 and prefix + str(name) not in self.known:
            return f"Did you mean {best}?"
        return f"The keys are {', '.join(fields)}."


def _source(value: Any, where: str) -> str:
    """The command line, where a value is of it alone; else the file."""
    if isinstance(value, _Flag):
        return COMMAND_LINE
    if isinstance(value, dict) and value:
        sources = {_source(item, where) for item in value.values()}
        return sources.pop() if len(sources) == 1 else where
    return where


def _completed(message: str, section: str, fields: Mapping[str, Any]) -> tuple[str, str]:
    """A message of a dataclass, which does not know its section, with the whole key; and that."""
    found = re.match(r"[\w.\[\]-]+", message)
    key = found[0].rstrip(".") if found else ""
    outer, _, last = section.rpartition(".")
    missing = ""
    if section and not key.startswith(section):
        if key.partition(".")[0] in fields:
            missing = f"{section}."
        elif key.startswith(last) and outer:
            missing = f"{outer}."
    return missing + message, missing + key


def _lookup(data: Any, key: str) -> Any:
    """The value of a dotted key, or of the first part of it that is no section."""
    for name in key.split("."):
        if not isinstance(data, Mapping) or name not in data:
            return data if isinstance(data, _Flag) else None
        data = data[name]
    return data


def _given(kind: Any) -> Any:
    """A type without None."""
    arguments = typing.get_args(kind) if _is_union(kind) else (kind,)
    return next(a for a in arguments if a is not type(None))


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _text(choice: Any) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


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
    text.encode()  # of half a character, such as an argument in another encoding has
    if "\0" in text:
        raise ValueError
    return text


_NULL = ("null", "~", "")
_WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text in UTF-8 without NUL",
}
_SCALARS: dict[Any, Callable[[str], Any]] = {
    int: _whole,
    float: _finite,
    bool: {"true": True, "false": False}.__getitem__,
    str: _unicode,
}


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return show(str(value)) if value else "nothing"
    return "a list" if isinstance(value, list) else "a section"


class _Key(typing.NamedTuple):
    """A key of a configuration.

    Attributes:
        dotted: its path.
        kind: its declared type.
        default: `MISSING` where it has none.
        text: what its dataclass says of it.
        registry: name to dataclass, of a section that has several forms.
    """

    dotted: str
    kind: Any
    default: Any
    text: str
    registry: Mapping[str, Any]


def _keys(cls: Any, prefix: str = "", instance: Any = None) -> Iterator[_Key]:
    """Every key of a dataclass and of its sections; `instance` has other defaults."""
    hints, texts = typing.get_type_hints(cls), _attributes(cls)
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        dotted, kind, default = prefix + f.name, hints[f.name], _default(f, instance)
        registry = f.metadata.get("registry", {})
        yield _Key(dotted, kind, default, texts.get(f.name, ""), registry)
        for section in dict.fromkeys(registry.values()):
            yield from _keys(section, f"{dotted}.")
        kind = _given(kind)
        arguments = typing.get_args(kind)
        if not registry and dataclasses.is_dataclass(kind):
            inner = default if isinstance(default, cast(type, kind)) else None
            yield from _keys(kind, f"{dotted}.", inner)
        elif typing.get_origin(kind) is dict and dataclasses.is_dataclass(arguments[1]):
            yield from _keys(arguments[1], f"{dotted}.NAME.")
        elif typing.get_origin(kind) is tuple and dataclasses.is_dataclass(arguments[0]):
            yield from _keys(arguments[0], f"{dotted}[0].")


def _default(f: Any, instance: Any) -> Any:
    if instance is not None:
        return getattr(instance, f.name)
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _attributes(cls: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of each attribute."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, lines = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        name = ""
        for line in textwrap.dedent(lines.split("\n\n")[0]).splitlines():
            found = re.match(r"(\w+): (.*)", line)
            name, text = found.groups() if found else (name, line.strip())
            texts[name] = text if found else f"{texts.get(name, '')} {text}"
    return texts


def listing(cls: Any) -> str:
    """Every key of a configuration with its default, for the help of a command."""
    lines = ["Every key with its default; each is a flag too, --key=value:", ""]
    forms: tuple[str, ...] = ()  # of the sections whose keys stand in one line
    for key in _keys(cls):
        if key.dotted.startswith(forms):
            continue
        lines.append(f"  {key.dotted}: {_default_text(key)}")
        lines += textwrap.wrap(key.text, 94, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for name, form in key.registry.items():
            parts = [f"{k.dotted}: {_default_text(k)}" for k in _keys(form) if k.dotted != "name"]
            text = ", ".join([f"name: {name}", *parts])
            lines += textwrap.wrap(
                f"{{{text}}}", 94, initial_indent=" " * 6, subsequent_indent=" " * 8,
                break_on_hyphens=False,
            )  # fmt: skip
        if key.registry:
            forms = (*forms, f"{key.dotted}.")
    return "\n".join(lines)


def _default_text(key: _Key) -> str:
    if key.default is MISSING:
        return "REQUIRED"
    if dataclasses.is_dataclass(key.default):
        return getattr(key.default, "name", "see below")
    if key.default is None:
        return "null"
    if isinstance(key.default, tuple):
        plain = [x for x in key.default if not dataclasses.is_dataclass(x)]
        return (
            f"[{', '.join(map(_text, plain))}]" if len(plain) == len(key.default) else "see there"
        )
    return _text(key.default) or '""'

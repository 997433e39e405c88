"""YAML with every scalar as text, in files that may be hostile."""

import itertools
from pathlib import Path
from typing import Any

import yaml

from jaxlm.artifacts.files import file_path, read_text
from jaxlm.core.errors import UserError

_MOST_CHARACTERS, _MOST_VALUES, _MOST_DEPTH = 2**22, 100_000, 50
"""Limits of a file; a larger one is no configuration, or an alias bomb."""


class _Loader(yaml.BaseLoader):
    """A loader that keeps scalars as text and refuses a repeated key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    both = f"lines {lines[key.value]} and {line}"
                    raise UserError(f"{key.value}: is given twice (got {both}). Keep one.")
                lines[key.value] = line
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; every scalar stays text."""
    file = file_path(path, "config")
    try:
        text = read_text(file)
    except FileNotFoundError:
        raise UserError(
            f"config: there is no such file (got {path}). Give the path of a YAML file."
        ) from None
    try:
        data = parse_yaml(text) or {}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"config: is not valid YAML (got {path}{line}). Quote text that has braces, colons "
            "or #."
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"config: is not a mapping (got {path}). Write lines `key: value`.")
    return data


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text that is neither too deep nor too large; scalars stay text."""
    try:
        # Checked before parsing: PyYAML is slow, and takes time quadratic in the depth.
        if len(text) > _MOST_CHARACTERS:
            raise UserError(
                f"config: is too long (got {len(text)} characters). Give a configuration."
            )
        steps = ((letter in "[{") - (letter in "]}") for letter in text)
        if max(itertools.accumulate(steps), default=0) > _MOST_DEPTH:
            raise RecursionError
        data = yaml.load(text, Loader=_Loader)
        if (size := _size(data, {})) > _MOST_VALUES:
            raise UserError(f"aliases: unfold to too many values (got {size}). Write fewer.")
    except RecursionError:
        raise UserError(
            f"sections: are nested too deeply (got more than {_MOST_DEPTH} levels). Write fewer."
        ) from None
    return data


def _size(value: Any, known: dict[int, int]) -> int:
    """Count the values when aliases are written out; a shared object is visited only once."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(item, known) for item in items)
    return known[id(value)]

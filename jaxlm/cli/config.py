"""Command lines: words, a configuration file, and `--dotted.path=value` flags; and Python calls."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jaxlm.artifacts.config import build, load
from jaxlm.artifacts.files import file_path
from jaxlm.artifacts.folder import inputs_digest
from jaxlm.artifacts.keys import keys_of
from jaxlm.artifacts.yaml import read_yaml
from jaxlm.core.checks import show
from jaxlm.core.errors import UserError
from jaxlm.studies import STUDIES
from jaxlm.train.run_folder import FREE, to_dict

__all__ = ["dump", "from_call", "is_file", "load", "parse_args", "parse_model_args", "split_args"]

T = TypeVar("T")

ARGUMENTS = "arguments"
"""What error messages name as the source of the keys of a Python call."""


def split_args(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split arguments into words and flags; `--name value` is the same as `--name=value`."""
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
            both = f"{show(flags[name])} and {show(value)}"
            raise UserError(f"--{key}: is given twice (got {both}). Keep one.")
        flags[name] = value
    return words, flags


def parse_args(args: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Split `[config.yaml | --config config.yaml] --dotted.path=value ...` into file and flags."""
    files, flags = split_args(args)
    if "config" in flags:
        files.append(flags.pop("config"))
    if len(files) > 1:
        raise UserError(f"config: is given twice (got {files[0]} and {files[1]}). Keep one.")
    if not files:
        return None, flags
    path = str(file_path(files[0], "config"))
    # Keep what was typed: `./x` is a folder, while `x` may be a name of the hub.
    return path if files[0].startswith("~") else files[0], flags


def parse_model_args(args: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Return the file and flags as `parse_args`; a word that is not YAML is the flag `model`."""
    path, flags = parse_args(args)
    if path is None or is_file(path):
        return path, flags
    if "model" in flags:
        raise UserError(f"model: is given twice (got {path} and {flags['model']}). Keep one.")
    return None, {**flags, "model": path}


def is_file(config: Any) -> bool:
    """Return whether the first argument of a command is a configuration file."""
    return isinstance(config, str | Path) and str(config).endswith((".yaml", ".yml"))


def from_call(
    cls: type[T],
    config: T | str | Path | None,
    overrides: Mapping[str, Any],
    command: str,
    *,
    only: Collection[str] | None = None,
) -> tuple[T, Path | None]:
    """Return the configuration of a command's Python function, and the folder of its file.

    A key of `overrides` replaces the whole key of `config`, an object of `cls`, a YAML file or
    None; a dotted key changes one value in it. Of a file, only the first-level keys `only` are
    read. The default of `output` is `runs/COMMAND-DIGEST`, with the digest of the rest of the
    configuration.
    """
    from jaxlm.studies.grid import with_keys

    keys, base_dir, where = {}, None, ARGUMENTS
    if isinstance(config, str | Path):
        path = file_path(config, "config")
        keys, base_dir = read_yaml(path), path.parent
        where = f"{path} and {ARGUMENTS}" if overrides else str(path)
    elif config is not None:
        if not overrides:
            return config, None
        keys = to_dict(config)
    keys = {key: value for key, value in keys.items() if only is None or key in only}
    keys = with_keys(keys, overrides, ARGUMENTS)
    required = [key.dotted for key in keys_of(cls) if key.default is MISSING]
    if "output" in required and "output" not in keys:
        inputs = to_dict(build(cls, {**keys, "output": "runs"}, where))
        digest = inputs_digest({key: inputs[key] for key in inputs if key not in FREE})
        keys["output"] = f"runs/{command}-{digest}"
    return build(cls, keys, where), base_dir


def dump(config: Any) -> str:
    """Return a configuration as YAML with every key."""
    keys = to_dict(config)
    if getattr(config, "study", None) in STUDIES:
        keys = {"study": config.study, **keys}
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)

"""Command lines: words, a configuration file, and `--dotted.path=value` flags."""

from collections.abc import Sequence
from typing import Any

import yaml

from jaxlm.artifacts.config import load
from jaxlm.artifacts.files import file_path
from jaxlm.core.checks import show
from jaxlm.core.errors import UserError
from jaxlm.studies import STUDIES
from jaxlm.train.run_folder import to_dict

__all__ = ["dump", "load", "parse_args", "parse_model_args", "split_args"]


def split_args(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split arguments into words and flags; `--name value` is the same as `--name=value`.

    Raises:
        UserError: a flag has no value, or is given twice.
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
    if path is None or path.endswith((".yaml", ".yml")):
        return path, flags
    if "model" in flags:
        raise UserError(f"model: is given twice (got {path} and {flags['model']}). Keep one.")
    return None, {**flags, "model": path}


def dump(config: Any) -> str:
    """Return a configuration as YAML with every key."""
    keys = to_dict(config)
    if getattr(config, "study", None) in STUDIES:
        keys = {"study": config.study, **keys}
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)

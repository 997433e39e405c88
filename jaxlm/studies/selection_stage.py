"""Stages of a study: each has a folder that says what it was made of, and is made once.

The name of a folder has a hash of the stage's inputs. So a stage whose inputs have changed gets
another folder and nothing is overwritten, and one that was stopped is found again where it was. A
folder has a `manifest.json` with the inputs and, once the stage has ended, with its result.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlm.artifacts.files import read_json, write_json
from jaxlm.core.errors import UserError

MANIFEST = "manifest.json"


def stage(
    root: Path,
    name: str,
    inputs: Mapping[str, Any],
    work: Callable[[Path], dict[str, Any]],
    *,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, dict[str, Any]]:
    """Does a stage, goes on with it, or finds it done.

    Args:
        root: folder of the stages.
        name: what the stage is called.
        inputs: JSON values, all that the result depends on.
        work: does it in the folder that it is given, and returns what is to be kept, JSON values;
            called again in the same folder after it was stopped.
        say: is told what is done.

    Returns:
        The folder, and the result.

    Raises:
        UserError: the folder's manifest is damaged or of other inputs; or what `work` raises.
    """
    plain = json.loads(json.dumps(inputs))
    folder = root / f"{name}-{key(plain)}"
    manifest = folder / MANIFEST
    if manifest.exists():
        found = _read(manifest, plain)
        if "result" in found:
            say(f"{name}: nothing has changed, {folder}")
            return folder, found["result"]
    say(f"{name}: {'goes on' if manifest.exists() else 'begins'}, {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(manifest, {"inputs": plain})
    begin = time.perf_counter()
    result = json.loads(json.dumps(work(folder)))
    seconds = time.perf_counter() - begin
    write_json(manifest, {"inputs": plain, "result": result, "seconds": seconds})
    return folder, result


def key(inputs: Mapping[str, Any]) -> str:
    """Twelve digits that stand for the inputs.

    >>> key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})
    True
    """
    text = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(manifest: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    found = read_json(manifest, inputs=dict)
    if found["inputs"] != inputs or not isinstance(found.get("result", {}), dict):
        raise UserError(f"{manifest}: is not of this stage. Remove its folder.")
    return found

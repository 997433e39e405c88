"""Files that are whole or absent, and records that are what they say they are."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.artifacts.processes import is_first, meet
from jaxlm.core.errors import UserError

LARGEST = 2**30
"""Bytes of a record."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is whole or absent."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the refusal of the operating system, such as a full disk, into a sentence.

    Raises:
      UserError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be written ({reason}). Make room there, or choose another place; the "
            "same command resumes from the last checkpoint, if there is one."
        ) from error


def write_shared(path: Path, content: str | bytes, *, once: bool = False) -> None:
    """`write_atomic` of a file that all processes of a program have in common, on one file system.

    All of them call it; the first writes, and none returns before the file is there.

    Args:
      path: the file.
      content: of it.
      once: leaves a file that is there.
    """
    if is_first() and not (once and path.exists()):
        write_atomic(path, content)
    meet(str(path))


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that every reader takes: what is not finite becomes null, which JSON can say.

    >>> to_json({"loss": float("nan"), "steps": (1, 2)})
    '{"loss": null, "steps": [1, 2]}'
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes one JSON object, whole or not at all; see `write_shared` and `to_json`."""
    with writing(path):
        write_shared(path, to_json(record, indent=2) + "\n")


class _Repeated(ValueError):
    """A name that is twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text from outside.

    Args:
      text: one JSON value.
      where: file, or file and line, that a message names.

    Raises:
      UserError: it is not JSON, is nested too deeply, has a name twice in one object, a number of
        thousands of digits, or a text that is not Unicode (half of a surrogate pair).
    """
    try:
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # JSON may write half a character, UTF-8 may not
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except UnicodeEncodeError:
        reason = r"a \ud800-like escape without its other half"
    except _Repeated as error:
        reason = f"the name {str(error)!r} twice"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError:  # Python converts no integer of more than 4,300 digits
        reason = "a number with thousands of digits"
    else:
        return value
    raise UserError(f"{where}: not valid JSON ({reason}). Correct the file or write it again.")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
      UserError: it is a pipe, a device or too large, cannot be opened or is not UTF-8;
        `FileNotFoundError` is left to the caller.
    """
    try:
        endless = not path.is_dir() and path.exists() and not path.is_file()
        endless &= path.parent != Path("/dev/fd")  # where a shell gives the output of a command
        if endless or path.stat().st_size > LARGEST:
            raise UserError(
                f"{path}: not a regular file of at most {LARGEST >> 20} MiB. Give the file as it "
                "was written."
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text in UTF-8. Correct the file or write it again.") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Give a file that you may read."
        ) from None


def read_json(path: Path, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """A JSON object from a file, with the fields that the caller relies on.

    Args:
      path: the file.
      fields: name to type of each field that must be there. `float` takes whole numbers too.

    Raises:
      UserError: as `read_text`; it is damaged: not JSON, no object, or a field is missing or of
        another type.
      FileNotFoundError: there is none.
    """
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object. Correct the file or write it again.")
    for name, kind in fields.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        kinds = (*kinds, int) if float in kinds else kinds
        item = value.get(name)
        if (
            name not in value
            or not isinstance(item, kinds)
            or (isinstance(item, bool) and bool not in kinds)
        ):
            raise UserError(
                f"{path}: the field {name} is missing or of another type. The file is damaged or "
                "not of jaxlm: remove it, or make it again."
            )
    return value

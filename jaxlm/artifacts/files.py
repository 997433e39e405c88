"""One file: paths that users and files give, atomic writes, checked reads, JSON."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar, cast

from jaxlm.artifacts.processes import barrier, is_main_process
from jaxlm.core.errors import UserError

T = TypeVar("T", bound=str | None)

LARGEST = 2**30
"""Largest text file that is read, in bytes."""


def file_path(given: str | os.PathLike, key: str) -> Path:
    """Return a path that a user gave for the option `key`, with `~` expanded."""
    text = os.fspath(given)
    if not text.strip():
        raise UserError(f"{key}: is empty (got nothing). Give a path.")
    if "\0" in text:
        raise UserError(f"{key}: has a NUL character (got {text!r}). Give a path without it.")
    parts = [part.encode(errors="replace") for part in text.split("/")]
    if max(map(len, parts)) > 255 or len(parts) + sum(map(len, parts)) > 4095:
        raise UserError(
            f"{key}: is too long for a path (got {text[:60]!r}...). Give a shorter one."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{key}: there is no such user (got {text!r}). Write ./~name for a folder of that name."
        ) from None


def absolute(name: T, key: str) -> T:
    """Return the absolute path of a file or folder; what is neither, as a hub id, stays."""
    path = None if name is None else file_path(name, key)
    return name if path is None or not os.path.exists(path) else cast(T, str(path.resolve()))


def inside(folder: Path, name: object, where: str) -> Path:
    """Return the path of a name that the file `where` gives; it must stay inside the folder.

    The check is on the text of the name. Symbolic links are followed, since the cache of the
    Hugging Face hub consists of them.
    """
    if isinstance(name, str) and name and "\0" not in name:
        posix, windows = PurePosixPath(name), PureWindowsPath(name)
        absolute = posix.is_absolute() or windows.drive or windows.root
        if not absolute and ".." not in (*posix.parts, *windows.parts):
            return folder / name
    raise UserError(
        f"{where}: names a file outside its folder (got {name!r}). Use files that lie beside it."
    )


def folder_name(name: str, key: str) -> str:
    """Return the value of the option `key`, checked to be usable as the name of one folder."""
    text = str(name)
    if text in ("", ".", "..") or set(text) & set("/\\\0") or len(text.encode()) > 200:
        raise UserError(
            f"{key}: cannot name a folder (got {text!r}). Give a short name without slashes."
        )
    return text


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that it is whole or absent."""
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
def report_write_errors(path: Path) -> Iterator[None]:
    """Raise UserError naming `path` in place of an `OSError`, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be written ({reason}). Make room there, or choose another place; the "
            "same command resumes from the last checkpoint, if there is one."
        ) from error


def write_new(path: Path, text: str) -> None:
    """Write a file whole or not at all; raise FileExistsError if it exists already."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with report_write_errors(path):
            aside.write_text(text, encoding="utf-8")
        os.link(aside, path)  # unlike a rename, it fails if another command has taken the name
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_shared(path: Path, content: str | bytes) -> None:
    """Write a file that all processes share, with `write_atomic`.

    All processes call it. The main process writes, and none returns before the file exists.
    """
    if is_main_process():
        write_atomic(path, content)
    barrier(str(path))


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return strict JSON; numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write one JSON object; see `write_shared` and `to_json`."""
    with report_write_errors(path):
        write_shared(path, to_json(record, indent=2) + "\n")


def to_jsonl(records: Iterable[Mapping[str, Any]]) -> str:
    """Return one JSON object a line; see `to_json`."""
    return "".join(to_json(record) + "\n" for record in records)


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; see `write_shared` and `to_json`."""
    with report_write_errors(path):
        write_shared(path, to_jsonl(records))


def append_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line; they are on disk when this returns.

    Every process that calls it writes. `read_jsonl` ignores a last line that a kill cut short.
    """
    text = to_jsonl(records)
    with report_write_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class _Repeated(ValueError):
    """A name occurs twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(next(name for name in names if names.count(name) > 1))
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(text: str, where: str) -> Any:
    """Parse a JSON text from outside; `where` is the file, or file and line."""
    try:
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # JSON allows half a surrogate pair, UTF-8 does not
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
    """Read a file in UTF-8; the caller explains a FileNotFoundError."""
    try:
        endless = not path.is_dir() and path.exists() and not path.is_file()
        endless &= path.parent != Path("/dev/fd")  # where a shell puts the output of a command
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


Fields = type | tuple[type, ...]


def read_json(path: Path, **fields: Fields) -> dict[str, Any]:
    """Read a JSON object, and check the names and types of the fields that the caller relies on.

    `float` accepts integers too. The caller explains a FileNotFoundError.
    """
    return _record(parse_json(read_text(path), str(path)), str(path), fields)


def read_jsonl(path: Path, **fields: Fields) -> list[dict[str, Any]]:
    """Read the complete lines of a file of JSON objects; see `read_json`.

    Text after the last newline is ignored, since an interrupted write leaves an incomplete line.
    """
    lines = enumerate(read_text(path).split("\n")[:-1], start=1)
    places = ((f"{path}, line {number}", line) for number, line in lines)
    return [_record(parse_json(line, where), where, fields) for where, line in places]


def _record(value: Any, where: str, fields: Mapping[str, Fields]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object. Correct the file or write it again.")
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
                f"{where}: the field {name} is missing or of another type. Remove the file or make "
                "it again: it is damaged, or jaxlm did not write it."
            )
    return value

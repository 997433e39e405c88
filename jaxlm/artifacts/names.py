"""Paths that users and files give: one door for all of them."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from jaxlm.core.errors import UserError


def file_path(given: str | os.PathLike, key: str) -> Path:
    """The path that a user gave, with `~` as the home folder.

    Args:
      given: as it was typed.
      key: name of the option, for messages.

    Raises:
      UserError: it is empty or too long, holds a NUL, or names the home of a user who is not known.
    """
    text = os.fspath(given)
    if not text.strip():
        raise UserError(f"{key}: is empty. Give a path.")
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


def inside(folder: Path, name: object, where: str) -> Path:
    """The path of a name that a file gives, which may not leave the folder.

    Names are judged as text: links are followed, since the cache of the Hugging Face hub has them.

    Args:
      folder: what the name is relative to.
      name: as it stands in the file.
      where: the file, for messages.

    Raises:
      UserError: the name is no text, is absolute, or has `..` in it.
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
    """A name that becomes one folder below another.

    Raises:
      UserError: it is empty, `.` or `..`, has a slash or a NUL, or is longer than a file system
        takes.
    """
    text = str(name)
    if text in ("", ".", "..") or set(text) & set("/\\\0") or len(text.encode()) > 200:
        raise UserError(
            f"{key}: cannot name a folder (got {text!r}). Give a short name without slashes."
        )
    return text

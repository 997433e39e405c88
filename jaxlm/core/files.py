"""Files that are whole or absent."""

import os
from pathlib import Path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is whole or absent."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)

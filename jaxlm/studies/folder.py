"""The folder of a study: of one kind, one process at a time writes there."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.artifacts.files import read_json, report_write_errors, write_json, write_shared
from jaxlm.artifacts.folder import claim
from jaxlm.core.errors import UserError
from jaxlm.train.run_folder import to_dict

STUDY = "study.json"
"""Says which kind of study has a folder, and what it was last asked for."""

TABLES = ("table.json", "table.md")


@contextlib.contextmanager
def study_folder(kind: str, config: Any) -> Iterator[Path]:
    """Makes the folder of a study and keeps other processes from writing there.

    A study that ends with an error before it has written anything leaves no folder behind.

    Args:
        kind: of the study, such as "sweep".
        config: a dataclass with the folder's path as `output`.

    Yields:
        The folder.

    Raises:
        UserError: it holds other files or another kind of study, cannot be written, or another
            process writes there.
    """
    folder = Path(config.output)
    with claim(folder, STUDY, "study"):
        there = read_json(folder / STUDY, study=str)["study"] if (folder / STUDY).exists() else kind
        if there != kind:
            raise UserError(
                f"output: the folder has a study of the kind {there}, not {kind} (got {folder}). "
                "Choose another output."
            )
        write_json(folder / STUDY, {"study": kind, "config": to_dict(config)})
        yield folder


def write_tables(folder: Path, table: Mapping[str, Any], text: str) -> str:
    """Writes the table of a study as JSON and as Markdown.

    Args:
        folder: of the study.
        table: JSON values.
        text: Markdown.

    Returns:
        The text.
    """
    write_json(folder / TABLES[0], table)
    with report_write_errors(folder / TABLES[1]):
        write_shared(folder / TABLES[1], text)
    return text

"""Rows of a data source: JSONL, CSV, TSV and Parquet files, or what `datasets` can load."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError

SPLITS = ("train", "validation", "test")
SHIPPED = Path(__file__).parent.parent / "assets" / "tasks"
_PREFIX = "jaxlm:"


@dataclass(frozen=True)
class Row:
    """One record of a source.

    Attributes:
        values: the fields by name, as the source holds them.
        source: the source as the user named it.
        number: line of the file, or row of the table, counted from 1.
        unit: "line" or "row".
    """

    values: Mapping[str, Any]
    source: str
    number: int
    unit: str = "row"

    @property
    def where(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


def read_rows(source: str, *, key: str, base_dir: Path | None = None) -> list[Row]:
    """Reads every row of a file or of a split of a data set.

    A file is looked for in `base_dir` first, then in the working directory; its ending says its
    format: .jsonl, .csv, .tsv or .parquet, the text formats also with .gz. `jaxlm:` stands for the
    folder of the shipped tasks. Everything else is a data set: a folder, `name`, `name/config` or
    `namespace/name/config`, and the split `key`, or the one after a colon:
    `nyu-mll/glue/sst2:validation`.

    Args:
        source: the file or data set as the user named it.
        key: "train", "validation" or "test".
        base_dir: where relative paths start: the folder of the YAML file.

    Raises:
        UserError: the source is missing, empty, or not what its name says.
    """
    path = _find(source, base_dir)
    format_ = _format(source)
    if format_ is None and (path is None or path.is_dir()):
        rows = _read_dataset(source, key, base_dir)
    elif path is None:
        raise UserError(
            f"task.{key}: there is no file {source!r}: give a path relative to the YAML file or "
            "to the working directory, or the name of a data set."
        )
    elif format_ is None:
        raise UserError(
            f"task.{key}: the ending of {source!r} is not a known one: use .jsonl, .csv, .tsv or "
            ".parquet."
        )
    else:
        rows = list(_READERS[format_](source, _read_bytes(path, source, key)))
    if not rows:
        raise UserError(f"task.{key}: {source} is empty: give a file with at least one example.")
    return rows


def _find(source: str, base_dir: Path | None) -> Path | None:
    if source.startswith(_PREFIX):
        path = SHIPPED / source.removeprefix(_PREFIX)
        return path if path.exists() else None
    path = Path(source).expanduser()
    for candidate in (base_dir / path if base_dir else path, path):
        if candidate.exists():
            return candidate
    return None


def _format(source: str) -> str | None:
    ending = Path(source.removesuffix(".gz")).suffix
    return ending if ending in _READERS else None


def _read_bytes(path: Path, source: str, key: str) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if source.endswith(".gz") else data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"task.{key}: {source} is not a whole gzip file: write it anew.") from error
    except OSError as error:
        raise UserError(
            f"task.{key}: {source} cannot be read ({error.strerror}): give a readable file."
        ) from error


def _decode(source: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{source} is not a text file in UTF-8: save it as UTF-8.")
    return text


def _read_jsonl(source: str, data: bytes) -> Iterator[Row]:
    for number, line in enumerate(_decode(source, data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise UserError(
                f'{source}, line {number} is not a JSON object: write {{"name": value}} on each.'
            )
        yield Row(values, source, number, "line")


def _read_csv(source: str, data: bytes, delimiter: str = ",") -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_decode(source, data), newline=""), delimiter=delimiter)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{source}, line {number} cannot be read ({error}): quote it."
            ) from error
        if not values:
            continue
        if header is None:
            header = values
            if len(set(header)) < len(header):
                raise UserError(f"{source}, line {number} names a column twice: rename one.")
            continue
        if len(values) != len(header):
            raise UserError(
                f"{source}, line {number} has {len(values)} values for {len(header)} columns: "
                "quote a value that holds the delimiter."
            )
        yield Row(dict(zip(header, values, strict=True)), source, number, "line")


def _read_tsv(source: str, data: bytes) -> Iterator[Row]:
    return _read_csv(source, data, delimiter="\t")


def _read_parquet(source: str, data: bytes) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    if not data:
        return
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{source} is not a Parquet file: write it anew.") from error
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(values, source, number)


_READERS: dict[str, Callable[[str, bytes], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _read_dataset(source: str, key: str, base_dir: Path | None) -> list[Row]:
    import datasets

    name, _, split = source.partition(":")
    failure: Exception | None = None
    for path, config in _dataset_names(name, base_dir):
        try:
            loaded = datasets.load_dataset(path, config, split=split or key)
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            failure = failure or error
            continue
        return [Row(values, source, number) for number, values in enumerate(loaded, start=1)]
    raise UserError(
        f"task.{key}: {name!r} is neither a file nor a data set with a split {split or key!r} that "
        "can be loaded: check the name and the network, or name another split after a colon."
    ) from failure


def _dataset_names(name: str, base_dir: Path | None) -> Iterator[tuple[str, str | None]]:
    """The ways to read `a/b/c` as (path, config): a folder first, then names on the hub."""
    head, _, tail = name.rpartition("/")
    if folder := _find(name, base_dir):
        yield str(folder), None
    elif head and (folder := _find(head, base_dir)):
        yield str(folder), tail
    else:
        if name.count("/") < 2:
            yield name, None
        if head:
            yield head, tail

"""Read the rows of a data source: JSON, CSV, TSV and Parquet files, or data sets of `datasets`."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.artifacts.files import file_path, inside, parse_json, read_json
from jaxlm.core.checks import show
from jaxlm.core.errors import UserError
from jaxlm.data.delimited import read_table
from jaxlm.data.files import (
    as_object,
    check_folder,
    json_objects,
    lines,
    read_bytes,
    room,
    too_large,
)

SHIPPED = Path(__file__).parent.parent / "assets" / "tasks"
_PREFIX = "jaxlm:"
_ROWS = 1024  # rows of a Parquet file that are unpacked at once


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of a source.

    Attributes:
        source: the source as the user named it.
        number: line of the file or row of the table, from 1; `unit` is "line" or "row".
        class_names: by field, the names of the classes whose index it holds, or a list of such
            indices, if the source has names.
    """

    values: Mapping[str, Any]
    source: str
    number: int
    unit: str = "row"
    class_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


def read_rows(
    source: str, *, key: str, section: str = "task", base_dir: Path | None = None
) -> list[Record]:
    """Read every row of a file, or of a split of a data set.

    A file is looked for in `base_dir`, then in the working directory. Its ending gives its format:
    .jsonl, .json (an array or lines), .csv, .tsv or .parquet; text files may be compressed (.gz).
    `jaxlm:` stands for the folder of the shipped tasks. Every other name is a data set: a folder of
    files or of `Dataset.save_to_disk`, or `name`, `name/config` or `namespace/name/config` on the
    hub. The split is `key`, or the one after a colon: `nyu-mll/glue/sst2:validation`. The code of a
    data set never runs.
    """
    option = f"{section}.{key}" if section else key
    path = _find(source, option, base_dir)
    reader = _READERS.get(Path(source.removesuffix(".gz")).suffix)
    if reader is None and (path is None or path.is_dir()):
        rows = _read_dataset(source, option, base_dir)
    elif path is None:
        raise UserError(
            f"{option}: there is no such file (got {source!r}). Give a path relative to the YAML "
            "file or to the working directory, or the name of a data set."
        )
    elif reader is None:
        raise UserError(
            f"{option}: its ending is not known (got {source!r}). Use one of {', '.join(_READERS)}."
        )
    else:
        rows = list(reader(source, read_bytes(path, f"{option}: {source}")))
    if not rows:
        raise _empty(source, option)
    return rows


def absolute(source: str, key: str, base_dir: Path | None) -> str:
    """Return a source with the absolute path of its file or folder, if it is one that exists."""
    name = source.partition(":")[0]
    if source.startswith(_PREFIX):
        return source
    for part in (source, name, name.rpartition("/")[0]):  # FILE, FOLDER:SPLIT, FOLDER/CONFIG:SPLIT
        if part and (path := _find(part, key, base_dir)):
            # Links stay: what one points to may have a name without an ending.
            return str(path.absolute()) + source.removeprefix(part)
    return source


def stream_rows(source: str, *, key: str) -> Iterator[Record]:
    """Yield what `read_rows` returns; JSON lines and Parquet may be larger than the memory."""
    path, name = _find(source, key, None), source.removesuffix(".gz")
    streamed = name.endswith(".jsonl") or source.endswith(".parquet")
    if path is None or not path.is_file() or not streamed:
        yield from read_rows(source, key=key, section="")
        return
    parquet = source.endswith(".parquet")
    rows = _read_parquet(source, path) if parquet else _read_lines(source, lines(path, source))
    first = next(rows, None)
    if first is None:
        raise _empty(source, key)
    yield first
    yield from rows


def _empty(source: str, option: str) -> UserError:
    return UserError(f"{option}: is empty (got {source}). Give a file with at least one example.")


def _find(source: str, key: str, base_dir: Path | None) -> Path | None:
    if source.startswith(_PREFIX):
        candidates = [inside(SHIPPED, source.removeprefix(_PREFIX), key)]
    else:
        path = file_path(source, key)
        candidates = [base_dir / path, path] if base_dir else [path]
    try:
        return next((candidate for candidate in candidates if candidate.exists()), None)
    except OSError as error:
        raise UserError(
            f"{key}: cannot be looked up, {error.strerror} (got {show(source)}). Give another path."
        ) from None


def _decode(source: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{source}: not a text file in UTF-8. Save it as UTF-8.")
    return text


def _read_jsonl(source: str, data: bytes) -> Iterator[Record]:
    return _read_lines(source, data.split(b"\n"))


def _read_lines(source: str, text: Iterable[bytes]) -> Iterator[Record]:
    for number, values in json_objects(text, source):
        yield Record(values, source, number, "line")


def _read_json(source: str, data: bytes) -> Iterator[Record]:
    text = _decode(source, data)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(source, data)
        return
    for number, value in enumerate(parse_json(text, source), start=1):
        yield Record(as_object(value, f"{source}, row {number}"), source, number)


def _read_table(delimiter: str, source: str, data: bytes) -> Iterator[Record]:
    for number, values in read_table(_decode(source, data), delimiter, source):
        yield Record(values, source, number, "line")


def _read_parquet(source: str, data: bytes | Path) -> Iterator[Record]:
    """Yield the rows of a file, or of its content, which is unpacked within `room()`."""
    import pyarrow
    import pyarrow.parquet

    if not data:
        return
    whole = isinstance(data, bytes)
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data) if whole else data)
        schema = file.schema_arrow
        for name in schema.names:
            if schema.names.count(name) > 1:
                raise UserError(f"{source}: names a column twice (got {name!r}). Rename one.")
        names, number, size = _class_names(schema.metadata), 0, 0
        for batch in file.iter_batches(_ROWS):
            size += batch.nbytes
            if whole and size > room():
                raise too_large(source)
            for values in batch.to_pylist():
                number += 1
                yield Record(values, source, number, class_names=names)
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{source}: not a whole Parquet file. Write it again.") from error


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Return the class names by field, which `datasets` writes into its Parquet files."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        # A list of classes is a feature that holds that of one.
        kinds = {name: feature.get("feature", feature) for name, feature in features.items()}
        return {
            name: tuple(map(str, kind["names"]))
            for name, kind in kinds.items()
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


_READERS: dict[str, Callable[[str, bytes], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": functools.partial(_read_table, ","),
    ".tsv": functools.partial(_read_table, "\t"),
    ".parquet": _read_parquet,
}


def _read_dataset(source: str, key: str, base_dir: Path | None) -> list[Record]:
    from datasets import load_dataset

    name, _, given = source.partition(":")
    split, where = given or key.rpartition(".")[2], f"{key}: {source}"
    failure: Exception | None = None
    for path, config in _dataset_names(name, key, base_dir):
        try:
            if isinstance(path, Path):
                return _read_folder(path, config, given, split, where)
            return _rows(load_dataset(path, config, split=split), source, where)
        except UserError:
            raise
        except Exception as error:  # the library may raise anything for files from outside
            failure = failure or error
    reason = next(iter(str(failure).splitlines()), "") or type(failure).__name__
    raise UserError(
        f"{key}: is neither a file nor a data set with a split {split!r} that can be loaded (got "
        f"{name!r}: {reason[:160]}). Check the name and the network, or name another split after "
        "a colon."
    ) from failure


def _rows(loaded: Any, source: str, where: str) -> list[Record]:
    from datasets import ClassLabel

    if loaded.data.nbytes > room():
        raise too_large(where)
    kinds = {name: getattr(kind, "feature", kind) for name, kind in loaded.features.items()}
    names = {
        column: tuple(kind.names) for column, kind in kinds.items() if isinstance(kind, ClassLabel)
    }
    return [
        Record(values, source, number, class_names=names)
        for number, values in enumerate(loaded.with_format(None), start=1)
    ]


def _read_folder(
    path: Path, config: str | None, given: str, split: str, where: str
) -> list[Record]:
    """Read a split of a folder; `given` is empty if the source names no split."""
    import datasets

    source = where.partition(": ")[2]
    check_folder(path, where)
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json", splits=list)["splits"]
        if split not in splits:
            raise UserError(
                f"{where}: has no such split (got {split!r}). Name one of "
                f"{', '.join(map(str, splits))} after a colon."
            )
        path, given = inside(path, split, where), ""
    if (path / "state.json").is_file():
        state = read_json(path / "state.json", _data_files=list)
        for file in state["_data_files"]:
            inside(path, file.get("filename") if isinstance(file, dict) else None, where)
        if given and given != state.get("_split"):
            raise UserError(
                f"{where}: holds one split, {state.get('_split')!r} (got {given!r}). Leave out "
                "the colon and the name after it."
            )
        return _rows(datasets.Dataset.load_from_disk(str(path)), source, where)
    builder = datasets.load_dataset_builder(str(path), config)
    files: Mapping[str, list[str]] = builder.config.data_files or {}
    for file in (file for several in files.values() for file in several):
        # The README of a folder from outside may name files elsewhere on this machine.
        if not os.path.normpath(file).startswith(os.path.abspath(path) + os.sep):
            raise UserError(
                f"{where}: names a file outside its folder (got {show(file)}). Use files in "
                "the folder."
            )
    delimiter = getattr(builder.config, "sep", "")
    if delimiter not in (",", "\t") or split not in files:
        return _rows(datasets.load_dataset(str(path), config, split=split), source, where)
    # Read tables ourselves: `datasets` uses pandas, which loses rows to stray quotes.
    return [
        row
        for file in files[split]
        for row in _read_table(delimiter, file, read_bytes(Path(file), file))
    ]


def _dataset_names(
    name: str, key: str, base_dir: Path | None
) -> Iterator[tuple[str | Path, str | None]]:
    """Yield what `a/b/c` may mean as (path, config): a folder, or else names on the hub."""
    head, _, tail = name.rpartition("/")
    if folder := _find(name, key, base_dir):
        yield folder, None
    elif head and (folder := _find(head, key, base_dir)):
        yield folder, tail
    else:
        if name.count("/") < 2:
            yield name, None
        if head:
            yield head, tail

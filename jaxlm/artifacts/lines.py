"""A file of JSON lines that grows chunk by chunk, and the header that says what it was made from.

A stop at any moment, such as kill -9, loses no chunk: `resume` cuts off what follows the last whole
one, and the same chunks are appended as if nothing had happened.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.artifacts.files import append_jsonl, read_json, write_json
from jaxlm.artifacts.folder import differences, lock, short
from jaxlm.artifacts.processes import barrier, is_main_process
from jaxlm.core.errors import UserError


class GrowingLines:
    """Lines of JSON; all processes call its methods, and the main process writes.

    Attributes:
        path: the file.
        header: path of its header, NAME.header.json.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header = path.with_name(f"{path.name}.header.json")

    def check(self) -> None:
        """Refuse a file that cannot be written or resumed, before the work begins."""
        if self.path.exists() and not self.header.exists():
            raise UserError(
                f"output: exists already, without {self.header.name} (got {self.path}). Give a "
                "new file."
            )
        if not os.access(self.path.parent, os.W_OK | os.X_OK):
            raise UserError(
                f"output: its folder cannot be written (got {self.path}). Choose another."
            )

    @contextlib.contextmanager
    def held(self, inputs: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[None]:
        """Keep other processes from writing, and write the header or compare it with `inputs`.

        `about` is written beside the inputs, for people.
        """
        inputs = json.loads(json.dumps(inputs))  # tuples become lists, as in the header
        self._content = {**about, "inputs": inputs}
        with lock(self.path.with_name(f"{self.path.name}.lock"), self.path):
            self.check()
            stored = self._stored()
            barrier(f"{self.header} is read")  # by every process, before the first one writes
            if stored is None:
                write_json(self.header, {**self._content, "lines": None})
            old = inputs if stored is None else stored["inputs"]
            for key in {**inputs, **old}:  # in this order, so that what comes first is named
                for name, *values in differences(*({key: each.get(key)} for each in (old, inputs))):
                    before, now = map(short, values)
                    raise UserError(
                        f"output: {self.path} was made with {name} = {before} (got {now}). "
                        "Choose another output, or remove it and its header."
                    )
            yield

    def _stored(self) -> dict[str, Any] | None:
        try:
            return read_json(self.header, inputs=dict, lines=(int, type(None)))
        except FileNotFoundError:
            return None

    def resume(self, chunk: int) -> int:
        """Cut back to a multiple of `chunk` lines, unless all are there; return their number."""
        count = end = kept = size = 0
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    count, end = count + 1, end + len(line)
                    if count % chunk == 0:
                        kept, size = count, end
        finished = (self._stored() or {}).get("lines") == count
        barrier(f"{self.path} is read")
        if finished:
            return count
        if is_main_process() and self.path.exists():
            os.truncate(self.path, size)
        return kept

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append one chunk; it is on disk when this returns."""
        if is_main_process():
            append_jsonl(self.path, rows)

    def finish(self, count: int) -> None:
        """Note in the header that all lines are there."""
        write_json(self.header, {**self._content, "lines": count})

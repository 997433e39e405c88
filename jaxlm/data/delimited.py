"""Read CSV and TSV without losing rows to a stray quote.

Quotes follow RFC 4180: a value that begins with a quote ends at the next quote that is not doubled,
and the delimiter or the end of the line must follow. Any other quote is text. In csv, pandas and
pyarrow, a stray quote at the beginning of a value swallows the rows up to the next quote. Here

- in TSV, whose files often have no quoting, a line is split at its tabs alone if a quote in it is
  not closed properly, its row has too many or too few values, or a later line inside the quotes has
  as many values as a row;
- in CSV it is an error if the quote is not closed properly, or if its line and a later one look
  like rows: both have as many values as a row, and in one column both have a value that occurs
  there in other rows, or a number if all other rows have numbers there.
"""

import re
from collections.abc import Iterator, Sequence

from jaxlm.core.errors import UserError

_LINE_END = re.compile(r"\r\n|\n|\r")
_UNQUOTED = {delimiter: re.compile(rf"[^{delimiter}\r\n]*") for delimiter in ",\t"}
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")

Record = tuple[int, list[str]]
"""The line on which a record begins, from 1, and its values."""


def read_table(text: str, delimiter: str, source: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a table with a header, each with the line on which it begins."""
    records, suspects = _records(text, delimiter, source)
    if not records:
        return
    number, header = records[0]
    if len(set(header)) < len(header):
        raise UserError(f"{source}, line {number}: names a column twice. Rename one.")
    for number, values in records[1:]:
        if len(values) != len(header):
            raise UserError(
                f"{source}, line {number}: must have {len(header)} values (got {len(values)}). "
                "Quote a value that holds the delimiter."
            )
    _check_suspects(records[1:], suspects, source)
    for number, values in records[1:]:
        yield number, dict(zip(header, values, strict=True))


def _records(
    text: str, delimiter: str, source: str
) -> tuple[list[Record], dict[int, list[Record]]]:
    """Return all records, and by record number the lines inside its quotes that look like rows."""
    records: list[Record] = []
    suspects: dict[int, list[Record]] = {}
    place, number = 0, 1
    while place < len(text):
        end = _end_of_line(text, place)
        line = text[place:end]
        values: list[str] | None = line.split(delimiter)
        inner: list[Record] = []
        if '"' in line:
            values, stop = _quoted(text, place, delimiter)
            width = len(records[0][1]) if records else line.count(delimiter) + 1
            if line.count(delimiter) == width - 1 > 0:
                inner = [
                    (number + i, each.split(delimiter))
                    for i, each in enumerate(_LINE_END.split(text[end:stop])[1:], start=1)
                    if each.count(delimiter) == width - 1
                ]
            if delimiter == "\t" and (values is None or inner or len(values) != width):
                values, stop, inner = [_plain(value) for value in line.split("\t")], end, []
            if values is None:
                raise UserError(
                    f"{source}, line {number}: a value begins with a quote that is not closed or "
                    "has text after its closing quote. Quote the whole value and double the quotes "
                    "inside."
                )
            end = stop
        if line or end > place:  # an empty line is not a record
            if inner:
                suspects[len(records)] = [(number, line.split(delimiter)), *inner]
            records.append((number, values or []))
        number += len(_LINE_END.findall(text, place, end)) + 1
        rest = _LINE_END.match(text, end)
        place = rest.end() if rest else len(text)
    return records, suspects


def _end_of_line(text: str, place: int) -> int:
    found = _LINE_END.search(text, place)
    return found.start() if found else len(text)


def _quoted(text: str, place: int, delimiter: str) -> tuple[list[str] | None, int]:
    """Return the values of the record at `place`, None for a stray quote, and where it ends."""
    values = []
    while True:
        if text.startswith('"', place):
            end = place + 1
            while (end := text.find('"', end)) >= 0 and text.startswith('"', end + 1):
                end += 2
            if end < 0:
                return None, len(text)
            values.append(text[place + 1 : end].replace('""', '"'))
            end += 1
        else:
            end = _UNQUOTED[delimiter].match(text, place).end()  # type: ignore[union-attr]
            values.append(text[place:end])
        if end == len(text) or text[end] in "\r\n":
            return values, end
        if text[end] != delimiter:
            return None, end
        place = end + 1


def _plain(value: str) -> str:
    """Return a value without its quotes, if it is quoted as a whole."""
    inner = value[1:-1]
    whole = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else value


def _check_suspects(
    records: Sequence[Record], suspects: dict[int, list[Record]], source: str
) -> None:
    """Raise UserError if a line inside a quoted value looks like a row."""
    if not suspects:
        return
    sound = [values for place, (_, values) in enumerate(records, start=1) if place not in suspects]
    columns = [set(column) for column in zip(*sound, strict=True)] or [set() for _ in records[0][1]]
    numbers = [all(map(_NUMBER.fullmatch, column)) for column in columns]

    def usual(values: Sequence[str]) -> set[int]:
        """Return the columns in which a line has a value like those of other rows."""
        return {
            i
            for i, value in enumerate(values)
            if value in columns[i] or (numbers[i] and _NUMBER.fullmatch(value))
        }

    for (first, begin), *later in suspects.values():
        for number, values in later:
            if usual(begin) & usual(values):
                raise UserError(
                    f"{source}, line {first}: a value that begins with a quote holds line {number},"
                    " which looks like a row. Quote every value that contains quotes and double "
                    "them, or give the rows as JSON lines."
                )

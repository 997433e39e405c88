"""Tables as text, against Python's writer and against rows that are written out by hand."""

import csv
import io
import random

import pytest

from jaxlm.core.errors import UserError
from jaxlm.data.delimited import read_table


def rows(text: str, delimiter: str = ",") -> list[dict[str, str]]:
    return [values for _, values in read_table(text, delimiter, "a.csv")]


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("columns", [2, 3])
def test_what_the_csv_module_writes_is_read_back(delimiter: str, end: str, columns: int) -> None:
    draw = random.Random(columns)
    pieces = ["a", "b c", '"', '""', "\n", delimiter, "\r\n", ";", "ü"]
    table = [
        ["".join(draw.choices(pieces, k=draw.randrange(9))) for _ in range(columns - 1)] + [f"L{i}"]
        for i in range(300)
    ]
    # A line that is a row by itself, inside a value, is what the tests below are about.
    table = [
        row
        for row in table
        if not any(line.count(delimiter) >= columns - 1 for v in row for line in v.splitlines())
        and not any(v.count("\n") and delimiter in v for v in row)
    ]
    assert len(table) > 100
    names = [f"c{i}" for i in range(columns)]
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerows([names, *table])
    assert rows(file.getvalue(), delimiter) == [dict(zip(names, row, strict=True)) for row in table]


STRAY = {
    "an inch mark": ['a 5" screen', 'a 6" screen', "none"],
    "one that opens": ['"Hello, she said', "and left", "then"],
    "two that open": ['"Hello', 'again"', '"and', "once more"],
    "opens and closes rows later": ['"5 in', "b", 'c"', "d"],
    "opens at the end": ["a", "b", '"c'],
    "closes early": ['"Hello" she said', '"a" or "b"', "c"],
    "nothing else": ['"', "b", '""x""', '"""'],
}


@pytest.mark.parametrize("texts", STRAY.values(), ids=STRAY.keys())
@pytest.mark.parametrize("order", [1, -1])
def test_no_row_of_a_tsv_is_lost_to_a_quote(texts: list[str], order: int) -> None:
    """A file that knows no quoting, as GLUE's are: one row a line, whatever stands there."""
    lines = ["\t".join([str(i), text][::order]) for i, text in enumerate(texts)]
    expected = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    table = "\n".join(["\t".join(["id", "text"][::order]), *lines])
    assert rows(table, "\t") == expected


def test_a_quoted_value_of_a_tsv_is_unquoted() -> None:
    table = 'text\tlabel\n"a 5"" screen"\t0\n"a\tb"\t1\n"two\nlines"\t0\n'
    texts = ['a 5" screen', "a\tb", "two\nlines"]
    assert [row["text"] for row in rows(table, "\t")] == texts


def test_a_quote_inside_a_value_of_a_csv_is_text() -> None:
    assert rows('id,text\n1,a 5" screen\n2,b"\n') == [
        {"id": "1", "text": 'a 5" screen'},
        {"id": "2", "text": 'b"'},
    ]


@pytest.mark.parametrize(
    "lines",
    [
        ['1,"Hello', "2,world", "3,end"],  # never closed
        ['1,"Hello" she said', "2,b"],  # text behind the closing quote
        ['1,"Hello', "2,world", '3,"bye', "4,end"],  # closed by the next one that opens
        ['1,"Hello', "2,world", '3,bye"', "4,end"],  # closed at the end of another row: RFC 4180
        ['1,"Hello', "2,world", '3,bye"'],  # and of no other row
    ],
)
@pytest.mark.parametrize("header", ["id,text"])
def test_a_stray_quote_of_a_csv_loses_no_row_in_silence(lines: list[str], header: str) -> None:
    """csv, pandas and pyarrow read the fourth as two rows."""
    with pytest.raises(UserError, match=r"^a.csv, line 2: a value .*quote"):
        rows("\n".join([header, *lines]))


def test_a_stray_quote_before_label_words_is_found() -> None:
    with pytest.raises(UserError, match=r"line 2: a value .* holds line 3, which looks like a row"):
        rows('text,label\n"a,good\nb,bad\nc",good\nd,bad\ne,good\n')


def test_texts_of_several_lines_are_no_mistake() -> None:
    """Lines with a comma look like rows of two values, but neither value is one of the others."""
    texts = [
        "Good film.\nSlow, though.",
        "Slow, though good.\nSlow, too\n1",
        "plain",
        "a\n\nb, c\n",
    ]
    quoted = ['"' + text + '"' for text in texts]
    first = "text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(quoted))
    last = "id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(quoted))
    for table in (first, last):
        assert [row["text"] for row in rows(table)] == texts


def test_lines_are_counted_and_empty_ones_are_none() -> None:
    table = 'text,label\r\n\r\n"a\r\nb",0\r\n\nc,1\rd,0'
    found = list(read_table(table, ",", "a.csv"))
    assert [(number, values["text"]) for number, values in found] == [
        (3, "a\r\nb"),
        (6, "c"),
        (7, "d"),
    ]


def test_a_value_may_be_long() -> None:
    assert rows(f'text,label\n"{"x" * 200_000}",1\n') == [{"text": "x" * 200_000, "label": "1"}]


def test_a_value_more_or_less_is_an_error() -> None:
    with pytest.raises(UserError, match=r"a.csv, line 3: must have 2 values .got 1.. Quote"):
        rows("a,b\n1,2\n3\n")
    with pytest.raises(UserError, match=r"a.csv, line 1: names a column twice. Rename one."):
        rows("a,a\n1,2\n")

"""Every `UserError` of the library has the form `KEY: what is wrong (got VALUE). What to do.`

`pytest -n 0 -s tests/test_sentences.py` prints all of them.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.sentences import FORM

ROOT = Path(__file__).parents[1]


class Message(NamedTuple):
    """The text of an error, with `<>` for each value that is filled in."""

    place: str
    text: str


def text_of(node: ast.expr) -> str | None:
    """What an expression writes; None where nothing of it stands in the source."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=values):
            return "".join(text_of(value) or "<>" for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (text_of(left) or "<>") + (text_of(right) or "<>")
        case ast.IfExp(body=body, orelse=orelse):
            return min(text_of(body) or "<>", text_of(orelse) or "<>", key=len)
    return None


def messages() -> Iterator[Message]:
    for path in sorted((ROOT / "jaxlm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="UserError"), args=[first, *_]):
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    text = text_of(first) or ""
                    # A message that is passed on, as f"{where}: {error}", has its form already.
                    if re.search("[a-z] [a-z]", text):
                        yield Message(place, text)


ALL = list(messages())


@pytest.mark.parametrize("room", sorted({message.place.split("/")[1] for message in ALL}))
def test_a_message_has_the_form(room):
    here = [message for message in ALL if message.place.split("/")[1] == room]
    for message in here:
        print(f"{message.place}\n    {message.text}")
    other = [f"{message.place}: {message.text}" for message in here if not has_form(message.text)]
    assert not other, "\n".join(other)


def has_form(text: str) -> bool:
    filled = re.sub(r"<>$", "Correct it.", text).replace("<>", "Xx")
    return FORM.fullmatch(filled) is not None


def test_the_messages_are_found_and_judged():
    assert len(ALL) > 300
    assert has_form("<>k: must be positive (got <>). Correct it.")
    assert not has_form("k=<> is impossible; give 1 or more")

"""Readers of rows, for tasks whose template needs more than the fields of a row.

A task names its reader as `read: package.module:function`. The function takes a row, a mapping of
its fields, and returns a `ParsedRow`. If it raises a `KeyError`, the row lacks that field; other
errors mean that it is not a row of this kind.
"""

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxlm.core import checks
from jaxlm.core.errors import UserError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class ParsedRow:
    """A row as a reader returns it.

    Attributes:
        fields: text of the template's fields.
        gold: the right options, as indices into `options` or, if it is empty, into the task's label
            words; the first of them is trained on.
        options: the row's own options.
        answers: right texts, if the task's output is text.
    """

    fields: Mapping[str, str]
    gold: tuple[int, ...]
    options: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


Reader = Callable[[Values], ParsedRow]

_code_allowed = contextvars.ContextVar("code_allowed", default=False)


@contextlib.contextmanager
def code_allowed() -> Iterator[None]:
    """Let every `task.read` within the block name any function, as `--allow-code` does.

    This is a context manager so that only the caller can consent, never a configuration.
    """
    token = _code_allowed.set(True)
    try:
        yield
    finally:
        _code_allowed.reset(token)


def find_reader(name: str, *, allow_code: bool = False) -> Reader:
    """Return the function that `task.read` names; inside `code_allowed`, it may be any."""
    # A configuration may come from someone else, and this is its only key that names code. Not even
    # other functions of jaxlm are allowed: `jaxlm.cli.main:main` would run a row as a command line.
    module, _, function = name.partition(":")
    if module != __name__ and not (allow_code or _code_allowed.get()):
        raise UserError(
            f"task.read: names code outside jaxlm.data.readers (got {checks.show(name)}). Add "
            "--allow-code, or allow_code=True, if you trust it."
        )
    try:
        found: Reader = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError):
        raise UserError(
            f"task.read: there is no such function (got {checks.show(name)}). Write "
            "package.module:function."
        ) from None
    return found


def written(fields: Mapping[str, str], answers: Any) -> ParsedRow:
    """Return a row whose output is text; its first answer and a line break are trained on."""
    if not isinstance(answers, list | tuple) or not all(isinstance(x, str) for x in answers):
        raise TypeError
    return ParsedRow(fields, (0,), (f"{answers[0]}\n",), tuple(answers))


def sst2(row: Values) -> ParsedRow:
    """SST-2: remove the space at the end of a sentence."""
    return ParsedRow({"sentence": row["sentence"].strip()}, (int(row["label"]),))


def boolq(row: Values) -> ParsedRow:
    """BoolQ: give the question a capital letter and a question mark.

    The label is `answer` in BoolQ itself, and `label` in SuperGLUE's copy.
    """
    question = row["question"]
    question = question if question.endswith("?") else f"{question}?"
    fields = {"passage": row["passage"], "question": question[:1].upper() + question[1:]}
    return ParsedRow(fields, (0 if row["answer" if "answer" in row else "label"] else 1,))


def wsc(row: Values) -> ParsedRow:
    """WSC: write the pronoun in lower case."""
    fields = {"text": row["text"], "noun": row["span1_text"], "pronoun": row["span2_text"].lower()}
    return ParsedRow(fields, (int(row["label"]),))


def copa(row: Values) -> ParsedRow:
    """COPA: join premise and choice into one sentence with "so" or "because"."""
    connective = ("so", "because")[("effect", "cause").index(row["question"])]
    fields = {"premise": row["premise"].rstrip().removesuffix("."), "connective": connective}
    choices = tuple(_continued(row[name]) for name in ("choice1", "choice2"))
    return ParsedRow(fields, (int(row["label"]),), choices)


def _continued(sentence: str) -> str:
    """Write the first word of a sentence in lower case, unless it is I."""
    first, space, rest = sentence.rstrip(" ").partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def record(row: Values) -> ParsedRow:
    """ReCoRD: the options are the query with each entity instead of "@placeholder"."""
    query = row["query"].rstrip(" ")
    entities = list(row["entities"])
    return ParsedRow(
        {"passage": row["passage"].replace("@highlight\n", "- ")},
        tuple(entities.index(answer) for answer in row["answers"]),
        tuple(query.replace("@placeholder", entity) for entity in entities),
    )


def squad(row: Values) -> ParsedRow:
    """SQuAD: every listed answer is right."""
    fields = {"title": row["title"], "context": row["context"]}
    return written({**fields, "question": row["question"].strip()}, row["answers"]["text"])


def drop(row: Values) -> ParsedRow:
    """DROP: every listed answer is right."""
    fields = {"passage": row["passage"], "question": row["question"].strip()}
    return written(fields, row["answers_spans"]["spans"])

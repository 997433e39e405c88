"""Plain documents: every token is in the loss."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.data.rows import TokenRow
from jaxlm.data.sources import Record
from jaxlm.data.splits import Check, TextsConfig

_CHUNK = 256  # documents per call of the tokenizer


@dataclass(frozen=True)
class Document:
    """A text with a name."""

    text: str
    id: str

    @property
    def content(self) -> str:
        """Everything but the id."""
        return self.text


@dataclass(frozen=True, kw_only=True)
class TextConfig(TextsConfig):
    """The section `text` of a configuration: documents to fine-tune on.

    Every row of a source is a document. The file of a corpus domain is such a source.

    Attributes:
        field: field of a row that holds the text.
    """

    field: str = "text"

    key: ClassVar[str] = "text"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        **TextsConfig.CHECKS,
        # A piece begins with a special token, which alone would leave nothing to predict.
        "max_length": functools.partial(checks.integer, least=2),
    }

    def parse(self, record: Record) -> Document:
        """Return the document in a row.

        Raises:
            UserError: the field is missing, or is not text.
        """
        text = record.values.get(self.field)
        if not isinstance(text, str):
            raise UserError(
                f"{record.where}: field {self.field!r} is not text (got {checks.show(text)}). Name "
                "the field of the documents in text.field."
            )
        return Document(text, f"{record.source}:{record.number}")

    def tokenize(self, examples: Sequence[Document], tokenizer: Any, limit: int) -> list[TokenRow]:
        """Return `encode_documents` in pieces of `limit` tokens."""
        return encode_documents(examples, tokenizer, length=limit)


def encode_documents(
    documents: Sequence[Document], tokenizer: Any, *, length: int
) -> list[TokenRow]:
    """Tokenize documents and cut them into pieces of at most `length` tokens.

    A document ends with the tokenizer's `eos_token`, if there is one, so that a model learns where
    to stop. Every piece begins with the `bos_token`, or else the `eos_token`, which is not in the
    loss, so every token of a document is predicted exactly once.
    """
    end = tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise UserError("tokenizer: has no bos_token or eos_token to begin a text with. Add one.")
    last = () if end is None else (end,)
    rows = []
    for first in range(0, len(documents), _CHUNK):
        chunk = documents[first : first + _CHUNK]
        encoded = tokenizer(
            [document.text for document in chunk], add_special_tokens=False, verbose=False
        )
        for document, tokens in zip(chunk, encoded["input_ids"], strict=True):
            ids = (*tokens, *last)
            for place in range(0, len(ids), length - 1):
                piece = (begin, *ids[place : place + length - 1])
                rows.append(TokenRow(f"{document.id}@{place}", piece, tuple(range(1, len(piece)))))
    return rows

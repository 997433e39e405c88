r"""Conversations as tokens, of which those that the assistant writes are learnt.

A conversation is a list of messages {"role", "content"} with the roles system, user and assistant.
In the Tulu format it is one text,

    <|system|>\n{content}\n<|user|>\n{content}\n<|assistant|>\n{content}{eos}\n

with white space at the ends of each content removed. What is learnt is the assistant's content with
the token after it that ends the turn, in every turn; the line break after that token is not, though
it is in the code of Wang et al. (arXiv:2306.04751), from which LESS took its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxlm.core.checks import show
from jaxlm.core.errors import UserError
from jaxlm.data.sources import Row, read_rows
from jaxlm.models.chat_template import render_chat

ROLES = ("system", "user", "assistant")
MessageFormat = Literal["tulu", "chat"]
_CHUNK = 1024  # conversations a call of the tokenizer


class Message(NamedTuple):
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages with what they are called.

    Attributes:
        messages: in their order, at least one.
        id: of the row, or where it stands.
        subtask: the group that it belongs to, where the row has a field of that name.
    """

    messages: tuple[Message, ...]
    id: str
    subtask: str = ""


class Transcript(NamedTuple):
    """A conversation as one text.

    Attributes:
        text: what the tokenizer reads.
        spans: (start, end) of what is learnt, one for each turn of the assistant.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class EncodedMessages(NamedTuple):
    """The tokens of a conversation.

    Attributes:
        ids: tokens with special tokens.
        scored: increasing places of the tokens that are learnt; none is 0.
    """

    ids: tuple[int, ...]
    scored: tuple[int, ...]


def read_messages(
    source: str, *, key: str = "messages", base_dir: Path | None = None
) -> list[Conversation]:
    """Reads conversations: rows with `messages` and, optionally, `id` and `subtask`.

    Args:
        source: a file or data set, see `jaxlm.data.sources.read_rows`.
        key: what names the source, for messages.
        base_dir: where relative paths start, before the working directory.

    Raises:
        UserError: the source is not there, or a row has no messages, or one of them another role or
            no text.
    """
    return [_conversation(row) for row in read_rows(source, key=key, base_dir=base_dir)]


def tulu(messages: Sequence[Message], eos: str) -> Transcript:
    r"""The text of a conversation in the Tulu format.

    >>> tulu([Message("user", " Hi "), Message("assistant", "Yes.")], "</s>").text
    '<|user|>\nHi\n<|assistant|>\nYes.</s>\n'

    Args:
        messages: the conversation.
        eos: the token that ends a turn of the assistant, as text.
    """
    text, spans = "", []
    for role, content in messages:
        text += f"<|{role}|>\n"
        start = len(text)
        text += content.strip()
        if role == "assistant":
            text += eos
            spans.append((start, len(text)))
        text += "\n"
    return Transcript(text, tuple(spans))


def chat(messages: Sequence[Message], tokenizer: Any) -> Transcript:
    """The text of a conversation in the format of the tokenizer's own chat template.

    A turn of the assistant is what the template puts between the prompt for it and the next turn,
    without white space at the end.

    Raises:
        UserError: the tokenizer has no template, cannot use it, or it writes a turn in another way
            when others follow.
    """
    turns = [each._asdict() for each in messages]
    whole = render_chat(tokenizer, turns)
    spans = []
    for place, (role, _) in enumerate(messages):
        if role != "assistant":
            continue
        before = render_chat(tokenizer, turns[:place], add_generation_prompt=True)
        after = render_chat(tokenizer, turns[: place + 1]).rstrip()
        if not (whole.startswith(after) and after.startswith(before)):
            raise UserError(
                f"chat template: writes message {place + 1} otherwise when others follow it or "
                "it is asked for. Give template tulu."
            )
        spans.append((len(before), len(after)))
    return Transcript(whole, tuple(spans))


def encode_messages(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    *,
    template: MessageFormat = "tulu",
    max_length: int | None = None,
) -> list[EncodedMessages]:
    """Tokens of conversations, each cut on the right.

    Each text is tokenised once, and a token is learnt if a character of it is; so no token depends
    on where turns end. One that has no token to learn, since all of them were cut or the assistant
    says nothing, has an empty `scored`: leave it out, since a mean over no token is no number.

    Args:
        conversations: the conversations.
        tokenizer: a fast one of transformers, which gives character offsets.
        template: "tulu", or "chat" for the tokenizer's own; the special tokens that the tokenizer
            puts before a text are added to the first, since a chat template has its own.
        max_length: most tokens of a row.

    Raises:
        UserError: the tokenizer gives no offsets, has no token that ends a turn, or see `chat`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "tokenizer: gives no character offsets, which messages need. Add tokenizer.json."
        )
    render = _renderer(tokenizer, template)
    encoded: list[EncodedMessages] = []
    for start in range(0, len(conversations), _CHUNK):
        rendered = [_rendered(render, each) for each in conversations[start : start + _CHUNK]]
        encodings = tokenizer(
            [each.text for each in rendered],
            add_special_tokens=template == "tulu",
            return_attention_mask=False,
            verbose=False,
        ).encodings
        for each, encoding in zip(rendered, encodings, strict=True):
            encoded.append(_encoded(each, encoding, max_length))
    return encoded


def _renderer(tokenizer: Any, template: str) -> Callable[[Sequence[Message]], Transcript]:
    if template == "chat":
        return lambda messages: chat(messages, tokenizer)
    if template != "tulu":
        raise UserError(f"template: not known (got {template!r}). Choose tulu or chat.")
    eos = tokenizer.eos_token
    if eos is None:
        raise UserError("tokenizer: has no eos_token, which ends a turn. Add one.")
    return lambda messages: tulu(messages, eos)


def _rendered(render: Callable[..., Transcript], each: Conversation) -> Transcript:
    try:
        return render(each.messages)
    except UserError as error:
        raise UserError(f"{each.id}: {error}") from None


def _encoded(each: Transcript, encoding: Any, max_length: int | None) -> EncodedMessages:
    ids, added = encoding.ids, encoding.special_tokens_mask
    end = len(ids)
    while end and added[end - 1]:
        end -= 1
    end = end if max_length is None else min(end, max_length)
    scored = [
        place
        for place, (first, last) in enumerate(encoding.offsets[:end])
        if place and not added[place]
        if any(first < stop and last > start for start, stop in each.spans)
    ]
    return EncodedMessages(tuple(ids[:end]), tuple(scored))


def _conversation(row: Row) -> Conversation:
    found = row.values.get("messages")
    if not isinstance(found, list) or not found:
        raise UserError(
            f"{row.where}: has no messages. Give a list of {{role, content}} in that field."
        )
    for number, each in enumerate(found, start=1):
        if not isinstance(each, dict) or each.get("role") not in ROLES:
            role = each.get("role") if isinstance(each, dict) else None
            raise UserError(
                f"{row.where}: message {number} has an unknown role (got {show(role)}). Give "
                "system, user or assistant."
            )
        if not isinstance(each.get("content"), str):
            raise UserError(f"{row.where}: message {number} has no content. Give a text.")
    name = row.values.get("id")
    own = isinstance(name, str | int) and not isinstance(name, bool) and name != ""
    return Conversation(
        tuple(Message(each["role"], each["content"]) for each in found),
        str(name) if own else f"{row.source}:{row.number}",
        str(row.values.get("subtask") or ""),
    )

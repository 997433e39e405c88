r"""Conversations: supervised fine-tuning on the turns of the assistant.

A conversation is a list of messages {"role", "content"} with the roles system, user and assistant.
A template turns it into one text. The tokens of the assistant's turns are in the loss, including
the token that ends each turn.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from jaxlm.core.checks import one_of, show
from jaxlm.core.errors import UserError
from jaxlm.data.rows import TokenRow
from jaxlm.data.sources import Record
from jaxlm.data.splits import TextsConfig
from jaxlm.models.chat_template import render_chat

ROLES = ("system", "user", "assistant")
MessageTemplate = Literal["chat", "tulu", "plain"]
_CHUNK = 1024  # conversations per call of the tokenizer


class Message(NamedTuple):
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages with a name.

    Attributes:
        messages: at least one, in their order.
        id: the row's own, or its source and number.
        subtask: group that the conversation belongs to; empty for none.
    """

    messages: tuple[Message, ...]
    id: str
    subtask: str = ""

    @property
    def text(self) -> tuple[Message, ...]:
        """Everything that a model reads."""
        return self.messages

    @property
    def content(self) -> tuple[Any, ...]:
        """Everything but the id."""
        return (self.messages, self.subtask)


@dataclass(frozen=True, kw_only=True)
class MessagesConfig(TextsConfig):
    """The section `messages` of a configuration: conversations to fine-tune on.

    A row of a source has `messages`, a list of {role, content}; or `prompt` and `completion`, each
    a text or such a list. It may have an `id`, and a `subtask`, the group that it belongs to.

    Attributes:
        template: "chat" for the tokenizer's own chat template, "tulu" or "plain"; see the functions
            with these names.
    """

    template: MessageTemplate = "chat"

    key: ClassVar[str] = "messages"
    CHECKS: ClassVar[Mapping[str, Callable[[str, Any], None]]] = {
        **TextsConfig.CHECKS,
        "template": functools.partial(one_of, choices=("chat", "tulu", "plain")),
    }

    def parse(self, record: Record) -> Conversation:
        """Return the conversation in a row.

        Raises:
            UserError: the row has no messages, or one of them has an unknown role or no text.
        """
        values = record.values
        name = values.get("id")
        named = isinstance(name, str | int) and not isinstance(name, bool) and name != ""
        return Conversation(
            _messages(record),
            str(name) if named else f"{record.source}:{record.number}",
            str(values.get("subtask") or ""),
        )

    def tokenize(
        self, examples: Sequence[Conversation], tokenizer: Any, limit: int
    ) -> list[TokenRow]:
        """Return `encode_messages` with this template."""
        return encode_messages(examples, tokenizer, template=self.template, max_length=limit)


def _messages(record: Record) -> tuple[Message, ...]:
    values = record.values
    found = values.get("messages")
    if found is None and "prompt" in values and "completion" in values:
        found = [
            *_turns(values["prompt"], "user"),
            *_turns(values["completion"], "assistant"),
        ]
    if not isinstance(found, list) or not found:
        raise UserError(
            f"{record.where}: has no messages. Give a list of {{role, content}} in that field, or "
            "the fields prompt and completion."
        )
    for number, message in enumerate(found, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise UserError(
                f"{record.where}: message {number} has an unknown role (got {show(role)}). Give "
                "system, user or assistant."
            )
        if not isinstance(message.get("content"), str):
            raise UserError(f"{record.where}: message {number} has no content. Give a text.")
    return tuple(Message(message["role"], message["content"]) for message in found)


def _turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


class Transcript(NamedTuple):
    """A conversation as one text.

    Attributes:
        text: what the tokenizer reads.
        spans: (start, end) of the characters in the loss, one for each turn of the assistant.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def tulu(messages: Sequence[Message], eos: str) -> Transcript:
    r"""Write a conversation in the format of Tulu (Wang et al., arXiv:2306.04751).

        <|system|>\n{content}\n<|user|>\n{content}\n<|assistant|>\n{content}{eos}\n

    White space at the ends of each content is removed. The line break after `eos` is not in the
    loss; in the authors' code, which LESS copied, it is.

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


def plain(messages: Sequence[Message], eos: str) -> Transcript:
    """Concatenate the contents of a conversation, with `eos` after each of the assistant's.

    >>> plain([Message("user", "2 + 2 ="), Message("assistant", " 4")], "</s>").text
    '2 + 2 = 4</s>'
    """
    text, spans = "", []
    for role, content in messages:
        start = len(text)
        text += content
        if role == "assistant":
            text += eos
            spans.append((start, len(text)))
    return Transcript(text, tuple(spans))


def chat(messages: Sequence[Message], tokenizer: Any) -> Transcript:
    """Write a conversation with the tokenizer's own chat template.

    A turn of the assistant is the text between the prompt for it and the next turn, without white
    space at its end.

    Raises:
        UserError: the tokenizer cannot use its template, or the template writes a turn differently
            when others follow.
    """
    turns = [message._asdict() for message in messages]
    whole = render_chat(tokenizer, turns)
    spans = []
    for place, (role, _) in enumerate(messages):
        if role != "assistant":
            continue
        # A template is a program, so the only way to find a turn in its output is to render the
        # conversation up to its beginning and up to its end.
        before = render_chat(tokenizer, turns[:place], add_generation_prompt=True)
        after = render_chat(tokenizer, turns[: place + 1]).rstrip()
        if not (whole.startswith(after) and after.startswith(before)):
            raise UserError(
                f"chat template: writes message {place + 1} differently when others follow it or "
                "when its prompt is written alone. Give template tulu."
            )
        spans.append((len(before), len(after)))
    return Transcript(whole, tuple(spans))


_TEMPLATES: dict[str, Callable[[Sequence[Message], str], Transcript]] = {
    "tulu": tulu,
    "plain": plain,
}


def encode_messages(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    *,
    template: MessageTemplate = "tulu",
    max_length: int | None = None,
) -> list[TokenRow]:
    """Tokenize conversations and cut long ones on the right; the assistant's turns are in the loss.

    A row has no token in the loss if all of them were cut, or if the assistant says nothing. Skip
    such a row, since its mean loss is undefined.

    Args:
        conversations: the conversations.
        tokenizer: a fast transformers tokenizer, which has character offsets.
        template: see `MessagesConfig`. "tulu" and "plain" get the special tokens that the tokenizer
            puts before a text; a chat template writes its own.
        max_length: largest number of tokens in a row.

    Raises:
        UserError: the tokenizer has no offsets or no token that ends a turn, or as in `chat`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "tokenizer: gives no character offsets, which messages need. Add tokenizer.json."
        )
    render = _renderer(tokenizer, template)
    rows: list[TokenRow] = []
    for start in range(0, len(conversations), _CHUNK):
        chunk = conversations[start : start + _CHUNK]
        transcripts = [_rendered(render, conversation) for conversation in chunk]
        # Tokenize each text as a whole: tokens of turns tokenized separately would differ from what
        # the model reads when it generates. A token is in the loss if a character of it is.
        encodings = tokenizer(
            [transcript.text for transcript in transcripts],
            add_special_tokens=template != "chat",
            return_attention_mask=False,
            verbose=False,
        ).encodings
        for conversation, transcript, encoding in zip(chunk, transcripts, encodings, strict=True):
            ids, scored = _cut(transcript, encoding, max_length)
            rows.append(TokenRow(conversation.id, ids, scored, conversation.subtask))
    return rows


def _renderer(tokenizer: Any, template: str) -> Callable[[Sequence[Message]], Transcript]:
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "template: the tokenizer has no chat template (got chat). Choose tulu or plain."
            )
        return lambda messages: chat(messages, tokenizer)
    one_of("template", template, ("chat", *_TEMPLATES))
    eos = tokenizer.eos_token
    if eos is None:
        raise UserError("tokenizer: has no eos_token, which ends a turn. Add one.")
    return lambda messages: _TEMPLATES[template](messages, eos)


def _rendered(render: Callable[..., Transcript], conversation: Conversation) -> Transcript:
    try:
        return render(conversation.messages)
    except UserError as error:
        raise UserError(f"{conversation.id}: {error}") from None


def _cut(
    transcript: Transcript, encoding: Any, max_length: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ids, added = encoding.ids, encoding.special_tokens_mask
    end = len(ids)
    while end and added[end - 1]:  # drop an eos that the tokenizer adds: the text has its own end
        end -= 1
    end = end if max_length is None else min(end, max_length)
    scored = [
        place
        for place, (first, last) in enumerate(encoding.offsets[:end])
        if place and not added[place]
        if any(first < stop and last > start for start, stop in transcript.spans)
    ]
    return tuple(ids[:end]), tuple(scored)

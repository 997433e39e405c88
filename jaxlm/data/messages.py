r"""Conversations: supervised fine-tuning on the turns of the assistant.

A conversation is a list of messages {"role", "content"} with the roles system, user and assistant.
A template turns it into one text. The tokens of the assistant's turns are in the loss, including
the token that ends each turn.
"""

from collections.abc import Callable, Iterable, Sequence
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
_CHUNK = 512  # conversations per call of the tokenizer


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

    def parse(self, record: Record) -> Conversation:
        """Return the conversation in a row.

        Raises:
            UserError: the row has no messages, or one of them has an unknown role or no text.
        """
        values = record.values
        name = values.get("id")
        named = isinstance(name, str | int) and not isinstance(name, bool) and name != ""
        return Conversation(
            messages_of(record),
            str(name) if named else f"{record.source}:{record.number}",
            str(values.get("subtask") or ""),
        )

    def tokenize(
        self, examples: Sequence[Conversation], tokenizer: Any, limit: int
    ) -> list[TokenRow]:
        """Return `encode_messages` with this template."""
        return encode_messages(examples, tokenizer, template=self.template, max_length=limit)


def messages_of(record: Record) -> tuple[Message, ...]:
    """Return the messages of a row, see `MessagesConfig`."""
    values = record.values
    found = values.get("messages")
    if found is None and "prompt" in values and "completion" in values:
        found = _turns(values["prompt"], "user") + _turns(values["completion"], "assistant")
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
    """A conversation as one text, and the spans of its characters that are in the loss."""

    text: str
    spans: tuple[tuple[int, int], ...]


def tulu(messages: Sequence[Message], eos: str) -> Transcript:
    r"""Write a conversation in the format of Tulu (Wang et al., arXiv:2306.04751).

        <|system|>\n{content}\n<|user|>\n{content}\n<|assistant|>\n{content}{eos}\n

    White space at the ends of each content is removed. The line break after `eos` is not in the
    loss; in the authors' code, which LESS copied, it is.
    """
    turns = ((f"<|{role}|>\n", role, content.strip(), "\n") for role, content in messages)
    return _written(turns, eos)


def plain(messages: Sequence[Message], eos: str) -> Transcript:
    """Concatenate the contents of a conversation, with `eos` after each of the assistant's."""
    return _written((("", role, content, "") for role, content in messages), eos)


def _written(turns: Iterable[tuple[str, str, str, str]], eos: str) -> Transcript:
    """Join turns of (text before, role, content, text after)."""
    text, spans = "", []
    for before, role, content, after in turns:
        text += before
        start = len(text)
        text += content
        if role == "assistant":
            text += eos
            spans.append((start, len(text)))
        text += after
    return Transcript(text, tuple(spans))


def chat(messages: Sequence[Message], tokenizer: Any) -> Transcript:
    """Write a conversation with the tokenizer's own chat template.

    A turn of the assistant is the text between the prompt for it and the next turn, without white
    space at its end.
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


def prompt_of(
    messages: str | Sequence[Message], tokenizer: Any, template: MessageTemplate = "chat"
) -> str | list[int]:
    """Return what stands before the assistant's answer, as `encode_messages` trains it.

    A chat template writes all special tokens itself, so its prompt is tokens, to which the
    tokenizer adds none. Other prompts are text; text is returned as it is.
    """
    if isinstance(messages, str):
        return messages
    if template != "chat":
        eos = tokenizer.eos_token or ""
        written = _TEMPLATES[template]([*messages, Message("assistant", "")], eos)
        return written.text[: written.spans[-1][0]]
    turns = [message._asdict() for message in messages]
    text = render_chat(tokenizer, turns, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


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
    """
    rows: list[TokenRow] = []
    for start in range(0, len(conversations), _CHUNK):
        chunk = conversations[start : start + _CHUNK]
        written = transcripts(chunk, tokenizer, template)
        # Tokenize each text as a whole: tokens of turns tokenized separately would differ from what
        # the model reads when it generates. A token is in the loss if a character of it is.
        encodings = tokenizer(
            [transcript.text for transcript in written],
            add_special_tokens=template != "chat",
            return_attention_mask=False,
            verbose=False,
        ).encodings
        for conversation, transcript, encoding in zip(chunk, written, encodings, strict=True):
            ids, scored = _cut(transcript, encoding, max_length)
            rows.append(TokenRow(conversation.id, ids, scored, conversation.subtask))
    return rows


def transcripts(
    conversations: Sequence[Conversation], tokenizer: Any, template: str
) -> list[Transcript]:
    """Write conversations with a template, see `MessagesConfig`."""
    eos, write = tokenizer.eos_token, {"tulu": tulu, "plain": plain}
    one_of("template", template, ("chat", *write))
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "tokenizer: gives no character offsets, which messages need. Add tokenizer.json."
        )
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "template: the tokenizer has no chat template (got chat). Choose tulu or plain."
        )
    if template != "chat" and eos is None:
        raise UserError("tokenizer: has no eos_token, which ends a turn. Add one.")

    def render(conversation: Conversation) -> Transcript:
        try:
            if template == "chat":
                return chat(conversation.messages, tokenizer)
            return write[template](conversation.messages, eos)
        except UserError as error:
            raise UserError(f"{conversation.id}: {error}") from None

    return [render(conversation) for conversation in conversations]


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

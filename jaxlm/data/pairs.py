"""Preference pairs: a prompt with a chosen and a rejected response."""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from jaxlm.core.checks import show
from jaxlm.core.errors import UserError
from jaxlm.data.batching import EncodedTask, joined_row
from jaxlm.data.encoding import Encoded, encode_responses
from jaxlm.data.messages import Conversation, Message, MessageTemplate, messages_of, transcripts
from jaxlm.data.prompts import Prompted
from jaxlm.data.rows import SPLITS, check_vocabulary, length_buckets, tokenizer_of
from jaxlm.data.sources import Record
from jaxlm.data.splits import Splits, SplitsConfig

Text = str | tuple[Message, ...]


@dataclass(frozen=True)
class Pair:
    """A prompt and two responses, all of them texts or all of them messages.

    Attributes:
        prompt: what both responses answer.
        chosen, rejected: the better and the worse response; if messages, one of the assistant.
        id: source and number of the row.
        margin: rating of the chosen response minus that of the rejected one; 0 for a tie, None
            without ratings.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    id: str
    margin: float | None = None

    @property
    def text(self) -> tuple[Text, ...]:
        """Everything that a model reads."""
        return (self.prompt, self.chosen, self.rejected)

    @property
    def content(self) -> tuple[Any, ...]:
        """Everything but the id."""
        return (*self.text, self.margin)


@dataclass(frozen=True, kw_only=True)
class PairsConfig(SplitsConfig):
    """The section `pairs` of a configuration: preferences to learn.

    A row has `prompt`, `chosen` and `rejected`, texts or lists of messages {role, content}. If it
    has no `prompt`, the common beginning of both responses is the prompt. `score_chosen` and
    `score_rejected` are ratings. Or it has `prompt`, `responses` and `scores`, the latter two of
    the same length: each two responses with different scores make a pair. Pairs with equal
    responses or ratings are left out.

    Attributes:
        template: how messages are written, see `jaxlm.data.MessagesConfig`.
        append_eos: end a response that is text with the tokenizer's `eos_token`.
    """

    template: MessageTemplate = "chat"
    append_eos: bool = True

    key: ClassVar[str] = "pairs"
    objective: ClassVar[str] = "preference"
    """Name of the objective of a run that names none."""

    def load(self, *, seed: int, base_dir: Any = None) -> "Pairs":
        """Read and draw the pairs of every split; relative paths start in `base_dir`."""
        examples = {
            split: [pair for record in records for pair in self.parse(record)]
            for split, records in self.records(base_dir).items()
        }
        return Pairs(self, *self.draw(examples, seed=seed))

    def parse(self, record: Record) -> Iterator[Pair]:
        """Yield the pairs in a row of a source."""
        values, name = record.values, f"{record.source}:{record.number}"
        if "responses" not in values:
            prompt, chosen, rejected = _read(record, values)
            ratings = values.get("score_chosen"), values.get("score_rejected")
            margin = None
            if None not in ratings:
                better, worse = (_number(record, rating) for rating in ratings)
                margin = better - worse
            if margin is not None and margin < 0:
                raise UserError(
                    f"{record.where}: the rejected response is rated higher (got {ratings[0]} and "
                    f"{ratings[1]}). Exchange the responses."
                )
            yield Pair(prompt, chosen, rejected, name, margin)
            return
        responses, scores = values["responses"], values.get("scores")
        if not isinstance(responses, list) or not isinstance(scores, list):
            raise UserError(f"{record.where}: responses and scores must be lists. Correct them.")
        if len(responses) != len(scores) or len(responses) < 2:
            raise UserError(
                f"{record.where}: needs two responses or more, each with a score (got "
                f"{len(responses)} and {len(scores)}). Correct it."
            )
        rated = sorted(
            zip([_number(record, score) for score in scores], responses, strict=True),
            key=lambda pair: -pair[0],
        )
        for place, ((more, chosen), (less, rejected)) in enumerate(
            itertools.combinations(rated, 2)
        ):
            row = {"prompt": values.get("prompt"), "chosen": chosen, "rejected": rejected}
            yield Pair(*_read(record, row), f"{name}.{place}", more - less)

    def unread(self, length: int) -> EncodedTask:
        """Return one pair of that many tokens, half of them the prompt, in place of the data."""
        prompt, response = (0,) * (length - length // 2), (0,) * (length // 2)
        pair = Encoded(0, (prompt,), (), (response, (*response[1:], 1)))
        return as_task({"train": [pair], "validation": [], "test": [pair]}, 0)


def _number(record: Record, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise UserError(f"{record.where}: a score is not a number (got {show(value)}). Correct it.")
    return float(value)


def _read(record: Record, values: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    """Return prompt, chosen and rejected of a row; without a prompt, what both begin with is it."""
    for name in ("chosen", "rejected"):
        if name not in values:
            raise UserError(
                f"{record.where}: has no {name!r} (got {', '.join(map(repr, values))}). Give "
                "prompt, chosen and rejected."
            )
    chosen, rejected = (_text(record, values[name]) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(
            f"{record.where}: one response is text, the other messages. Write them alike."
        )
    if values.get("prompt") is not None:
        prompt: Text = _text(record, values["prompt"])
        if isinstance(prompt, str) and not isinstance(chosen, str):
            prompt = (Message("user", prompt),)
        elif isinstance(chosen, str) and not isinstance(prompt, str):
            chosen, rejected = ((Message("assistant", str(x)),) for x in (chosen, rejected))
    else:
        prompt, chosen, rejected = _split(chosen, rejected)
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(response, str):
            roles = [message.role for message in response]
            if roles != ["assistant"]:
                raise UserError(
                    f"{record.where}: {name} must be one message of the assistant after the prompt "
                    f"(got {', '.join(roles) or 'none'}). Put the others into prompt."
                )
            response = response[0].content
        if not response.strip():
            raise UserError(
                f"{record.where}: {name} is empty (got {response!r}). Leave the row out."
            )
    return prompt, chosen, rejected


def _text(record: Record, value: Any) -> Text:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(
            f"{record.where}: a prompt or response is neither a text nor a list of messages (got "
            f"{show(value)}). Correct it."
        )
    return messages_of(Record({"messages": value}, record.source, record.number, record.unit))


def _split(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Return what both begin with, and the rests; a space before the difference stays with it."""
    # Without the last part of the shorter one: a response may begin with the other one.
    both = zip(chosen[:-1], rejected[:-1], strict=False)
    count = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
    if isinstance(chosen, str) and count:
        count -= chosen[count - 1] == " "
    return chosen[:count], chosen[count:], rejected[count:]


@dataclass(frozen=True)
class Pairs(Splits):
    """The pairs of each split; a split that does not exist is empty."""

    config: PairsConfig
    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def encode(self, lm: Any, *, max_length: int | None = None) -> EncodedTask:
        """Tokenize the pairs for a model: each is an example whose right option is the first.

        Args:
            lm: a `jaxlm.models.LanguageModel` with a tokenizer.
            max_length: another limit on the tokens of prompt and response; the smallest applies.

        Raises:
            UserError: the model is not a decoder, its tokenizer does not fit, or a split has no
                pair of two different responses.
        """
        config, tokenizer = self.config, tokenizer_of(lm)
        if lm.config.kind != "decoder" or lm.config.head != "lm":
            raise UserError(
                "model: pairs need a decoder with a language head (got one of the kind "
                f"{lm.config.kind} with the head {lm.config.head}). Give such a model."
            )
        limits = (lm.config.max_positions, max_length, config.max_length)
        limit = min(limit for limit in limits if limit is not None)
        kept: dict[str, list[Encoded]] = {}
        dropped: dict[str, tuple[str, ...]] = {}
        for split in SPLITS:
            pairs: tuple[Pair, ...] = getattr(self, split)
            encoded = list(encode_pairs(pairs, tokenizer, config, limit))
            good = [e is not None and p.margin != 0 for p, e in zip(pairs, encoded, strict=True)]
            kept[split] = [each for each, use in zip(encoded, good, strict=True) if each and use]
            dropped[split] = tuple(p.id for p, use in zip(pairs, good, strict=True) if not use)
            if pairs and not kept[split]:
                raise UserError(
                    f"pairs.{split}: no pair has two different responses within max_length, and "
                    f"ratings that differ (got {len(pairs)} pairs). Raise pairs.max_length, or "
                    "give others."
                )
        tokens = (max(map(max, (*x.input_ids, *x.targets))) for rows in kept.values() for x in rows)
        check_vocabulary(max(tokens, default=0), lm.config.vocab_size)
        return as_task(kept, lm.config.pad_id or 0, dropped)


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: Any, config: PairsConfig, limit: int
) -> Iterator[Encoded | None]:
    """Yield the tokens of each pair; None where both responses have the same ones, or one none."""
    end = tokenizer.eos_token_id if config.append_eos else None
    for is_text, group in itertools.groupby(pairs, lambda pair: isinstance(pair.prompt, str)):
        rows = list(group)
        texts = _plain(rows) if is_text else _written(rows, tokenizer, config.template)
        yield from encode_responses(
            texts,
            tokenizer,
            max_length=limit,
            end=end if is_text else None,
            special=is_text or config.template != "chat",
        )


def _plain(pairs: Sequence[Pair]) -> list[Prompted]:
    return [
        Prompted(str(each.prompt), (str(each.chosen), str(each.rejected)), (0,), (), each.id)
        for each in pairs
    ]


def _written(pairs: Sequence[Pair], tokenizer: Any, template: MessageTemplate) -> list[Prompted]:
    """Write both responses after the prompt's messages; a response is the last turn."""
    conversations = [
        Conversation((*each.prompt, *response), each.id)
        for each in pairs
        for response in (each.chosen, each.rejected)
    ]
    written = iter(transcripts(conversations, tokenizer, template))
    texts = []
    for each in pairs:
        both = [next(written), next(written)]
        starts = {transcript.text[: transcript.spans[-1][0]] for transcript in both}
        if len(starts) > 1:
            raise UserError(
                f"{each.id}: the template writes the prompt of both responses differently. Give "
                "template tulu."
            )
        options = tuple(x.text[slice(*x.spans[-1])] for x in both)
        texts.append(Prompted(starts.pop(), options, (0,), (), each.id))
    return texts


def as_task(
    splits: Mapping[str, Sequence[Encoded]],
    pad_id: int,
    dropped: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> EncodedTask:
    """Return the splits of pairs as a task, whose batches hold prompt and responses in one row."""
    lengths = [len(joined_row(each)) for rows in splits.values() for each in rows]
    return EncodedTask(
        labels=(),
        token_ids=None,
        pad_id=pad_id,
        buckets=length_buckets(lengths),
        train=tuple(splits["train"]),
        validation=tuple(splits["validation"]),
        test=tuple(splits["test"]),
        joined=True,
        key="pairs",
        dropped=dropped,
    )

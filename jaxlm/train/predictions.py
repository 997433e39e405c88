"""Predictions for rows: the class of a task, a completion, tags, or the log-probability of a text.

Each function here returns a `Predictor`; `predicted` runs it over a stream of rows, chunk by chunk.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.core.checks import show
from jaxlm.core.errors import UserError
from jaxlm.data import (
    Document,
    Example,
    Message,
    PaddedRows,
    Tagged,
    TextConfig,
    TokenRow,
    TokensConfig,
)
from jaxlm.data.messages import messages_of
from jaxlm.data.rows import check_vocabulary, fixed_buckets, tokenizer_of
from jaxlm.data.sources import Record
from jaxlm.data.tokens import encode_words
from jaxlm.evaluation import generate_text, probabilities
from jaxlm.models import LanguageModel
from jaxlm.models.generation import Sampling
from jaxlm.train.measure import CHUNK, Choices, Tagger
from jaxlm.train.state import Program
from jaxlm.typing import Batch, Params

Fields = dict[str, Any]
"""What a row of predictions has beside the fields of the input."""


class Predictor(NamedTuple):
    """A model at work on rows.

    Attributes:
        chunk: rows that are predicted together; the last chunk of a file may have fewer.
        predict: `(examples, first) -> fields`, one or more for each example; `first` is the place
            of the first example in the file.
        each: rows of predictions of an example.
    """

    chunk: int
    predict: Callable[[Sequence[Any], int], list[list[Fields]]]
    each: int = 1


def predicted(
    records: Iterator[Record], read: Callable[[Record], Any], predictor: Predictor, first: int = 0
) -> Iterator[list[Fields]]:
    """Yield the rows of predictions of each chunk, from the record `first` on, in their order."""
    rest = itertools.islice(records, first, None)
    while chunk := list(itertools.islice(rest, predictor.chunk)):
        found = predictor.predict([read(record) for record in chunk], first)
        pairs = zip(chunk, found, strict=True)
        yield [with_input(record, fields) for record, several in pairs for fields in several]
        first += len(chunk)


def with_input(record: Record, fields: Fields) -> Fields:
    """Return a row of predictions; an input field with a name of ours becomes `input_NAME`."""
    given: Fields = {}
    values = json.loads(as_json(record))
    for name, value in values.items():
        key = name
        while key in fields or (key != name and key in values):
            key = f"input_{key}"
        given[key] = value
    return {**given, **fields}


def as_json(record: Record) -> str:
    """Return the values of a row as JSON; dates and other types of Parquet become text."""
    return json.dumps(dict(record.values), default=str)


def choice_fields(
    examples: Sequence[Example], scores: Float[np.ndarray, "N C"], names: Sequence[str]
) -> list[Fields]:
    """Return the predicted option and the probability of each; `names` are those of shared ones."""
    rows = []
    for example, score, shares in zip(examples, scores, probabilities(scores), strict=True):
        options, place = [*map(str.strip, example.options)] or [*names], int(np.argmax(score))
        by_name = dict.fromkeys(options, 0.0)
        for option, share in zip(options, shares.tolist(), strict=False):
            by_name[option] += share  # a row may list an option twice
        fields = {"prediction": options[place], "prediction_index": place}
        rows.append({**fields, "probabilities": by_name})
    return rows


def choosing(choices: Choices, names: Sequence[str]) -> Predictor:
    """Predict the options of a task's examples, by the scores that `jaxlm evaluate` measures."""

    def predict(examples: Sequence[Example], first: int) -> list[list[Fields]]:
        del first
        return [[row] for row in choice_fields(examples, choices.scores(examples), names)]

    return Predictor(choices.chunk, predict)


def prompt_reader(as_messages: bool) -> Callable[[Record], str | tuple[Message, ...]]:
    """Return a function that reads the field `prompt` or `messages` of a row.

    A prompt that is text is continued as it is or, with `as_messages`, is a turn of the user. The
    assistant's turns at the end of a conversation are left out: they are what is predicted.
    """

    def read(record: Record) -> str | tuple[Message, ...]:
        values, prompt = record.values, record.values.get("prompt")
        if "messages" not in values:
            if isinstance(prompt, str) and not as_messages:
                return prompt
            turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            record = dataclasses.replace(record, values={"messages": turns})
        messages = list(messages_of(record))
        while messages and messages[-1].role == "assistant":
            messages.pop()
        if not messages:
            raise UserError(
                f"{record.where}: has no turn that the assistant answers (got "
                f"{show(values.get('messages'))}). Give a message of the user."
            )
        return tuple(messages)

    return read


@dataclasses.dataclass(frozen=True)
class Completing:
    """Completions of prompts, all of one chunk in a batch.

    Attributes:
        prompt: text or tokens to continue, from an example.
        max_new_tokens, sampling, samples, stop: see `jaxlm.evaluation.generate_text`.
        seed: of the draws.
        batch_size: prompts in a batch.
        strip: whether to remove the white space around a completion.
        max_length: most tokens of prompt and completion; None for those of the model.
    """

    prompt: Callable[[Any], str | list[int]]
    max_new_tokens: int
    sampling: Sampling
    samples: int
    seed: int
    batch_size: int
    stop: tuple[str, ...] = ()
    strip: bool = False
    max_length: int | None = None

    def predictor(self, lm: LanguageModel) -> Predictor:
        """Return the predictor of a model; a prompt that is too long for it is cut on the left."""
        longest = min(lm.config.max_positions, self.max_length or lm.config.max_positions)
        room = longest - self.max_new_tokens
        if room < 1:
            raise UserError(
                f"max_new_tokens: leaves no room for a prompt in {longest} tokens (got "
                f"{self.max_new_tokens}). Lower it."
            )

        def predict(examples: Sequence[Any], first: int) -> list[list[Fields]]:
            completions = generate_text(
                lm,
                [self.prompt(example) for example in examples],
                max_new_tokens=self.max_new_tokens,
                max_prompt_tokens=room,
                sampling=self.sampling,
                stop=self.stop,
                num_samples=self.samples,
                key=jax.random.fold_in(jax.random.key(self.seed), first),
            )
            return [
                [self._fields(i, each.text, each.log_probability) for i, each in enumerate(several)]
                for several in completions
            ]

        return Predictor(self.batch_size, predict, self.samples)

    def _fields(self, sample: int, text: str, log_probability: float) -> Fields:
        fields = completion_fields(text.strip() if self.strip else text, log_probability)
        return {"sample": sample, **fields} if self.samples > 1 else fields


def completion_fields(text: str, log_probability: float) -> Fields:
    """Return a completion and the log-probability of all its tokens."""
    return {"completion": text, "log_probability": log_probability}


def scoring_texts(lm: LanguageModel, config: TextConfig, *, batch_size: int) -> Predictor:
    """Score documents as a run on `text` does: in pieces, with the token that ends a text."""
    if lm.config.kind != "decoder":
        raise UserError(
            f"model: text needs a decoder (got one of the kind {lm.config.kind}). Give a decoder."
        )
    limit = min(lm.config.max_positions, config.max_length or lm.config.max_positions)

    def total(params: Params, batch: Batch) -> tuple[Array, Array]:
        log_probs = lm.log_probs(params, batch["input_ids"], batch["attention_mask"])
        weights = batch["weights"][:, 1:]
        return jnp.sum(log_probs * weights, axis=1), jnp.sum(weights, axis=1)

    program = Program(total)

    def predict(documents: Sequence[Document], first: int) -> list[list[Fields]]:
        del first
        named = [Document(each.text, str(i)) for i, each in enumerate(documents)]
        rows = [row for row in config.tokenize(named, tokenizer_of(lm), limit) if len(row.ids) > 1]
        longest = max((len(row.ids) for row in rows), default=1)
        check_vocabulary(max((max(row.ids) for row in rows), default=0), lm.config.vocab_size)
        buckets = fixed_buckets(longest, limit)
        whose = np.array([int(row.id.partition("@")[0]) for row in rows], int)
        sums = np.zeros((len(documents), 2))
        padded = PaddedRows(rows, lm.config.pad_id or 0, buckets=buckets)
        for batch in padded.eval_batches(batch_size):
            index = batch.pop("index")
            real = index >= 0
            scored = np.stack(jax.device_get(program(lm.params, batch)), axis=1)
            np.add.at(sums, whose[index[real]], scored[real])
        return [[_text_fields(*pair)] for pair in sums.tolist()]

    return Predictor(CHUNK * batch_size, predict)


def class_names(lm: LanguageModel, config: TokensConfig) -> tuple[str, ...]:
    """Return the names of the classes of a model that classifies tokens."""
    if lm.config.head != "token_classifier":
        raise UserError(
            f"model: has no classifier of tokens (got the head {lm.config.head!r}). Fine-tune it "
            "on tokens first."
        )
    names, count = lm.config.label_names or config.labels or (), lm.config.num_labels
    return names if len(names) == count else tuple(f"LABEL_{i}" for i in range(count))


def tagging(lm: LanguageModel, config: TokensConfig, *, batch_size: int) -> Predictor:
    """Predict the tags of words; None for a word that was cut or has no token."""
    names, tagger = class_names(lm, config), Tagger(lm, batch_size=batch_size)
    limit = min(lm.config.max_positions, config.max_length or lm.config.max_positions)

    def predict(examples: Sequence[Tagged], first: int) -> list[list[Fields]]:
        del first
        texts = [*encode_words([each.words for each in examples], tokenizer_of(lm), limit)]
        read = [i for i, text in enumerate(texts) if text.places]
        rows = [TokenRow(examples[i].id, *texts[i][:2]) for i in read]
        check_vocabulary(max((max(row.ids) for row in rows), default=0), lm.config.vocab_size)
        buckets = fixed_buckets(max((len(row.ids) for row in rows), default=1), limit)
        padded = PaddedRows(rows, lm.config.pad_id or 0, buckets=buckets)
        fields: list[Fields] = [
            {key: [None] * len(each.words) for key in ("prediction", "probabilities")}
            for each in examples
        ]
        for i, (classes, shares) in zip(read, tagger(padded, lm.params), strict=True):
            for word, tag, share in zip(texts[i].words, classes, shares.tolist(), strict=True):
                fields[i]["prediction"][word] = names[tag]
                fields[i]["probabilities"][word] = share
        return [[row] for row in fields]

    return Predictor(CHUNK * batch_size, predict)


def _text_fields(log_probability: float, tokens: float) -> Fields:
    mean = log_probability / tokens if tokens else float("nan")
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(-mean))
    return {
        "log_probability": log_probability,
        "num_tokens": int(tokens),
        "log_probability_per_token": mean,
        "perplexity": perplexity,
    }


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what changes no prediction: names of files, draws of rows."""
    away = {"model", "base", "rows", "output", "train", "validation", "test"}
    return {
        name: settings_of(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in away
    }

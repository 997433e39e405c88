"""Generate text from string prompts, with stop strings and streaming.

A completion is the text that its tokens add to the decoded prompt, so that prompt and completion
read as one text; special tokens are kept.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.artifacts.processes import to_host
from jaxlm.core.checks import integer, show
from jaxlm.core.errors import UserError
from jaxlm.data.encoding import special_prefix
from jaxlm.models import LanguageModel
from jaxlm.models.generation import Generated, Generator, Sampling, State, decoding_params

Finish = Literal["stop", "length"]
Prompt = str | Sequence[int]
"""A text, or its tokens."""
GREEDY = Sampling()
_MULTIPLE = 16
"""Prompts are padded to a multiple of this length, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sample after a prompt.

    Attributes:
        text: the generated text, without the stop string and everything after it.
        tokens: int32 [N], the generated tokens; the last one is the stop token or completes the
            stop string, if one ended the sample.
        log_probs: float32 [N], of the tokens under the model, without temperature and filters.
        finish: "stop" for a stop token or string, "length" for `max_new_tokens`.
    """

    text: str
    tokens: Int[np.ndarray, " N"]
    log_probs: Float[np.ndarray, " N"]
    finish: Finish

    @property
    def log_probability(self) -> float:
        """Log-probability of the whole sample, in nats."""
        return float(np.sum(self.log_probs, dtype=np.float64))


def generate_text(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    num_samples: int = 1,
    max_prompt_tokens: int | None = None,
    key: Array | None = None,
    chunk: int = 16,
    view: Any = None,
) -> list[list[Completion]]:
    """Generate continuations of prompts, all in one batch.

    A sample ends at a token in the model's `config.stops`, or at the first complete stop string,
    wherever it stands in the generated text. The result does not depend on `chunk`.

    Args:
        lm: a decoder with its tokenizer.
        prompts: texts, tokenised with the special tokens that the tokenizer puts before them and
            without those that it puts after them; or their tokens.
        max_new_tokens: most tokens of a sample.
        sampling: how tokens are drawn.
        stop: strings that end a sample.
        num_samples: samples of each prompt; the prompt is read once for all.
        max_prompt_tokens: longer prompts are cut on the left, but keep their special tokens. None
            cuts nothing.
        key: a typed key for the draws, not needed at temperature 0.
        chunk: tokens to generate between two searches for stop strings.
        view: see `jaxlm.core.views`.

    Returns:
        The samples of each prompt.

    Raises:
        UserError: if there is no tokenizer or no key, a prompt has no tokens or more than the
            model's positions, a stop string is empty, or the model does not generate or has scores
            that are not finite.
    """
    _check(prompts, stop, chunk)
    if not prompts:
        return []
    generator, state, rows = _start(
        lm,
        prompts,
        max_new_tokens,
        sampling,
        stop,
        max_prompt_tokens,
        num_samples=num_samples,
        key=key,
        view=view,
    )
    ended: dict[int, Completion] = {}
    params, count = decoding_params(lm.params, view), len(rows) * num_samples
    while True:
        generated = _read(state)
        for i in range(count):
            completion = ended.get(i) or rows[i // num_samples].end(generated, i)
            if completion is not None:
                ended[i] = completion
        if len(ended) == count:
            break
        done = np.isin(np.arange(count), list(ended))
        state = dataclasses.replace(state, done=state.done | done)
        # Only stop strings are searched for on the host; stop tokens end a row on the device.
        steps = chunk if stop else max_new_tokens
        state = generator.advance(params, state, steps, view=view)
    samples = [ended[i] for i in range(len(ended))]
    return [samples[i : i + num_samples] for i in range(0, len(samples), num_samples)]


def stream_text(
    lm: LanguageModel,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    key: Array | None = None,
    chunk: int = 1,
    view: Any = None,
) -> Iterator[str]:
    """Generate a continuation and yield its text in pieces; arguments as in `generate_text`.

    No piece ends inside a character, or inside what may become a stop string. Joined, the pieces
    are the text of `generate_text`. Wrong arguments raise at the call, before the first piece.
    """
    _check([prompt], stop, chunk)
    generator, state, (row,) = _start(
        lm, [prompt], max_new_tokens, sampling, stop, num_samples=1, key=key, view=view
    )

    def pieces(state: State) -> Iterator[str]:
        shown, params = 0, decoding_params(lm.params, view)
        while True:
            generated = _read(state)
            completion = row.end(generated, 0)
            text = row.settled(generated) if completion is None else completion.text
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
            if completion is not None:
                return
            state = generator.advance(params, state, chunk, view=view)

    return pieces(state)


@dataclasses.dataclass(frozen=True)
class _Row:
    """Converts the tokens after one prompt to text."""

    tokenizer: Any
    prompt: list[int]
    stop: Sequence[str]
    stop_ids: Sequence[int]

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text that tokens add to the prompt."""
        # Decoded without the prompt, SentencePiece would drop a leading space.
        return self._decode([*self.prompt, *tokens])[len(self._decode(self.prompt)) :]

    def end(self, generated: Any, i: int) -> Completion | None:
        """Return the completion in row i, or None if it has not ended yet."""
        tokens = generated.tokens[i, : generated.lengths[i]].tolist()
        ended = tokens[-1] in self.stop_ids
        text = self.text(tokens[:-1] if ended else tokens)
        count = len(tokens)
        finish: Finish = "stop" if ended else "length"
        if (cut := self._cut(text)) is not None:
            # Find the shortest prefix with a stop string by bisection, since decoding is slow.
            numbers = range(1, count + 1)
            first = bisect.bisect_left(
                numbers, True, key=lambda n: self._cut(self.text(tokens[:n])) is not None
            )
            text, count, finish = text[:cut], numbers[first], "stop"
        elif not ended and count < generated.tokens.shape[1]:
            return None
        return Completion(text, generated.tokens[i, :count], generated.log_probs[i, :count], finish)

    def settled(self, generated: Any) -> str:
        """Return the text of row 0 without a partial character or stop string at its end."""
        # A partial character decodes to U+FFFD.
        text = self.text(generated.tokens[0, : generated.lengths[0]].tolist()).rstrip("\ufffd")
        starts = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        return text[: len(text) - held]

    def _cut(self, text: str) -> int | None:
        """Return the start of the stop string that ends first; among equal ends, the longest."""
        places = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop]
        return min((place for place in places if place[1] >= 0), default=(0, None))[1]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def _read(state: State) -> Generated:
    """Return the tokens so far, on the host."""
    generated = jax.tree.map(to_host, state.found)
    # An argmax over NaN still gives a token, so the text would hide the error.
    if not np.isfinite(generated.log_probs).all():
        raise UserError(
            "model: its scores are not finite (got nan). Check that its weights are finite and not "
            "too large."
        )
    return generated


def _check(prompts: Sequence[Prompt], stop: Sequence[str], chunk: int) -> None:
    for name, value in (("prompts", prompts), ("stop", stop)):
        if isinstance(value, str):
            raise UserError(f"{name}: must be a list of texts (got {show(value)}). Give a list.")
    if "" in stop:
        raise UserError("stop: has an empty string (got ''). Leave it out.")
    integer("chunk", chunk)


def _start(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    max_prompt_tokens: int | None = None,
    **options: Any,
) -> tuple[Generator, State, list[_Row]]:
    """Read the prompts, padded on the left."""
    config = lm.config
    tokens = _tokenise(lm, prompts, max_prompt_tokens)
    rows = [_Row(lm.tokenizer, ids, stop, config.stops) for ids in tokens]
    # Padded on the left, so that all samples start at the same position.
    length = -(-max(len(row.prompt) for row in rows) // _MULTIPLE) * _MULTIPLE
    ids, mask = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, length - len(row.prompt) :] = row.prompt
        mask[i, length - len(row.prompt) :] = 1
    generator = Generator(config, sampling, config.stops)
    state = generator.start(lm.params, ids, mask, max_new_tokens=max_new_tokens, **options)
    return generator, state, rows


def _tokenise(lm: LanguageModel, prompts: Sequence[Prompt], most: int | None) -> list[list[int]]:
    """Tokenise prompts, without the tokens that the tokenizer puts after every text.

    Prompts of more than `most` tokens are cut after the special tokens at their beginning.
    """
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise UserError(
            "model: has no tokenizer, needed for text (got None). Put its files into the model's "
            "folder, or give token ids to lm.generate."
        )
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    behind = tokenizer("a")["input_ids"][::-1].index(alone[-1])
    special = set(tokenizer.all_special_ids)
    rows = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = tokenizer(prompt, verbose=False)["input_ids"]
            ids = ids[: len(ids) - behind]
        else:
            ids = list(prompt)
        excess = 0 if most is None else max(0, len(ids) - most)
        kept = special_prefix(ids, special)
        rows.append(ids[:kept] + ids[kept + excess :])
        if not ids:
            raise UserError(
                f"prompt: has no tokens, and the tokenizer puts none before it (got {prompt!r}). "
                "Give text."
            )
    return rows

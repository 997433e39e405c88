"""Text in, text out: prompts as strings, stop strings, and text as it comes.

A completion is what its tokens add to the decoded prompt, so that prompt and completion together
read as one text; special tokens are shown.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.artifacts.processes import to_host
from jaxlm.core.checks import show, whole
from jaxlm.core.errors import UserError
from jaxlm.models import LanguageModel
from jaxlm.models.generation import Generated, Generator, Sampling, State, decoding_params

Finish = Literal["stop", "length"]
GREEDY = Sampling()
_MULTIPLE = 16  # prompts are padded to a multiple, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sample after a prompt.

    Attributes:
      text: what was generated, less the stop string and all that follows.
      tokens: int32 [N], those that were drawn; the last one is the stop token or completes the stop
        string, where one ended the sample.
      log_probs: float32 [N], of the tokens under the model, without temperature and filters.
      finish: "stop" for a stop token or string, "length" for `max_new_tokens`.
    """

    text: str
    tokens: Int[np.ndarray, " N"]
    log_probs: Float[np.ndarray, " N"]
    finish: Finish


def generate_text(
    lm: LanguageModel,
    prompts: Sequence[str],
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
    """Continues prompts, all of them in one batch.

    The tokens `config.stops` of the model end a sample, and so does the first stop string that is
    complete, wherever it stands in the generated text. What comes out does not depend on `chunk`.

    Args:
      lm: a decoder with its tokenizer.
      prompts: texts; tokenised with the special tokens that the tokenizer puts before them, and
        without those that it puts behind.
      max_new_tokens: tokens of a sample.
      sampling: how tokens are drawn.
      stop: strings that end a sample.
      num_samples: samples of each prompt; the prompt is read once for all.
      max_prompt_tokens: to which a prompt is cut on the left; its special tokens stay. None cuts
        nothing.
      key: of the draws, unless the temperature is 0.
      chunk: tokens between two looks for stop strings.
      view: see `jaxlm.core.views`.

    Returns:
      For each prompt its samples.

    Raises:
      UserError: no tokenizer, a prompt without tokens or longer than the model's positions, an
        empty stop string, no key, a model that does not generate or whose scores are not finite.
    """
    _check(prompts, stop, chunk)
    if not prompts:
        return []
    ids = [_cut(lm.tokenizer, row, max_prompt_tokens) for row in _tokenise(lm, prompts)]
    generator, state, rows = _start(
        lm, ids, max_new_tokens, sampling, stop, num_samples=num_samples, key=key, view=view
    )
    ended: dict[int, Completion] = {}
    params = decoding_params(lm.params)
    while True:
        found = _read(state)
        for i in range(len(rows) * num_samples):
            completion = ended.get(i) or rows[i // num_samples].end(found, i)
            if completion is not None:
                ended[i] = completion
        if len(ended) == len(rows) * num_samples:
            break
        done = np.isin(np.arange(len(rows) * num_samples), list(ended))
        state = dataclasses.replace(state, done=state.done | done)
        count = chunk if stop else max_new_tokens
        state = generator.advance(params, state, count, view=view)
    samples = [ended[i] for i in range(len(ended))]
    return [samples[i : i + num_samples] for i in range(0, len(samples), num_samples)]


def stream_text(
    lm: LanguageModel,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    key: Array | None = None,
    chunk: int = 1,
    view: Any = None,
) -> Iterator[str]:
    """Continues one prompt and gives the text in pieces; arguments as in `generate_text`.

    A piece ends neither within a character nor within what may become a stop string. Joined, the
    pieces are the text of `generate_text`. Mistakes are raised by the call, before the first piece.
    """
    _check([prompt], stop, chunk)
    generator, state, (row,) = _start(
        lm,
        _tokenise(lm, [prompt]),
        max_new_tokens,
        sampling,
        stop,
        num_samples=1,
        key=key,
        view=view,
    )

    def pieces(state: State) -> Iterator[str]:
        shown, params = 0, decoding_params(lm.params)
        while True:
            found = _read(state)
            completion = row.end(found, 0)
            text = row.settled(found) if completion is None else completion.text
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
            if completion is not None:
                return
            state = generator.advance(params, state, chunk, view=view)

    return pieces(state)


@dataclasses.dataclass(frozen=True)
class _Row:
    """What turns the tokens after one prompt into text."""

    tokenizer: Any
    prompt: list[int]
    stop: Sequence[str]
    stop_ids: Sequence[int]

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens add to the prompt's text; alone, SentencePiece would drop a first space."""
        return self._decode([*self.prompt, *tokens])[len(self._decode(self.prompt)) :]

    def end(self, found: Any, i: int) -> Completion | None:
        """The completion in row i of the tokens found, or None where it goes on."""
        tokens = found.tokens[i, : found.lengths[i]].tolist()
        ended = tokens[-1] in self.stop_ids
        text = self.text(tokens[:-1] if ended else tokens)
        count = len(tokens)
        finish: Finish = "stop" if ended else "length"
        if (cut := self._cut(text)) is not None:
            numbers = range(1, count + 1)
            first = bisect.bisect_left(
                numbers, True, key=lambda n: self._cut(self.text(tokens[:n])) is not None
            )
            text, count, finish = text[:cut], numbers[first], "stop"
        elif not ended and count < found.tokens.shape[1]:
            return None
        return Completion(text, found.tokens[i, :count], found.log_probs[i, :count], finish)

    def settled(self, found: Any) -> str:
        """The text of the first row less a part of a character or of a stop string at its end."""
        text = self.text(found.tokens[0, : found.lengths[0]].tolist()).rstrip("\ufffd")
        starts = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        return text[: len(text) - held]

    def _cut(self, text: str) -> int | None:
        """Where the stop string begins that is complete first, the longest of several."""
        places = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop]
        return min((place for place in places if place[1] >= 0), default=(0, None))[1]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def _read(state: State) -> Generated:
    """The tokens so far; where scores are NaN they would all be token 0.

    Raises:
      UserError: a log-probability is not finite.
    """
    found = jax.tree.map(to_host, state.found)
    if not np.isfinite(found.log_probs).all():
        raise UserError(
            "model: its scores are not finite (got nan). Check that its weights are finite and not "
            "too large."
        )
    return found


def _check(prompts: Sequence[str], stop: Sequence[str], chunk: int) -> None:
    for name, value in (("prompts", prompts), ("stop", stop)):
        if isinstance(value, str):
            raise UserError(f"{name}: is one text (got {show(value)}). Give a list of texts.")
    if "" in stop:
        raise UserError("stop: has an empty text. Leave it out.")
    whole(SimpleNamespace(chunk=chunk), "chunk")


def _start(
    lm: LanguageModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    **options: Any,
) -> tuple[Generator, State, list[_Row]]:
    """Reads the prompts, padded on the left."""
    config = lm.config
    rows = [_Row(lm.tokenizer, ids, stop, config.stops) for ids in prompts]
    length = -(-max(len(row.prompt) for row in rows) // _MULTIPLE) * _MULTIPLE
    ids, mask = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, length - len(row.prompt) :] = row.prompt
        mask[i, length - len(row.prompt) :] = 1
    generator = Generator(config, sampling, config.stops)
    state = generator.start(lm.params, ids, mask, max_new_tokens=max_new_tokens, **options)
    return generator, state, rows


def _cut(tokenizer: Any, ids: list[int], most: int | None) -> list[int]:
    """At most so many tokens, the special ones at the beginning and the last of the others."""
    excess = 0 if most is None else len(ids) - most
    if excess <= 0:
        return ids
    special = set(tokenizer.all_special_ids)
    kept = next((i for i, token in enumerate(ids) if token not in special), 0)
    return ids[:kept] + ids[kept + excess :]


def _tokenise(lm: LanguageModel, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids without those that the tokenizer puts behind every text."""
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise UserError(
            "model: has no tokenizer, which text needs. Put its files into the model's folder, or "
            "give token ids to lm.generate."
        )
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    behind = tokenizer("a")["input_ids"][::-1].index(alone[-1])
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
        rows.append(ids[: len(ids) - behind])
        if not rows[-1]:
            raise UserError(
                f"prompt: has no token, and the tokenizer puts none before it (got {prompt!r}). "
                "Give text."
            )
    return rows

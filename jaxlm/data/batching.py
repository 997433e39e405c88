"""Batches of an encoded task: few shapes, and every training batch a function of seed and step."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int32

from jaxlm.core.errors import UserError
from jaxlm.data.arrays import (
    Batch,
    Form,
    collate,
    collate_completions,
    collate_prompts,
)
from jaxlm.data.encoding import Encoded

Split = Literal["train", "validation", "test"]
Objective = Literal["classification", "completion", "generation"]


@dataclass(frozen=True, eq=False)
class EncodedTask:
    """The tokens of a task's splits, and their batches.

    In the form "label_words" one row an example is read, and the label words are compared by their
    logits at one position; "continuations" reads the prompt once and each option after it;
    "options" reads a row for each option. The first that every example allows is used.

    A batch is a dict of arrays, padded on the right (B examples, C options, T one of `buckets`,
    K the most tokens scored in any option of the task). Labels and weights are in all of them:

    ============== ======= =========== ========= ==================================
    key            dtype   label_words options   meaning
    ============== ======= =========== ========= ==================================
    input_ids      int32   [B, T]      [B, C, T] tokens
    attention_mask int32   [B, T]      [B, C, T] 1 for tokens, 0 for padding
    token_type_ids int32   [B, T]      [B, C, T] segments, if the tokenizer has them
    positions      int32   [B]         [B, C, K] place whose logits predict a target
    targets        int32               [B, C, K] tokens scored
    target_mask    float32             [B, C, K] 1 for targets, 0 for padding
    labels         int32   [B]         [B]       class
    weights        float32 [B]         [B]       1 for examples, 0 for filling rows
    ============== ======= =========== ========= ==================================

    ============== ======= ============= ==========================================
    key            dtype   continuations meaning
    ============== ======= ============= ==========================================
    prompt_ids     int32   [B, T]        tokens
    prompt_mask    int32   [B, T]        1 for tokens, 0 for padding
    option_ids     int32   [B, C, K]     tokens of the options, all of them scored
    option_mask    float32 [B, C, K]     1 for tokens; an option without one is none
    ============== ======= ============= ==========================================

    Where examples differ in the number of options or its tokens, C and K are those of the batch,
    rounded up to a multiple of 8. With the objective "completion" training batches hold the prompt
    with the right option alone, as `jaxlm.train.objective.lm_objective` takes them; with
    "generation" prompts alone and the places of their examples, for
    `jaxlm.train.rewards.generation_objective`.

    Attributes:
        labels: the label words; none where every example has its own options.
        token_ids: int32 [C], the label words' tokens, or a classifier's outputs; None in the other
            forms.
        pad_id: token of the padding.
        vocab_size: tokens of the model; a tokenizer that makes others is refused.
        buckets: lengths that batches are padded to, increasing.
        train: encoded examples.
        validation: encoded examples.
        test: encoded examples.
        objective: what training batches are for.
    """

    labels: tuple[str, ...]
    token_ids: Int32[np.ndarray, "C"] | None
    pad_id: int
    buckets: tuple[int, ...]
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]
    test: tuple[Encoded, ...]
    objective: Objective = "classification"

    @functools.cached_property
    def form(self) -> Form:
        if self.token_ids is not None:
            return "label_words"
        return "options" if all(each.positions for each in self._examples) else "continuations"

    @property
    def _examples(self) -> tuple[Encoded, ...]:
        return self.train + self.validation + self.test

    @functools.cached_property
    def num_options(self) -> int:
        """C, the most options of any example."""
        if self.token_ids is not None:
            return len(self.token_ids)
        return max(len(each.targets) for each in self._examples)

    @functools.cached_property
    def num_targets(self) -> int:
        """K, the most tokens scored in any option."""
        return max(len(row) for each in self._examples for row in each.targets or each.positions)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the tokens of each split that is there, and of how they are scored."""
        whole = (self.form, None if self.token_ids is None else self.token_ids.tolist())
        splits = {name: getattr(self, name) for name in ("train", "validation", "test")}
        return {
            name: hashlib.sha256(repr((whole, examples)).encode()).hexdigest()
            for name, examples in splits.items()
            if examples
        }

    def batch(self, step: int, *, batch_size: int, seed: int) -> Batch:
        """The training batch of a step, a pure function of (seed, step).

        Place p = step * batch_size + i of the stream of examples is place p mod N of a permutation
        keyed by (seed, p div N): every epoch has each example once, a batch may hold the end of one
        epoch and the start of the next, and one larger than the data repeats examples.

        Raises:
            UserError: there are no training examples.
        """
        return self._collate_train(self._stream(step * batch_size, batch_size, seed))

    def batches(self, step: int, count: int, *, batch_size: int, seed: int) -> Batch:
        """The batches of `count` steps from `step` on, stacked on a new first axis.

        All have one length: the bucket of the longest row among them.
        """
        streams = self.streams(step, count, batch_size=batch_size, seeds=(seed,))
        return {key: value[:, 0] for key, value in streams.items()}

    def streams(self, step: int, count: int, *, batch_size: int, seeds: Sequence[int]) -> Batch:
        """The batches of `count` steps under each of several seeds, leaves [count, seeds, B, ...].

        All have one length, as in `batches`.
        """
        sizes = count, batch_size
        each = [self._stream(step * batch_size, count * batch_size, seed) for seed in seeds]
        places = np.stack([np.reshape(stream, sizes) for stream in each], axis=1)
        collated = self._collate_train(places.reshape(-1).tolist())
        return {
            key: value.reshape(*places.shape, *value.shape[1:]) for key, value in collated.items()
        }

    def eval_batches(self, split: Split, *, batch_size: int) -> Iterator[Batch]:
        """Batches of every example of a split once, longest first.

        Each has a key "index" more, int32 [B]: the place of the example in the split, -1 in the
        rows of weight 0 that fill the last batch.
        """
        examples: tuple[Encoded, ...] = getattr(self, split)
        lengths = [max(map(len, each.input_ids)) for each in examples]
        order = np.argsort(-np.asarray(lengths, int), kind="stable")
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            index = np.full(batch_size, -1, np.int32)
            index[: len(places)] = places
            batch = self._collate([examples[places[0] if i < 0 else i] for i in index])
            batch["weights"] = (index >= 0).astype(np.float32)
            yield {**batch, "index": index}

    def _stream(self, start: int, count: int, seed: int) -> list[int]:
        size = len(self.train)
        if not size:
            raise UserError("task.train: there are no training examples. Give some.")
        places = range(start, start + count)
        return [int(_permutation(seed, p // size, size)[p % size]) for p in places]

    def _collate(self, examples: Sequence[Encoded]) -> Batch:
        return collate(
            examples,
            form=self.form,
            buckets=self.buckets,
            num_targets=self.num_targets,
            pad_id=self.pad_id,
            num_options=1 if self.form == "label_words" else self.num_options,
        )

    def _collate_train(self, places: Sequence[int]) -> Batch:
        examples = [self.train[place] for place in places]
        if self.objective == "classification":
            return self._collate(examples)
        if self.objective == "generation":
            prompts = collate_prompts(examples, buckets=self.buckets, pad_id=self.pad_id)
            return {**prompts, "index": np.asarray(places, np.int32)}
        return collate_completions(
            examples,
            words=None if self.token_ids is None else self.token_ids.tolist(),
            buckets=self.buckets,
            num_targets=self.num_targets,
            pad_id=self.pad_id,
        )


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)

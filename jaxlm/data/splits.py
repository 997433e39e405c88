"""Splits of a data form: what a run trains on, holds out and tests on, drawn by a seed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.data.rows import EncodedRows, TokenRow, check_vocabulary, tokenizer_of
from jaxlm.data.sources import SPLITS, Record, read_rows

HOLD_OUT = "hold_out"
"""Value of `validation` that holds out a part of the training examples."""


def draw_per_class(
    labels: Sequence[int], k: int, *, seed: int, names: Sequence[str], skip: int = 0
) -> list[int]:
    """Indices of k examples of every class.

    Each class is permuted by a PCG64 generator keyed by (seed, class), and the places
    `skip, ..., skip + k - 1` of the permutation are taken. So a draw with `skip=k` holds k more of
    each class, none of them in the draw with `skip=0`: a held-out set.

    Args:
        labels: class of each example.
        k: examples per class.
        seed: a whole number, 0 or more.
        names: the label words, for the number of classes and for messages.
        skip: places of the permutation to leave out.

    Returns:
        Increasing indices into `labels`, k per class.

    Raises:
        UserError: a class has fewer than `skip + k` examples.

    >>> draw_per_class([0, 1, 0, 1, 0, 1], 1, seed=0, names=["terrible", "great"])
    [4, 5]
    """
    places = np.asarray(labels)
    chosen: list[int] = []
    for label, name in enumerate(names):
        members = np.flatnonzero(places == label)
        if len(members) < skip + k:
            asked = f"{skip} training and {k} held-out examples" if skip else f"{k} examples"
            raise UserError(
                f"task.k: asks for {asked} of every class, but task.train has {len(members)} of "
                f"{name!r}. Lower it or give more examples."
            )
        generator = np.random.Generator(np.random.PCG64([seed, label]))
        chosen += generator.permutation(members)[skip : skip + k].tolist()
    return sorted(chosen)


def draw_split(
    count: int,
    num_train: int | None,
    num_validation: int,
    *,
    seed: int,
    section: str = "task",
) -> tuple[list[int], list[int]]:
    """Indices of a training and a held-out set, drawn over all classes.

    Of a permutation of all places by NumPy's `RandomState(seed)`, the first `num_train +
    num_validation` are taken; the last `num_validation` of these are held out. So where there are
    too few examples, the training set is smaller. These are the draws of MeZO's code.

    Args:
        count: examples that there are.
        num_train: examples to train on; None for all that are not held out.
        num_validation: examples to hold out.
        seed: a whole number from 0 to 2**32 - 1.
        section: of the configuration, for messages.

    Returns:
        (training, held-out), in the order of the permutation.

    Raises:
        UserError: nothing is left to train on.

    >>> draw_split(8, 3, 2, seed=0)
    ([6, 2, 1], [7, 3])
    """
    places = np.random.RandomState(seed).permutation(count).tolist()
    taken = places[: None if num_train is None else num_train + num_validation]
    if num_validation >= len(taken):
        raise UserError(
            f"{section}.num_validation: leaves nothing of the {count} examples of {section}.train "
            f"to train on (got {num_validation}). Lower it or give more examples."
        )
    cut = len(taken) - num_validation
    return taken[:cut], taken[cut:]


@dataclass(frozen=True, kw_only=True)
class TextsConfig:
    """What the data forms `messages` and `text` have in common.

    Attributes:
        train: file or data set with the training examples (`read_rows` says which); None for none.
        validation: the same, or "hold_out" for `num_validation` of what training leaves; None for
            none.
        test: the same as `train`.
        num_train: examples to train on, drawn; None for all.
        num_validation: examples held out, where `validation` says so.
        num_test: examples to test on, drawn; None for all.
        test_seed: seed of the draw of `num_test` examples, which the run's own seed leaves alone.
        max_length: tokens of a row; None for as many as the model takes.
    """

    train: str | None = None
    validation: str | None = None
    test: str | None = None
    num_train: int | None = None
    num_validation: int | None = None
    num_test: int | None = None
    test_seed: int = 0
    max_length: int | None = None

    key: ClassVar[str] = "data"

    def __post_init__(self) -> None:
        section = f"{self.key}."
        checks.whole(self, "num_train", "num_validation", "num_test", section=section)
        checks.whole(self, "max_length", least=2, section=section)
        checks.seeds(self, "test_seed")
        if (self.validation == HOLD_OUT) != (self.num_validation is not None):
            raise UserError(
                f"{section}num_validation: goes with validation: hold_out (got "
                f"{self.num_validation} and {self.validation}). Give both or none."
            )

    def load(self, *, seed: int, base_dir: str | Path | None = None) -> "Texts":
        """Reads the examples of every split.

        Args:
            seed: of the draw of `num_train` and `num_validation`.
            base_dir: where relative paths start, before the working directory.

        Raises:
            UserError: a source cannot be read, a row is not of this form, or there are too few.
        """
        checks.seeds(SimpleNamespace(seed=seed), "seed")
        if self.train is None and self.test is None:
            raise UserError(
                f"{self.key}: has no data. Give {self.key}.train, {self.key}.test or both."
            )
        base = None if base_dir is None else Path(base_dir)
        splits: dict[str, Sequence[Any]] = {}
        for split in SPLITS:
            source = getattr(self, split)
            given = source is not None and source != HOLD_OUT
            splits[split] = (
                [
                    self.parse(record)
                    for record in read_rows(source, key=split, section=self.key, base_dir=base)
                ]
                if given
                else ()
            )
        held_out = self.num_validation or 0
        if self.num_train is not None or held_out:
            train = splits["train"]
            chosen, rest = draw_split(
                len(train), self.num_train, held_out, seed=seed, section=self.key
            )
            splits["train"] = [train[i] for i in chosen]
            splits["validation"] = [train[i] for i in rest] if held_out else splits["validation"]
        if self.num_test is not None and splits["test"]:
            chosen, _ = draw_split(len(splits["test"]), self.num_test, 0, seed=self.test_seed)
            splits["test"] = [splits["test"][i] for i in chosen]
        return Texts(self, **{split: tuple(examples) for split, examples in splits.items()})

    def parse(self, record: Record) -> Any:
        """The example in a row of a source; it has an `id` and a `content` of JSON values."""
        raise NotImplementedError

    def tokenize(self, examples: Sequence[Any], tokenizer: Any, limit: int) -> list[TokenRow]:
        """The rows of examples, of at most `limit` tokens."""
        raise NotImplementedError


@dataclass(frozen=True)
class Texts:
    """The examples of a data form; a split that is not there is empty.

    Attributes:
        config: where they came from.
        train, validation, test: conversations or documents.
    """

    config: TextsConfig
    train: tuple[Any, ...]
    validation: tuple[Any, ...]
    test: tuple[Any, ...]

    def repeated(self, split: str = "test") -> int:
        """How many examples of a split are training examples, too."""
        trained = {_digest(example) for example in self.train}
        return sum(_digest(example) in trained for example in getattr(self, split))

    def digests(self) -> dict[str, str]:
        """SHA-256 of the examples of each split that is there: not of where they came from."""
        return {
            split: hashlib.sha256("".join(map(_digest, getattr(self, split))).encode()).hexdigest()
            for split in SPLITS
            if getattr(self, split)
        }

    def encode(self, lm: Any, *, max_length: int | None = None) -> EncodedRows:
        """The tokens of the examples, for a model.

        Args:
            lm: a `jaxlm.models.LanguageModel` with a tokenizer.
            max_length: most tokens of a row; None for as many as the model takes. The smaller of
                it and the configuration's counts.

        Raises:
            UserError: the model is no decoder, its tokenizer does not serve, or no row of a split
                has a token in the loss.
        """
        config, tokenizer = self.config, tokenizer_of(lm)
        if lm.config.kind != "decoder":
            raise UserError(
                f"model: {config.key} needs a decoder (got one of the kind {lm.config.kind}). Give "
                "a decoder."
            )
        limits = (lm.config.max_positions, max_length, config.max_length)
        limit = min(limit for limit in limits if limit is not None)
        splits = {
            split: config.tokenize(getattr(self, split), tokenizer, limit) for split in SPLITS
        }
        tokens = (token for rows in splits.values() for row in rows for token in row.ids)
        check_vocabulary(max(tokens, default=0), lm.config.vocab_size)
        return EncodedRows.pad(splits, pad_id=lm.config.pad_id or 0, limit=limit, key=config.key)


def _digest(example: Any) -> str:
    return hashlib.sha256(json.dumps(example.content).encode()).hexdigest()

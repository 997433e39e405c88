"""The splits of a data form: where they are, and which examples a seed draws."""

import functools
import hashlib
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, cast

import numpy as np

from jaxlm.artifacts.keys import without_none
from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.data.rows import SPLITS, EncodedRows, TokenRow, check_vocabulary, tokenizer_of
from jaxlm.data.sources import Record, absolute, read_rows

Check = Callable[[str, Any], None]

HOLD_OUT = "hold_out"
"""Value of `validation` that holds out a part of the training examples."""


def draw_per_class(
    labels: Sequence[int], k: int, *, seed: int, names: Sequence[str], skip: int = 0
) -> list[int]:
    """Return increasing indices of k examples of every class, `names` being the label words.

    Each class is permuted by a PCG64 generator keyed by (seed, class), and the places
    `skip, ..., skip + k - 1` of the permutation are drawn. So a draw with `skip=k` is a held-out
    set: k more examples of each class, none of which is in the draw with `skip=0`.

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
                f"task.k: asks for {asked} of every class (got {len(members)} of {name!r} in "
                "task.train). Lower it or give more examples."
            )
        # Keyed by the class, so that the draw of one class does not depend on the other classes.
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
    """Draw a training set and a held-out set over all classes.

    NumPy's `RandomState(seed)` permutes all places. The first `num_train + num_validation` are
    taken, and the last `num_validation` of these are held out; if there are too few examples, the
    training set is smaller. These are the draws of MeZO's code. `num_train=None` takes all.

    >>> draw_split(8, 3, 2, seed=0)
    ([6, 2, 1], [7, 3])
    """
    # The legacy generator, because MeZO's code uses it.
    places = np.random.RandomState(seed).permutation(count).tolist()
    taken = places[: None if num_train is None else num_train + num_validation]
    if num_validation >= len(taken):
        raise UserError(
            f"{section}.num_validation: leaves nothing of the {count} examples of {section}.train "
            f"to train on (got {num_validation}). Lower it or give more examples."
        )
    cut = len(taken) - num_validation
    return taken[:cut], taken[cut:]


class Splits:
    """Splits of examples with a `text`, all that a model reads, and a `content`, all but the id."""

    train: tuple[Any, ...]

    def repeated(self, split: str = "test") -> int:
        """Count the examples of a split whose text is also that of a training example.

        Whatever their labels, a result on them does not show how well a model generalizes.
        """
        trained = {example.text for example in self.train}
        return sum(example.text in trained for example in getattr(self, split))

    def digests(self) -> dict[str, str]:
        """Return SHA-256 of the examples of each non-empty split, whatever their source."""
        digests: dict[str, str] = {}
        for split in SPLITS:
            if examples := getattr(self, split):
                content = "".join(json.dumps(example.content) for example in examples)
                digests[split] = hashlib.sha256(content.encode()).hexdigest()
        return digests


@dataclass(frozen=True, kw_only=True)
class SplitsConfig:
    """Where the examples of a data form are, and which of them are drawn.

    Attributes:
        train: file or data set with the training examples, see `read_rows`; None for none.
        validation: the same; or "hold_out" to hold out examples of `train`: `num_validation` of
            them or, without it, up to `num_train`.
        test: the same as `train`.
        num_train: number of examples to draw for training; None for all.
        num_validation: number of examples to hold out in addition to `num_train`, or to draw from
            the given validation examples; None for all of those.
        num_test: number of examples to draw for testing; None for all.
        test_seed: seed of the draws from given validation and test examples; the run's seed does
            not change them.
        max_length: number of tokens that examples are cut to; None for the limit of the model.
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
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "test_seed": functools.partial(checks.integer, least=0, most=2**32 - 1),
    }
    """Checks of fields whose types do not say all."""

    def __post_init__(self) -> None:
        self.check(vars(self))
        counts = (self.num_train, self.num_validation, getattr(self, "k", None))
        if self.validation == HOLD_OUT and not any(counts):
            raise UserError(
                f"{self.key}.validation: nothing says how many examples to hold out (got "
                f"hold_out). Give {self.key}.num_train or {self.key}.num_validation."
            )

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Check the values of some keys; raise UserError for a wrong type or size."""
        for name, check in _checks(cast(Any, cls)).items():
            if name in values:
                check(f"{cls.key}.{name}", values[name])

    def located(self, base_dir: str | Path | None = None) -> "SplitsConfig":
        """Return the same configuration with absolute paths of the sources that are files here."""
        base = None if base_dir is None else Path(base_dir)
        sources = {split: getattr(self, split) for split in SPLITS}
        places: dict[str, Any] = {
            split: absolute(source, f"{self.key}.{split}", base)
            for split, source in sources.items()
            if source not in (None, HOLD_OUT)
        }
        return replace(self, **places)

    def records(self, base_dir: str | Path | None = None) -> dict[str, list[Record]]:
        """Read the rows of every split."""
        sources = {split: getattr(self, split) for split in SPLITS}
        if sources["validation"] == HOLD_OUT:
            sources["validation"] = None
        if not any(sources.values()):
            raise UserError(
                f"{self.key}: has no data. Give {self.key}.train, {self.key}.test or both."
            )
        base = None if base_dir is None else Path(base_dir)
        return {
            split: read_rows(source, key=split, section=self.key, base_dir=base) if source else []
            for split, source in sources.items()
        }

    def draw(
        self, examples: Mapping[str, Sequence[Any]], *, seed: int
    ) -> tuple[tuple[Any, ...], ...]:
        """Draw the examples of every split, in the order of `SPLITS`, held-out ones included."""
        checks.seeds(SimpleNamespace(seed=seed), "seed")
        drawn = dict(examples)
        train = examples["train"]
        if train or self.validation == HOLD_OUT:
            chosen, rest = self.draw_train(train, seed=seed)
            drawn["train"] = [train[i] for i in chosen]
            if self.validation == HOLD_OUT:
                drawn["validation"] = [train[i] for i in rest]
        for split, count in (("validation", self.num_validation), ("test", self.num_test)):
            if (given := examples[split]) and count is not None:
                chosen, _ = draw_split(len(given), count, 0, seed=self.test_seed)
                drawn[split] = [given[i] for i in chosen]
        return tuple(tuple(drawn[split]) for split in SPLITS)

    def draw_train(self, train: Sequence[Any], *, seed: int) -> tuple[list[int], list[int]]:
        """Draw the places of the examples to train on and of those to hold out."""
        held_out, count = self.validation == HOLD_OUT, 0
        if held_out and self.num_validation is not None:
            count = self.num_validation
        elif held_out and self.num_train is not None:
            count = min(self.num_train, len(train) - self.num_train)
            if count < 1:
                raise UserError(
                    f"{self.key}.num_train: leaves none of the {len(train)} examples of "
                    f"{self.key}.train to hold out (got {self.num_train}). Lower it."
                )
        elif self.num_train is None:
            return list(range(len(train))), []
        return draw_split(len(train), self.num_train, count, seed=seed, section=self.key)


@functools.cache
def _checks(cls: Any) -> dict[str, Check]:
    """Return a check of every field: that of its declared type, or its own."""
    hints = typing.get_type_hints(cls)
    checks_of_types = {field.name: _check_of(hints[field.name]) for field in fields(cls)}
    return checks_of_types | cls.CHECKS


def _check_of(kind: Any) -> Check:
    inner = without_none(kind)
    if typing.get_origin(inner) is Literal:
        choices = (*typing.get_args(inner), *([None] if inner is not kind else []))
        return functools.partial(checks.one_of, choices=choices)
    by_type: dict[Any, Check] = {
        str: checks.text, int: checks.integer, float: checks.real, tuple: checks.texts,
        bool: functools.partial(checks.one_of, choices=(False, True)),
    }  # fmt: skip
    return by_type[typing.get_origin(inner) or inner]


@dataclass(frozen=True, kw_only=True)
class TextsConfig(SplitsConfig):
    """A data form of token rows; a subclass defines `parse` and `tokenize`.

    Attributes:
        packing: join training rows to windows of `max_length` tokens, with attention within each
            row only; `batch_size` then counts windows.
    """

    packing: bool = False

    objective: ClassVar[str] = "completion"
    """Name of the objective of a run that names none."""
    kinds: ClassVar[tuple[str, ...]] = ("decoder",)
    """Kinds of models that can read it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing and self.max_length is None:
            raise UserError(
                f"{self.key}.packing: needs the tokens of a window (got no {self.key}.max_length). "
                "Give that."
            )

    def unread(self, length: int) -> EncodedRows:
        """Return one row of that many tokens, all of them in the loss, in place of the data."""
        row = TokenRow("", (0,) * length, tuple(range(1, length)))
        splits = {"train": [row], "validation": [], "test": [row]}
        return EncodedRows.pad(splits, pad_id=0, limit=length, key=self.key, packing=self.packing)

    def load(self, *, seed: int, base_dir: str | Path | None = None) -> "Texts":
        """Read and draw the examples of every split; relative paths start in `base_dir`."""
        examples = {
            split: [self.parse(record) for record in records]
            for split, records in self.records(base_dir).items()
        }
        return Texts(self, *self.draw(examples, seed=seed))

    def parse(self, record: Record) -> Any:
        """Return the example in a row of a source."""
        raise NotImplementedError

    def resolve(self, texts: "Texts", model: Any) -> tuple["Texts", tuple[str, ...]]:
        """Return the texts as `tokenize` takes them for a model, and the names of their classes."""
        del model
        return texts, ()

    def tokenize(self, examples: Sequence[Any], tokenizer: Any, limit: int) -> list[TokenRow]:
        """Return the token rows of examples, of at most `limit` tokens."""
        raise NotImplementedError


@dataclass(frozen=True)
class Texts(Splits):
    """The conversations or documents of each split; a split that does not exist is empty."""

    config: TextsConfig
    train: tuple[Any, ...]
    validation: tuple[Any, ...]
    test: tuple[Any, ...]

    def encode(self, lm: Any, *, max_length: int | None = None) -> EncodedRows:
        """Tokenize the examples for a model.

        Args:
            lm: a `jaxlm.models.LanguageModel` with a tokenizer.
            max_length: another limit on the tokens of a row; the smallest of all limits applies.

        Raises:
            UserError: the model is not a decoder, its tokenizer does not fit, or no row of a split
                has a token in the loss.
        """
        config, tokenizer = self.config, tokenizer_of(lm)
        if lm.config.kind not in config.kinds:
            raise UserError(
                f"model: {config.key} needs a decoder (got one of the kind {lm.config.kind}). Give "
                "a decoder."
            )
        limits = (lm.config.max_positions, max_length, config.max_length)
        limit = min(limit for limit in limits if limit is not None)
        texts, labels = config.resolve(self, lm.config)
        splits: dict[str, list[TokenRow]] = {
            split: config.tokenize(getattr(texts, split), tokenizer, limit) for split in SPLITS
        }
        tokens = (token for rows in splits.values() for row in rows for token in row.ids)
        check_vocabulary(max(tokens, default=0), lm.config.vocab_size)
        return EncodedRows.pad(
            splits,
            pad_id=lm.config.pad_id or 0,
            limit=limit,
            key=config.key,
            packing=config.packing,
            labels=labels,
        )

"""Rows to choose from: prompts with answers or conversations, from several sources."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float, Int

from jaxlm.core.checks import whole
from jaxlm.core.errors import UserError
from jaxlm.data import (
    Example,
    PaddedRows,
    Task,
    TaskConfig,
    TokenRow,
    load_task,
    prepare_for,
    prompted,
    task_config,
)
from jaxlm.data.messages import MessagesConfig, MessageTemplate
from jaxlm.data.rows import tokenizer_of
from jaxlm.typing import Params

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows of one kind come from: a task's training examples, or conversations.

    Attributes:
        task: prompts with their right options; a task whose `train` is null has no rows.
        messages: file of conversations, see `jaxlm.data.MessagesConfig`.
        rows: number of rows to draw; None for all.
        skip: rows of the draw to skip, for another source of the same file.
        labels: "own", or "shuffled" over the rows of this source; a row that gets another label
            than its own is noise.
    """

    task: TaskConfig | None = field(default=None, metadata={"make": task_config})
    messages: str | None = None
    rows: int | None = None
    skip: int = 0
    labels: Literal["own", "shuffled"] = "own"

    def __post_init__(self):
        if (self.task is None) == (self.messages is None):
            raise UserError("task: a source has a task or messages. Give one of them.")
        whole(self, "rows")
        whole(self, "skip", least=0)
        if self.labels == "shuffled" and (self.task is None or self.task.has_per_example_options):
            raise UserError("labels: there are no label words (got shuffled). Give own.")

    @property
    def given(self) -> bool:
        """Whether the source has rows."""
        return self.task is None or self.task.train is not None


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the chosen rows should improve: a task, or conversations.

    Attributes:
        task: its validation examples are the target, and accuracy is measured on its test examples.
        messages: file of conversations that are the target; `subtask` groups them.
        test: with `messages`, file of conversations whose mean loss is measured; None for those of
            the target.
        rows: number of target examples to draw; None for all.
    """

    task: TaskConfig | None = field(default=None, metadata={"make": task_config})
    messages: str | None = None
    test: str | None = None
    rows: int | None = 100

    def __post_init__(self):
        if (self.task is None) == (self.messages is None):
            raise UserError("task: the target has a task or messages. Give one of them.")
        whole(self, "rows")
        if self.test is not None and self.task is not None:
            raise UserError(
                f"test: goes with target.messages (got {self.test}). Give target.task.test."
            )


@dataclass(frozen=True, eq=False)
class PoolRow(TokenRow):
    """A token row, and what the study writes about it.

    Attributes:
        source: name of the source.
        text: {"messages"} or {"prompt", "completion"}.
        noise: whether its label is not its own.
    """

    source: str = ""
    text: dict[str, Any] = field(default_factory=dict)
    noise: bool = False


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows with at least one answer token, and the ids of rows whose whole answer was cut."""

    rows: tuple[PoolRow, ...]
    cut: tuple[str, ...] = ()

    def __post_init__(self):
        for name, count in Counter(row.id for row in self.rows).items():
            if count > 1:
                raise UserError(
                    f"id: {count} rows have the same (got {name!r}). Give each its own."
                )

    @property
    def subtasks(self) -> Int[np.ndarray, " M"] | None:
        """The group of each row, numbered in the order of names; None if there is one group."""
        names = sorted({row.subtask for row in self.rows})
        if len(names) < 2:
            return None
        return np.array([names.index(row.subtask) for row in self.rows])


def padded(lm: Any, rows: Sequence[PoolRow]) -> PaddedRows:
    """Return rows in the form that `row_losses` and training read."""
    return PaddedRows(rows, lm.config.pad_id or 0, "targets")


def row_values(
    function: Callable[..., Any], params: Params, lm: Any, rows: Sequence[PoolRow], size: int
) -> Float[np.ndarray, "N ..."]:
    """Return `function(params, batch)` of every row, in their order, in batches of one size."""
    batches, found = padded(lm, rows), dict[int, np.ndarray]()
    for places in batches.blocks(size):
        filled = places + places[:1] * (size - len(places))
        values = np.asarray(function(params, batches.batch(filled)))
        found.update(zip(places, values, strict=False))
    return np.stack([found[place] for place in range(len(rows))])


@dataclass(frozen=True)
class Reader:
    """Reads rows for a model.

    Attributes:
        lm: the model that tokenizes the rows; its parameters are not read.
        max_length: most tokens of a row.
        template: template of conversations.
        seed: seed of the draws and of shuffled labels.
        base_dir: folder where relative paths start, before the working directory.
    """

    lm: Any
    max_length: int
    template: MessageTemplate = "tulu"
    seed: int = 0
    base_dir: Path | None = None

    def source(self, name: str, source: Source) -> Rows:
        """Read the rows of a source."""
        with _placed(f"sources.{name}"):
            if source.messages is not None:
                return self.conversations(name, source)
            assert source.task is not None
            task = self.task(dataclasses.replace(source.task, validation=None, test=None))
            chosen = draw(task.train, source.rows, source.skip, self.seed)
            labels = [example.label for example in chosen]
            if source.labels == "shuffled":
                generator = np.random.Generator(np.random.PCG64([self.seed, 1]))
                labels = generator.permutation(labels).tolist()
            return self._prompts(name, task, chosen, labels)

    def target(self, target: Target) -> Rows:
        """Read the examples that are the target."""
        if target.messages is not None:
            with _placed("target"):
                return self.conversations(
                    "target", Source(messages=target.messages, rows=target.rows)
                )
        assert target.task is not None
        task = self.task(target.task)
        for split in ("validation", "test"):
            if not getattr(task, split):
                raise UserError(
                    f"target.task.{split}: there are no such examples (got none). Name a file of "
                    "them."
                )
        with _placed("target"):
            chosen = draw(task.validation, target.rows, 0, self.seed)
            return self._prompts("target", task, chosen, [each.label for each in chosen])

    def task(self, config: TaskConfig) -> Task:
        """Load a task."""
        return load_task(config, seed=self.seed, base_dir=self.base_dir)

    def conversations(self, name: str, source: Source) -> Rows:
        """Read the rows of a file of conversations."""
        config = MessagesConfig(train=source.messages, template=self.template)
        found = config.load(seed=self.seed, base_dir=self.base_dir).train
        chosen = draw(found, source.rows, source.skip, self.seed)
        rows, cut = [], []
        encoded = config.tokenize(chosen, tokenizer_of(self.lm), self.max_length)
        for conversation, row in zip(chosen, encoded, strict=True):
            place = f"{name}:{row.id}"
            if row.loss_positions:
                text = {"messages": [turn._asdict() for turn in conversation.messages]}
                rows.append(PoolRow(place, row.ids, row.loss_positions, row.subtask, name, text))
            else:
                cut.append(place)
        return Rows(tuple(rows), tuple(cut))

    def _prompts(self, name: str, task: Task, chosen: list[Example], labels: list[int]) -> Rows:
        if self.lm.config.kind != "decoder":
            raise UserError(
                f"model: rows are read by a decoder (got one of the kind {self.lm.config.kind}). "
                "Give a decoder."
            )
        pairs = zip(chosen, labels, strict=True)
        examples = [dataclasses.replace(each, label=label) for each, label in pairs]
        alone = dataclasses.replace(task, train=tuple(examples), validation=(), test=())
        encoded = prepare_for(self.lm, alone, max_length=self.max_length)
        names = [f"{name}:{example.id}" for example in examples]
        rows = []
        for own, example, row in zip(chosen, examples, encoded.rows("train", names), strict=True):
            shown = prompted(task, example)
            text = {"prompt": shown.prompt, "completion": shown.options[shown.gold[0]]}
            noise = own.label != example.label
            rows.append(PoolRow(row.id, row.ids, row.loss_positions, "", name, text, noise))
        return Rows(tuple(rows))


@contextlib.contextmanager
def _placed(place: str) -> Iterator[None]:
    """Give errors in a source or the target their full key."""
    try:
        yield
    except UserError as error:
        message = str(error).removeprefix("messages.train: ")
        joint = "." if message.startswith("rows:") else ": "
        raise UserError(f"{place}{joint}{message}") from None


def draw(examples: Sequence[T], rows: int | None, skip: int, seed: int) -> list[T]:
    """Return the examples `skip, ..., skip + rows - 1` of a permutation by the seed, in order.

    >>> sorted(draw(range(5), 2, 0, 7) + draw(range(5), 3, 2, 7))
    [0, 1, 2, 3, 4]
    """
    count = len(examples)
    stop = count if rows is None else skip + rows
    if stop > count or skip >= count:
        raise UserError(
            f"rows: {skip} + {'some' if rows is None else rows} are asked for (got {count}). Lower "
            "rows or skip."
        )
    order = np.random.Generator(np.random.PCG64([seed, 0])).permutation(count)
    return [examples[place] for place in sorted(order[skip:stop].tolist())]

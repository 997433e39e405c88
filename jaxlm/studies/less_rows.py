"""Rows to choose from: prompts with answers or conversations, from several sources."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from jaxlm.core.checks import whole
from jaxlm.core.errors import UserError
from jaxlm.data import (
    Example,
    TaskConfig,
    TokenRow,
    load_task,
    prepare_for,
    prompted,
    task_config,
)
from jaxlm.data.messages import MessagesConfig, MessageTemplate
from jaxlm.data.rows import tokenizer_of


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
    """Rows with at least one answer token, and the ids of rows whose whole answer was cut.

    Attributes:
        rows: the rows.
        cut: ids of rows whose whole answer was cut.
    """

    rows: tuple[PoolRow, ...]
    cut: tuple[str, ...] = ()

    @property
    def subtasks(self) -> Int[np.ndarray, " M"] | None:
        """The group of each row, numbered in the order of names; None if there is one group."""
        names = sorted({row.subtask for row in self.rows})
        if len(names) < 2:
            return None
        return np.array([names.index(row.subtask) for row in self.rows])


def read_source(
    name: str,
    source: Source,
    lm: Any,
    *,
    template: MessageTemplate,
    max_length: int,
    seed: int,
    base_dir: Path | None = None,
) -> Rows:
    """Read the rows of a source.

    Args:
        name: name of the source.
        source: where its rows are.
        lm: the model that reads the rows.
        template: template of conversations.
        max_length: most tokens of a row.
        seed: seed of the draw and of shuffled labels.
        base_dir: folder where relative paths start, before the working directory.

    Raises:
        UserError: as `load_task` and `MessagesConfig`; or there are too few rows.
    """
    try:
        if source.messages is not None:
            return _conversations(name, source, lm, template, max_length, seed, base_dir)
        assert source.task is not None
        alone = dataclasses.replace(source.task, validation=None, test=None)
        task = load_task(alone, seed=seed, base_dir=base_dir)
        places = draw(len(task.train), source.rows, source.skip, seed)
        chosen = [task.train[place] for place in places]
        labels = [example.label for example in chosen]
        if source.labels == "shuffled":
            generator = np.random.Generator(np.random.PCG64([seed, 1]))
            labels = generator.permutation(labels).tolist()
        noise = [each.label != label for each, label in zip(chosen, labels, strict=True)]
        examples = [
            dataclasses.replace(each, label=label)
            for each, label in zip(chosen, labels, strict=True)
        ]
        return _task_rows(name, task, examples, noise, lm, max_length)
    except UserError as error:
        raise _placed(f"sources.{name}", error) from None


def _placed(place: str, error: UserError) -> UserError:
    """Return an error in a source or the target with its full key."""
    message = str(error).removeprefix("messages.train: ")
    return UserError(f"{place}{'.' if message.startswith('rows:') else ': '}{message}")


def read_target(
    target: Target,
    lm: Any,
    *,
    template: MessageTemplate,
    max_length: int,
    seed: int,
    base_dir: Path | None = None,
) -> Rows:
    """Read the examples that are the target; arguments as of `read_source`."""
    if target.messages is not None:
        source = Source(messages=target.messages, rows=target.rows)
        try:
            return _conversations("target", source, lm, template, max_length, seed, base_dir)
        except UserError as error:
            raise _placed("target", error) from None
    assert target.task is not None
    task = load_task(target.task, seed=seed, base_dir=base_dir)
    for split in ("validation", "test"):
        if not getattr(task, split):
            raise UserError(
                f"target.task.{split}: there are no such examples (got none). Name a file of them."
            )
    try:
        places = draw(len(task.validation), target.rows, 0, seed)
    except UserError as error:
        raise _placed("target", error) from None
    examples = [task.validation[place] for place in places]
    return _task_rows("target", task, examples, [False] * len(examples), lm, max_length)


def draw(count: int, rows: int | None, skip: int, seed: int) -> list[int]:
    """Return places `skip, ..., skip + rows - 1` of a permutation by the seed, sorted.

    >>> sorted(draw(5, 2, 0, 7) + draw(5, 3, 2, 7))
    [0, 1, 2, 3, 4]
    """
    stop = count if rows is None else skip + rows
    if stop > count or skip >= count:
        raise UserError(
            f"rows: {skip} + {'some' if rows is None else rows} are asked for (got {count}). Lower "
            "rows or skip."
        )
    order = np.random.Generator(np.random.PCG64([seed, 0])).permutation(count)
    return sorted(order[skip:stop].tolist())


def _conversations(
    name: str,
    source: Source,
    lm: Any,
    template: MessageTemplate,
    max_length: int,
    seed: int,
    base_dir: Path | None,
) -> Rows:
    config = MessagesConfig(train=source.messages, template=template)
    found = config.load(seed=seed, base_dir=base_dir).train
    chosen = [found[place] for place in draw(len(found), source.rows, source.skip, seed)]
    rows, cut = [], []
    encoded = config.tokenize(chosen, tokenizer_of(lm), max_length)
    for conversation, row in zip(chosen, encoded, strict=True):
        if not row.loss_positions:
            cut.append(f"{name}:{row.id}")
            continue
        text = {"messages": [turn._asdict() for turn in conversation.messages]}
        rows.append(
            PoolRow(f"{name}:{row.id}", row.ids, row.loss_positions, row.subtask, name, text)
        )
    return _unique(rows, cut)


def _task_rows(
    name: str, task: Any, examples: list[Example], noise: list[bool], lm: Any, max_length: int
) -> Rows:
    if lm.config.kind != "decoder":
        raise UserError(
            f"model: rows are read by a decoder (got one of the kind {lm.config.kind}). Give a "
            "decoder."
        )
    alone = dataclasses.replace(task, train=tuple(examples), validation=(), test=())
    encoded = prepare_for(lm, alone, max_length=max_length)
    names = [f"{name}:{example.id}" for example in examples]
    rows = []
    for example, row, wrong in zip(examples, encoded.rows("train", names), noise, strict=True):
        shown = prompted(task, example)
        text = {"prompt": shown.prompt, "completion": shown.options[shown.gold[0]]}
        rows.append(PoolRow(row.id, row.ids, row.loss_positions, "", name, text, wrong))
    return _unique(rows, [])


def _unique(rows: list[PoolRow], cut: list[str]) -> Rows:
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise UserError(f"id: two rows have the same (got {row.id!r}). Give every row its own.")
        seen.add(row.id)
    return Rows(tuple(rows), tuple(cut))

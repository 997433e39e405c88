"""Rows to forget beside rows to keep: the data of unlearning."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.messages import Conversation, Message, MessagesConfig
from jaxlm.data.rows import Batch, EncodedRows, PaddedRows, TokenRow, digest, stack_steps
from jaxlm.data.sources import Record, absolute, read_rows
from jaxlm.data.splits import Texts, draw_split
from jaxlm.data.text import Document, encode_documents

STREAM = 2**64
"""Added to the seed of retained rows, so that their order is not that of the rows to forget."""


@dataclass(frozen=True, kw_only=True)
class ForgetConfig(MessagesConfig):
    """The section `forget` of a configuration: what a model is to forget, and what it is to keep.

    `train` are the rows to forget: documents with the field `text`, conversations as in
    `MessagesConfig`, or rows with `question` and `answer`. Of conversations the assistant's turns
    are in the loss. `validation` and `test` are other rows, which show what the model can do;
    without the former a run measures the retained ones, or without these the rows to forget.

    Attributes:
        retain: rows to keep, see `train`; a step reads as many of them as it forgets. None for
            none.
        num_retain: number of these to draw; None for all.
        refusals: answers that losses with an alternative put in place of those to forget, one
            after the other.
    """

    retain: str | None = None
    num_retain: int | None = None
    refusals: tuple[str, ...] = ("I don't know.",)

    key: ClassVar[str] = "forget"
    objective: ClassVar[str] = "unlearn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing:
            raise UserError("forget.packing: rows are forgotten one by one (got true). Drop it.")
        if not self.refusals:
            raise UserError("forget.refusals: is empty (got nothing). Give an answer.")

    def located(self, base_dir: str | Path | None = None) -> "ForgetConfig":
        """Return the same configuration with absolute paths of the sources that are files here."""
        found = super().located(base_dir)
        assert isinstance(found, ForgetConfig)
        if self.retain is None:
            return found
        base = None if base_dir is None else Path(base_dir)
        return dataclasses.replace(found, retain=absolute(self.retain, "forget.retain", base))

    def load(self, *, seed: int, base_dir: str | Path | None = None) -> "Forgetting":
        """Read and draw the rows of every split, and those to keep.

        Raises:
            UserError: a row to forget is among those to keep.
        """
        loaded = super().load(seed=seed, base_dir=base_dir)
        retain: tuple[Any, ...] = ()
        if self.retain is not None:
            base = None if base_dir is None else Path(base_dir)
            records = read_rows(self.retain, key="retain", section=self.key, base_dir=base)
            rows = [self.parse(record) for record in records]
            chosen, _ = draw_split(len(rows), self.num_retain, 0, seed=seed, section=self.key)
            retain = tuple(rows[i] for i in (chosen if self.num_retain else range(len(rows))))
        gone = {example.text for example in loaded.train}
        if both := [example.id for example in retain if example.text in gone]:
            raise UserError(
                f"forget.retain: {len(both)} of its rows are to be forgotten, too (got {both[0]} "
                "first). Leave them out."
            )
        return Forgetting(self, loaded.train, loaded.validation, loaded.test, retain)

    def parse(self, record: Record) -> Any:
        """Return the document or the conversation in a row."""
        values = record.values
        if isinstance(values.get("text"), str):
            return Document(values["text"], f"{record.source}:{record.number}")
        if {"question", "answer"} <= values.keys():
            turns = {"prompt": values["question"], "completion": values["answer"]}
            record = dataclasses.replace(record, values=turns)
        return super().parse(record)

    def tokenize(self, examples: Sequence[Any], tokenizer: Any, limit: int) -> list[TokenRow]:
        """Return the token rows of documents, or of conversations."""
        if not any(isinstance(example, Document) for example in examples):
            return super().tokenize(examples, tokenizer, limit)
        others = [x.id for x in examples if not isinstance(x, Document)]
        if others:
            raise UserError(
                f"{self.key}: has documents and conversations (got {others[0]}, a conversation). "
                "Give rows of one kind."
            )
        return encode_documents(examples, tokenizer, length=limit)

    def unread(self, length: int) -> EncodedRows:
        """Return one row of that many tokens in place of each source."""
        rows = super().unread(length)
        kept = None if self.retain is None else rows.train
        fields = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
        return ForgetRows(**fields, retain=kept, alternative=rows.train)


@dataclass(frozen=True)
class Forgetting(Texts):
    """The rows of each split: `train` are those to forget, `retain` those to keep."""

    retain: tuple[Any, ...] = ()

    def digests(self) -> dict[str, str]:
        """Return SHA-256 of the rows of each split and of those to keep."""
        kept = dataclasses.replace(self, train=self.retain, validation=(), test=())
        found = super().digests()
        return found | ({"retain": Texts.digests(kept)["train"]} if self.retain else {})

    def encode(self, lm: Any, *, max_length: int | None = None) -> "ForgetRows":
        """Tokenize the rows for a model, see `Texts.encode`."""
        rows = super().encode(lm, max_length=max_length)
        fields = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}

        def others(examples: tuple[Any, ...]) -> PaddedRows | None:
            if not examples:
                return None
            given = Texts(self.config, examples, (), ())
            return given.encode(lm, max_length=max_length).train

        documents = self.train and isinstance(self.train[0], Document)
        refused = () if documents else self._refused(rows.dropped)
        return ForgetRows(**fields, retain=others(self.retain), alternative=others(refused))

    def _refused(self, dropped: Mapping[str, Sequence[str]]) -> tuple[Conversation, ...]:
        """Return the rows to forget, without those left out, with refusals as the last turns."""
        assert isinstance(self.config, ForgetConfig)
        refusals, gone = self.config.refusals, set(dropped.get("train", ()))
        kept = [example for example in self.train if example.id not in gone]
        return tuple(
            dataclasses.replace(
                example,
                messages=(
                    *example.messages[:-1],
                    Message("assistant", refusals[i % len(refusals)]),
                ),
            )
            for i, example in enumerate(kept)
        )


@dataclass(frozen=True, eq=False)
class ForgetRows(EncodedRows):
    """The token rows to forget, `train`, and others; batches have the form "targets".

    A training batch also has the keys of a batch of `retain`, if that has the form "targets", with
    the prefix `retain_`; those of `alternative`, with that prefix; and for each of the three
    `per_target` [B], see `jaxlm.unlearning.TokenScores`.

    Attributes:
        retain: rows to keep; None for none.
        alternative: the rows to forget with a refusal for an answer; None for documents.
    """

    retain: PaddedRows | None = None
    alternative: PaddedRows | None = None

    def streams(self, step: int, count: int, *, batch_size: int, seeds: Sequence[int]) -> Batch:
        """Return training batches of `count` steps, leaves [count, seeds, B, ...]."""
        batch = super().streams(step, count, batch_size=batch_size, seeds=seeds)
        if self.retain is not None and self.retain.form == "targets":
            kept = stack_steps(
                self.retain.batch,
                len(self.retain),
                step,
                count,
                batch_size=batch_size,
                seeds=[seed + STREAM for seed in seeds],
            )
            batch |= {f"retain_{key}": value for key, value in kept.items()}
        for key in [key for key in batch if key.endswith("target_mask")]:
            targets = batch[key].sum(axis=(-1, -2), keepdims=True)[..., 0]
            shape = batch[key].shape[:-1]
            per_target = np.broadcast_to(shape[-1] / targets, shape).astype(np.float32)
            batch[key.removesuffix("target_mask") + "per_target"] = per_target
        return batch

    def _train_batch(self, places: Sequence[int]) -> Batch:
        batch = self.train.batch(places)
        if self.alternative is None:
            return batch
        other = self.alternative.batch(places)
        return batch | {f"alternative_{key}": value for key, value in other.items()}

    @property
    def spare(self) -> PaddedRows:
        """The rows to measure where no others are given."""
        return self.train if self.retain is None else self.retain

    def digests(self) -> dict[str, str]:
        """Return `digest` of each split that is given, and of the rows to keep."""
        kept = {} if self.retain is None else {"retain": digest(self.retain.rows)}
        found = super().digests()
        if self.validation.rows is self.spare.rows:
            del found["validation"]
        return found | kept

"""Rows as padded arrays, in few shapes, and the loss of each row."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.models.scoring import head_log_probs
from jaxlm.studies.selection_rows import Row
from jaxlm.typing import Batch, LossFn

_QUANTILES = (0.5, 0.8, 0.95, 1.0)
_MULTIPLE = 8


class Padded:
    """Rows, each in the shortest of few lengths that holds it.

    A batch has `input_ids` and `attention_mask` int32 [B, T]; and of the K tokens that are learnt,
    of which a row may have fewer, `positions` of the states that predict them and `targets`, int32
    [B, K], and `target_mask` float32 [B, K].

    Attributes:
        rows: the rows.
        shapes: (T, K) of each bucket, T increasing.
    """

    def __init__(self, rows: Sequence[Row], *, pad_id: int):
        self.rows, self._pad_id = tuple(rows), pad_id
        lengths = np.array([len(row.ids) for row in rows])
        marks = np.quantile(lengths, _QUANTILES, method="higher").astype(int)
        buckets = sorted({-(-int(mark) // _MULTIPLE) * _MULTIPLE for mark in marks})
        self._bucket = np.searchsorted(buckets, lengths)
        scored = np.array([len(row.scored) for row in rows])
        most = np.maximum.accumulate(
            [scored[self._bucket == i].max(initial=1) for i in range(len(buckets))]
        )
        self.shapes = tuple(zip(buckets, map(_power, most.tolist()), strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, places: Sequence[int]) -> Batch:
        """Some rows, in the shape of the longest."""
        length, most = self.shapes[int(self._bucket[list(places)].max())]
        whole, learnt = (len(places), length), (len(places), most)
        batch = {
            "input_ids": np.full(whole, self._pad_id, np.int32),
            "attention_mask": np.zeros(whole, np.int32),
            "positions": np.zeros(learnt, np.int32),
            "targets": np.zeros(learnt, np.int32),
            "target_mask": np.zeros(learnt, np.float32),
        }
        for i, place in enumerate(places):
            row = self.rows[place]
            scored = np.array(row.scored)
            batch["input_ids"][i, : len(row.ids)] = row.ids
            batch["attention_mask"][i, : len(row.ids)] = 1
            batch["positions"][i, : len(scored)] = scored - 1
            batch["targets"][i, : len(scored)] = np.array(row.ids)[scored]
            batch["target_mask"][i, : len(scored)] = 1
        return batch

    def batches(self, first: int, count: int, *, batch_size: int, seed: int) -> Batch:
        """Those of `count` steps from `first` on, stacked; a pure function of the arguments.

        Every epoch has each row once, in an order of its own; a batch may have the end of one and
        the beginning of the next.
        """
        size = len(self.rows)
        places = []
        for epoch in range(first * batch_size // size, (first + count) * batch_size // size + 1):
            order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)
            start = max(0, first * batch_size - epoch * size)
            places += order[start : (first + count) * batch_size - epoch * size].tolist()
        batch = self.batch(places)
        return {name: x.reshape(count, batch_size, *x.shape[1:]) for name, x in batch.items()}

    def order(self) -> list[int]:
        """All places, those of one shape after another."""
        places: list[int] = np.argsort(self._bucket, kind="stable").tolist()
        return places

    def blocks(
        self, size: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[list[int]]:
        """Places from `start` on, at most `size` of one shape at a time.

        Args:
            size: places in a block.
            start: how many are passed over.
            part: (p, P) for every P-th place of `order` from the p-th on.
        """
        order = self.order()[part[0] :: part[1]]
        while start < len(order):
            stop = start + 1
            while stop < min(len(order), start + size) and (
                self._bucket[order[stop]] == self._bucket[order[start]]
            ):
                stop += 1
            yield order[start:stop]
            start = stop


def row_losses(lm: Any) -> Callable[..., Array]:
    r"""`losses(params, batch, *, tap=None) -> [B]`: of each row $-\frac1K \sum_k \log p(y_k)$.

    The head gives logits at the tokens that are learnt alone.
    """

    def losses(params: Any, batch: Batch, *, tap: Any = None) -> Array:
        x = lm.hidden(params, batch["input_ids"], batch["attention_mask"], tap=tap)
        positions = jnp.asarray(batch["positions"])
        x = jnp.take_along_axis(x, positions[..., None], axis=1)
        scored = head_log_probs(lm.config, params, x, jnp.asarray(batch["targets"]))
        mask = jnp.asarray(batch["target_mask"])
        return -jnp.sum(scored * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)

    return losses


def mean_loss(lm: Any) -> LossFn:
    """The mean over the rows of a batch, whatever the lengths of their answers."""
    losses = row_losses(lm)

    def loss_fn(params: Any, batch: Batch, *, key: Any = None) -> Any:
        del key
        return jnp.mean(losses(params, batch)), {}

    return loss_fn


def _power(count: int) -> int:
    """The next power of 2."""
    return 1 << max(0, count - 1).bit_length()

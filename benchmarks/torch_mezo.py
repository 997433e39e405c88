"""MeZO as PyTorch users run it, on a causal model of transformers.

There are two ways. The published one is by MeZO's authors (arXiv:2305.17333): the seed is
reset, each parameter becomes `w + scale eps z` with z from `torch.normal`, the model returns
logits of every token, the slope goes to the host, and z is drawn a fourth time for the update, to
which a weight decay of 0 is added. The fast one adds noise in place, restores and updates with two
more draws, and scores only the label words at the last token.
"""

import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks import common
from jaxlm.models import LanguageModel, save_pretrained

NOT_DECAYED = ("bias", "layer_norm", "layernorm")


class TorchMezo:
    """A model with one batch, and the steps on it.

    Args:
      lm: the model whose weights are loaded.
      batch: `input_ids` [B, T], `attention_mask`, and `labels` [B] among the words.
      words: token ids of the label words, predicted at the last token.
      eps: size of the perturbation.
      learning_rate: learning rate of the update.
    """

    def __init__(
        self,
        lm: LanguageModel,
        batch: dict[str, np.ndarray],
        words: tuple[int, ...],
        *,
        eps: float,
        learning_rate: float,
    ):
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(lm, folder)
            disable_progress_bar()
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = loaded.eval()
        self.named = list(self.model.named_parameters())
        self.ids, self.mask, self.labels = (
            torch.tensor(batch[name], dtype=torch.long)
            for name in ("input_ids", "attention_mask", "labels")
        )
        self.words = torch.tensor(words)
        self.eps, self.learning_rate = eps, learning_rate

    def _loss_of(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(scores, self.labels)

    def full_loss(self) -> torch.Tensor:
        """Return the loss by a forward pass with all logits [B, T, V]."""
        logits = self.model(input_ids=self.ids, attention_mask=self.mask).logits
        return self._loss_of(logits[:, -1, self.words].float())

    def lean_loss(self) -> torch.Tensor:
        """Return the same loss from the logits [B, C] of the label words at the last token."""
        hidden = self.model.base_model(input_ids=self.ids, attention_mask=self.mask)
        rows = self.model.get_output_embeddings().weight[self.words]
        return self._loss_of(hidden.last_hidden_state[:, -1] @ rows.T)

    @torch.inference_mode()
    def two_full(self) -> tuple[float, float]:
        """Do two forward passes with all logits."""
        return self.full_loss().item(), self.full_loss().item()

    @torch.inference_mode()
    def two_lean(self) -> tuple[float, float]:
        """Do two forward passes with the label words' logits alone."""
        return self.lean_loss().item(), self.lean_loss().item()

    def _noise(self, param: torch.nn.Parameter) -> torch.Tensor:
        return torch.normal(
            mean=0, std=1, size=param.data.size(), device=param.data.device, dtype=param.data.dtype
        )

    def _replace(self, scale: int, seed: int) -> None:
        torch.manual_seed(seed)
        for _, param in self.named:
            param.data = param.data + scale * self._noise(param) * self.eps

    @torch.no_grad()
    def published_step(self, seed: int = 1, weight_decay: float = 0.0) -> float:
        """Do one step as published."""
        self._replace(1, seed)
        plus = self.full_loss()
        self._replace(-2, seed)
        slope = ((plus - self.full_loss()) / (2 * self.eps)).item()
        self._replace(1, seed)
        torch.manual_seed(seed)
        for name, param in self.named:
            update = slope * self._noise(param)
            if not any(word in name for word in NOT_DECAYED):
                update = update + weight_decay * param.data
            param.data = param.data - self.learning_rate * update
        return plus.item()

    def _add(self, scale: float, seed: int) -> None:
        torch.manual_seed(seed)
        for _, param in self.named:
            param.add_(torch.randn_like(param), alpha=scale)

    @torch.no_grad()
    def frugal_step(self, seed: int = 1) -> float:
        """Do one step in place."""
        self._add(self.eps, seed)
        plus = self.lean_loss()
        self._add(-2 * self.eps, seed)
        slope = float(plus - self.lean_loss()) / (2 * self.eps)
        self._add(self.eps, seed)
        self._add(-self.learning_rate * slope, seed)
        return plus.item()


def choose_threads(function: Callable[[], Any]) -> int:
    """Set one thread or one per core, whichever is faster; on a busy machine one may win.

    Returns:
      The number of threads.
    """

    def with_threads(count):
        torch.set_num_threads(count)
        return function()

    counts = {str(n): functools.partial(with_threads, n) for n in {1, os.cpu_count() or 1}}
    times = common.interleaved(counts, 2)
    torch.set_num_threads(int(min(times, key=times.__getitem__)))
    return torch.get_num_threads()

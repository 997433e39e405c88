"""Kernels by torch.func, on a masked model of transformers.

There are three ways. Two are from PyTorch's tutorial "Neural Tangent Kernels": Jacobians of all
examples by `vmap(jacrev)`, contracted parameter by parameter; and for every pair of examples a vjp
followed by a jvp, under `vmap`. The third is by the authors of LM-Kernel-FT (arXiv:2210.05643): C
gradients of x, then for every batch of x' one jvp along each gradient. Their flag
`per_device_eval_batch_size` sets the size of that batch.
"""

import tempfile
import time
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from transformers import AutoModelForMaskedLM
from transformers.utils.logging import disable_progress_bar

from jaxlm.models import LanguageModel, save_pretrained


class Scores(torch.nn.Module):
    """Logits of label words at one position; for C = 1 the difference of two."""

    def __init__(self, model: Any, words: tuple[int, ...], classes: int):
        super().__init__()
        self.model, self.classes = model, classes
        self.words = torch.tensor(words)

    def forward(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Return scores [C] for ids [T] and position []."""
        hidden = self.model.base_model(input_ids=ids[None]).last_hidden_state[0]
        hidden = hidden.index_select(0, position[None])
        head = self.model.lm_head
        hidden = head.layer_norm(torch.nn.functional.gelu(head.dense(hidden)))
        scores = (hidden @ head.decoder.weight[self.words].T)[0] + head.decoder.bias[self.words]
        return scores[1:] - scores[:1] if self.classes == 1 else scores


class TorchKernel:
    """The kernels of a model.

    Args:
      lm: a RoBERTa whose weights are loaded.
      words: token ids of the label words.
      classes: C; with 1 the difference of the first two words.
    """

    def __init__(self, lm: LanguageModel, words: tuple[int, ...], classes: int):
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(lm, folder)
            disable_progress_bar()
            loaded: Any = AutoModelForMaskedLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
        self.scores = Scores(loaded.eval(), words, classes)
        self.params = {name: p.detach() for name, p in self.scores.named_parameters()}

    def f(self, params: dict[str, torch.Tensor], ids: torch.Tensor, position: torch.Tensor) -> Any:
        """Return scores [C] of one example."""
        return functional_call(self.scores, params, (ids, position))

    @staticmethod
    def batch(x: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return examples as tensors; rows have no padding."""
        return tuple(
            torch.tensor(np.asarray(x[k]), dtype=torch.long) for k in ("input_ids", "positions")
        )  # type: ignore[return-value]

    def jacobians(self, x1: Any, x2: Any) -> np.ndarray:
        """Return the kernel [N1, C, N2, C] by the Jacobians of all examples."""
        every = vmap(jacrev(self.f), (None, 0, 0))
        left, right = every(self.params, *x1), every(self.params, *x2)
        total: Any = 0
        for name in left:
            total = total + torch.einsum(
                "naf,mbf->namb", left[name].flatten(2), right[name].flatten(2)
            )
        return total.numpy()

    def pairs(self, x1: Any, x2: Any) -> np.ndarray:
        """Return the kernel [N1, C, N2, C] by a vjp and a jvp for each pair."""

        def pair(one, other):
            def at(row):
                return lambda params: self.f(params, *row)

            value, pull = vjp(at(one), self.params)

            def column(vector):
                return jvp(at(other), (self.params,), pull(vector))[1]

            return vmap(column)(torch.eye(value.shape[0]))  # [c, d]

        def row(one):
            return vmap(lambda *other: pair(one, other))(*x2)  # [m, c, d]

        rows = [row((ids, position)).swapaxes(0, 1) for ids, position in zip(*x1, strict=True)]
        return torch.stack(rows).detach().numpy()

    def one_row(self, one: Any, others: Any) -> tuple[np.ndarray, float, float]:
        """Return the kernel of x and a batch of x', [C, M, C], and seconds of both parts."""
        start = time.perf_counter()
        gradients = jacrev(self.f)(self.params, *one)
        middle = time.perf_counter()

        def values(params):
            return vmap(self.f, (None, 0, 0))(params, *others)

        def along(tangents):
            return jvp(values, (self.params,), (tangents,))[1]

        found = vmap(along)(gradients).detach().numpy()
        return found, middle - start, time.perf_counter() - middle

    def loop_estimate(
        self, x1: Any, x2: Any, times: int, batch: int = 1
    ) -> tuple[np.ndarray, float]:
        """Return part of the kernel as the authors compute it, and the estimated seconds of all.

        Args:
          x1, x2: the examples.
          times: number of batches that are timed.
          batch: number of examples x' in a batch.

        Returns:
          `K[0, :, m, :]` for the examples m in these batches, and the estimate: N1 times the median
          seconds of the gradients plus the median seconds of the jvps times the number of batches.
        """
        (n, m), one = (len(x[1]) for x in (x1, x2)), tuple(part[0] for part in x1)
        parts = [
            tuple(part[at : at + batch] for part in x2)
            for at in range(0, min(m, times * batch), batch)
        ]
        self.one_row(one, parts[0])
        found = [self.one_row(one, part) for part in parts]
        gradients, products = (float(np.median([each[i] for each in found])) for i in (1, 2))
        entries = np.concatenate([each[0] for each in found], 1)
        return entries, n * (gradients + -(-m // batch) * products)

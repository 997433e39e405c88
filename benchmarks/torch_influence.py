"""Gradient features as the authors of LESS compute them, with PyTorch and peft.

For each example, a backward pass with a batch of one yields the gradients of all adapters, joined
into one vector; Adam's step on it uses moments of the same length. Several vectors at a time (16 in
the authors' code) are projected as trak's BasicProjector does: some columns of a matrix of signs
are drawn, multiplied and dropped. The state of the generator is kept for each part, so that every
call has the same matrix.
"""

import tempfile
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from jaxlm.core import paths
from jaxlm.models import LanguageModel, save_pretrained
from jaxlm.peft import LORA, save_adapter

AUTHORS_INTERVAL = 16


class Projector:
    """A matrix of signs [P, dim] in parts, drawn again at each call.

    Args:
      numbers: P.
      dim: number of columns.
      columns: number of columns in a part.
    """

    def __init__(self, numbers: int, dim: int, columns: int = 128):
        self.dim, self.columns = dim, columns
        self.part = torch.empty(numbers, columns)
        self.states = []
        self.generator = torch.Generator().manual_seed(0)
        for _ in range(0, dim, columns):
            self.states.append(self.generator.get_state())
            self.generator.manual_seed(len(self.states))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Project rows to [N, dim], without a scale."""
        projected = torch.empty(len(rows), self.dim)
        for i, state in enumerate(self.states):
            self.generator.set_state(state)
            self.part.bernoulli_(0.5, generator=self.generator).mul_(2).sub_(1)
            projected[:, i * self.columns : (i + 1) * self.columns] = rows @ self.part
        return projected


class Loop:
    """The authors' loop on a model with adapters.

    Args:
      lm: a Llama with adapters.
      first, second: Adam's moments, dictionaries of arrays by our paths.
      count: number of steps they have seen.
    """

    def __init__(self, lm: LanguageModel, first: Any, second: Any, count: int):
        disable_progress_bar()
        with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as adapter:
            bare = paths.map_with_path(
                lambda leaf: None if paths.path_predicate(LORA)(leaf.path) else leaf.value,
                lm.params,
            )
            save_pretrained(lm.replace(params=without_none(bare)), base)
            save_adapter(lm, adapter)
            loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            self.model: Any = PeftModel.from_pretrained(loaded, adapter, is_trainable=True)
        self.model.train()  # these adapters have no dropout
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.places = [self._place(n) for n, p in self.model.named_parameters() if p.requires_grad]
        self.first, self.second = (self._joined(moments) for moments in (first, second))
        self.count = count

    @staticmethod
    def _place(name: str) -> tuple[str, int]:
        """Return our path and layer of a parameter of peft."""
        parts = name.split(".")
        layer = int(parts[parts.index("layers") + 1])
        projection = next(part for part in parts if part.endswith("_proj"))
        letter = "a" if "lora_A" in parts else "b"
        return f"layers.attention.{projection}.lora_{letter}", layer

    def _joined(self, moments: Any) -> torch.Tensor:
        parts = [np.asarray(moments[path][layer]).T.ravel() for path, layer in self.places]
        return torch.tensor(np.concatenate(parts))

    def ours(self, row: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
        """Reorder a vector as our tree."""
        leaves = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
        start = 0
        for path, layer in self.places:
            one = leaves[path][layer]
            part = row[start : start + one.size].numpy()
            leaves[path][layer] = part.reshape(one.T.shape).T
            start += one.size
        return np.concatenate([leaves[path].ravel() for path in shapes])

    def gradient(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the gradient [P] of one example [T]."""
        loss = self.model(input_ids=ids[None], labels=ids[None]).loss
        loss.backward()
        row = torch.cat([p.grad.view(-1) for p in self.parameters])
        self.model.zero_grad()
        return row

    def step(self, gradient: torch.Tensor, b1=0.9, b2=0.999, eps=1e-8) -> torch.Tensor:
        """Return Adam's step, with bias correction and eps outside the root, as in the paper."""
        t = self.count + 1
        first = b1 * self.first + (1 - b1) * gradient
        second = b2 * self.second + (1 - b2) * gradient**2
        return first / (1 - b1**t) / (torch.sqrt(second / (1 - b2**t)) + eps)

    def directions(self, ids: torch.Tensor) -> torch.Tensor:
        """Return Adam's steps [N, P]."""
        return torch.stack([self.step(self.gradient(row)) for row in ids])

    def features(self, ids: torch.Tensor, projector: Projector, interval: int) -> torch.Tensor:
        """Return features [N, dim], projected `interval` rows at a time."""
        parts = [ids[i : i + interval] for i in range(0, len(ids), interval)]
        return torch.cat([projector(self.directions(part)) for part in parts])


def without_none(tree: Any) -> Any:
    """Remove the entries of nested dictionaries that are None."""
    if not isinstance(tree, dict):
        return tree
    return {name: without_none(below) for name, below in tree.items() if below is not None}

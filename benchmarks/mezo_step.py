"""What does a MeZO step cost over the two forward passes that it cannot do without?

usage: python -m benchmarks.mezo_step [--quick] [--dtype float32|bfloat16] [--repeats 5]

Times one step and two compiled forward passes of the same objective in turns, for each sampler, at
the shape of OPT-125M with 16 rows of 64 tokens and at the size of the shipped model; with --quick
only the latter. Beside it stands the step of PyTorch users on the same weights and tokens: perturb
in place with noise drawn again from a seed, two forward passes, restore, update. Each row has the
compiler's peak memory, and the largest difference of a loss from a check: perturbed copies of the
parameters for jaxlm, the loss of jaxlm's own forward pass for PyTorch. The last line is one JSON
object.
"""

import argparse
import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.shapes import OPT_125M, SHIPPED
from jaxlm import zo
from jaxlm.models import LanguageModel, ModelConfig, init_params, save_pretrained
from jaxlm.train.objective import classification_objective

EPS, LEARNING_RATE, LABEL_WORDS = 1e-3, 1e-6, (5, 9)
SAMPLERS = {"gaussian": zo.gaussian(), "rademacher": zo.rademacher()}


def make_batch(config: ModelConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """Random tokens of full length, whose last position predicts one of two label words."""
    numbers = np.random.default_rng(0)
    return {
        "input_ids": numbers.integers(10, config.vocab_size, (rows, length), np.int32),
        "attention_mask": np.ones((rows, length), np.int32),
        "positions": np.full((rows,), length - 1, np.int32),
        "labels": (np.arange(rows) % 2).astype(np.int32),
        "weights": np.ones((rows,), np.float32),
    }


class Method(NamedTuple):
    """Something to time.

    Attributes:
      name: what stands in the table.
      call: does it once.
      base: name of the two forward passes that it is compared with.
      program: the compiled program, where there is one.
      compile_s: seconds that this took.
      difference: |loss - that of the check|, where there is one.
    """

    name: str
    call: Callable[[], Any]
    base: str
    program: Any = None
    compile_s: float | None = None
    difference: float | None = None


def jaxlm_methods(lm: LanguageModel, batch: Any) -> list[Method]:
    """Two forward passes, and a step for each sampler."""
    loss_fn = classification_objective(lm.apply, jnp.array(LABEL_WORDS))
    forward, forward_s = common.compiled(jax.jit(loss_fn), lm.params, batch)

    def two_forwards():
        return forward(lm.params, batch), forward(lm.params, batch)

    base = "two forwards"
    methods = [Method(base, two_forwards, base, forward, forward_s)]
    for name, sampler in SAMPLERS.items():
        opt = zo.mezo(LEARNING_RATE, eps=EPS, sampler=sampler)
        state = opt.init(lm.params, jax.random.key(0))
        step = zo.jit_step(opt, loss_fn)
        program, compile_s = common.compiled(step, lm.params, state, batch)
        stepper = Stepper(program, lm.params, state, batch)
        difference = stepper.difference(loss_fn, lm.params, sampler)
        methods.append(Method(f"MeZO, {name}", stepper, base, program, compile_s, difference))
    return methods


class Stepper:
    """A compiled step that is called again and again, on parameters of its own."""

    def __init__(self, program, params, state, batch):
        self.program, self.batch = program, batch
        self.params, self.state = jax.tree.map(jnp.copy, (params, state))

    def __call__(self):
        self.params, self.state, self.info = self.program(self.params, self.state, self.batch)
        return self.params, self.info

    def difference(self, loss_fn: Callable[..., Any], params: Any, sampler: zo.Sampler) -> float:
        """Makes the first step; |its loss - that of a perturbed copy of the parameters|."""
        estimate = functools.partial(
            zo.spsa, loss_fn, eps=EPS, sampler=sampler, materialize_params=True
        )
        key = jax.random.fold_in(self.state.key, 0)
        expected = jax.jit(estimate)(params, self.batch, key=key)
        self()
        return float(jnp.abs(self.info.loss_plus - expected.loss_plus).max())


def torch_methods(lm: LanguageModel, batch: Any) -> list[Method]:
    """The same in eager PyTorch, on the same weights; nothing where PyTorch is missing."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError as missing:
        print(f"no PyTorch rows, since {missing.name} is not installed (extra: parity)")
        return []
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(lm, folder)
        disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, mask, labels = (
        torch.tensor(batch[name], dtype=torch.long)
        for name in ("input_ids", "attention_mask", "labels")
    )
    words = torch.tensor(LABEL_WORDS)
    params = list(model.parameters())

    def loss():
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1]
        logits = hidden @ model.get_output_embeddings().weight[words].T
        return torch.nn.functional.cross_entropy(logits, labels)

    def add_noise(scale, seed):
        torch.manual_seed(seed)
        for param in params:
            param.add_(torch.randn_like(param), alpha=scale)

    @torch.no_grad()
    def step(seed=1):
        add_noise(EPS, seed)
        plus = loss()
        add_noise(-2 * EPS, seed)
        slope = float(plus - loss()) / (2 * EPS)
        add_noise(EPS, seed)
        add_noise(-LEARNING_RATE * slope, seed)

    @torch.no_grad()
    def two_forwards():
        return float(loss()), float(loss())

    loss_fn = classification_objective(lm.apply, jnp.array(LABEL_WORDS))
    difference = abs(two_forwards()[0] - float(jax.jit(loss_fn)(lm.params, batch)[0]))
    torch.set_num_threads(best_threads(torch.set_num_threads, two_forwards))
    base = f"two forwards, torch (threads: {torch.get_num_threads()})"
    return [
        Method(base, two_forwards, base, difference=difference),
        Method("MeZO in place, torch", step, base),
    ]


def best_threads(set_threads: Callable[[int], None], function: Callable[[], Any]) -> int:
    """One thread or one a core, whichever is faster: on a busy machine that is not always all."""

    def with_threads(count):
        set_threads(count)
        return function()

    counts = {str(n): functools.partial(with_threads, n) for n in {1, os.cpu_count() or 1}}
    times = common.interleaved(counts, 2)
    return int(min(times, key=times.__getitem__))


def measure(shape: str, config: ModelConfig, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """One row for each method, all timed in turns."""
    lm = LanguageModel(config, init_params(config, jax.random.key(0), dtype))
    batch = make_batch(config, rows=16, length=64)
    methods = jaxlm_methods(lm, batch)
    if dtype == "float32":
        methods += torch_methods(lm, batch)
    times = common.interleaved({method.name: method.call for method in methods}, repeats)
    forward = common.peak_bytes(methods[0].program)
    rows = []
    for method in methods:
        peak = method.program and common.peak_bytes(method.program)
        rows.append(
            {
                "shape": shape,
                "method": method.name,
                "seconds": times[method.name],
                "over_two_forwards": times[method.name] / times[method.base],
                "peak_MB": peak and peak / 1e6,
                "over_forward_peak": peak and peak / forward,
                "compile_s": method.compile_s,
                "loss_difference": method.difference,
            }
        )
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small shape, three repeats")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    repeats = 3 if options.quick else options.repeats
    shapes = {"shipped size": SHIPPED} | ({} if options.quick else {"OPT-125M": OPT_125M})
    rows = []
    for shape, config in shapes.items():
        rows += measure(shape, config, options.dtype, repeats)
    common.print_table(rows)
    common.print_report("mezo_step", rows)


if __name__ == "__main__":
    main()

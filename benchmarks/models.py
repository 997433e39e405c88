"""How fast are the models, compared with transformers in PyTorch on the same weights and tokens?

usage: python -m benchmarks.models [--quick] [--repeats 7] [--only SHAPE] [--model FOLDER]

Random weights in the shapes of OPT-125M, Pythia-160M and RoBERTa-base, or a model of your own, such
as `--model smollm2`, in float32 and 8 rows of 128 tokens: a forward pass with all logits, the loss
of every token with its gradient, and greedy generation of 64 tokens for 16 prompts of 32, in turns.
The table has ratios of times, peak memory by the compiler, and the largest difference of logits or
losses or the share of other tokens. --quick has the shipped model's shape only, and fewer tokens.
The last line is one JSON object.
"""

import argparse
import math
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, shapes
from jaxlm import from_pretrained
from jaxlm.models import LanguageModel, save_pretrained
from jaxlm.models.scoring import log_probs_of

SHAPES = {
    "OPT-125M": shapes.OPT_125M,
    "Pythia-160M": shapes.PYTHIA_160M,
    "RoBERTa-base": shapes.ROBERTA_BASE,
}


def load_peer(lm: LanguageModel) -> Any:
    """Load the same weights in transformers."""
    import transformers

    kind = "AutoModelForMaskedLM" if lm.config.head == "mlm" else "AutoModelForCausalLM"
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(lm, folder)
        return getattr(transformers, kind).from_pretrained(folder).eval()


def measure(name: str, lm: LanguageModel, rows: int, length: int, repeats: int) -> list[dict]:
    """Time forward and forward + backward of a model."""
    import torch
    from torch.nn.functional import cross_entropy

    config = lm.config
    peer = load_peer(lm)
    numbers = np.random.default_rng(0)
    ids = numbers.integers(10, config.vocab_size, (rows, length), np.int32)
    targets = numbers.integers(10, config.vocab_size, (rows, length), np.int32)
    causal = config.kind == "decoder"

    def loss(params: Any, ids: Any) -> Any:
        if causal:
            return -jnp.mean(lm.log_probs(params, ids))
        return -jnp.mean(log_probs_of(lm.apply(params, ids), jnp.asarray(targets)))

    forward, forward_s = common.compiled(jax.jit(lm.apply), lm.params, ids)
    both, both_s = common.compiled(jax.jit(jax.value_and_grad(loss)), lm.params, ids)
    tokens, wanted = torch.from_numpy(ids).long(), torch.from_numpy(targets).long()

    def peer_forward() -> Any:
        with torch.inference_mode():
            return peer(tokens).logits

    def peer_both() -> Any:
        peer.zero_grad(set_to_none=True)
        logits, labels = peer(tokens).logits, wanted
        if causal:
            logits, labels = logits[:, :-1], tokens[:, 1:]
        value = cross_entropy(logits.flatten(0, 1), labels.flatten())
        value.backward()
        return value.detach()

    logits = np.asarray(forward(lm.params, ids))
    difference = float(np.abs(logits - peer_forward().numpy()).max())
    value, grads = both(lm.params, ids)
    gap = abs(float(value) - float(peer_both()))
    del logits, grads
    times = common.interleaved(
        {
            "forward": lambda: forward(lm.params, ids),
            "peer forward": peer_forward,
            "both": lambda: both(lm.params, ids),
            "peer both": peer_both,
        },
        repeats,
    )
    return [
        row(name, "forward", times, forward, forward_s, difference),
        row(name, "both", times, both, both_s, gap),
    ]


def row(name: str, what: str, times: dict, program: Any, compile_s: float, difference: float):
    """Return a line of the table."""
    seconds, peer = times[what], times["peer " + what]
    return {
        "shape": name,
        "what": {"both": "forward + backward"}.get(what, what),
        "seconds": seconds,
        "transformers": peer,
        "ratio": seconds / peer,
        "MiB": None if program is None else common.peak_bytes(program) / 2**20,
        "compile_s": compile_s,
        "difference": difference,
    }


def measure_generation(
    name: str, lm: LanguageModel, rows: int, prompt: int, new: int, repeats: int
) -> dict:
    """Time greedy generation; the difference is the share of tokens that differ."""
    import torch

    peer = load_peer(lm)
    ids = np.random.default_rng(1).integers(10, lm.config.vocab_size, (rows, prompt), np.int32)
    tokens = torch.from_numpy(ids).long()

    def ours() -> Any:
        return lm.generate(lm.params, ids, max_new_tokens=new, eos_id=()).tokens

    def theirs() -> Any:
        return peer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )[:, prompt:]

    compile_s = common.seconds(ours)
    difference = float(np.mean(np.asarray(ours()) != theirs().numpy()))
    times = common.interleaved({"generation": ours, "peer generation": theirs}, repeats)
    return row(name, "generation", times, None, compile_s, difference)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=SHAPES, help="one shape")
    parser.add_argument("--model", help="a folder or hub id, in place of random weights")
    options = parser.parse_args()
    chosen = {options.only: SHAPES[options.only]} if options.only else SHAPES
    sizes, generated, repeats = (8, 128), (16, 32, 64), options.repeats
    if options.quick:
        chosen, sizes, generated, repeats = {"shipped": shapes.SHIPPED}, (8, 64), (8, 16, 16), 3
    rows = []
    for name in [options.model] if options.model else chosen:
        lm = from_pretrained(name) if options.model else shapes.random_model(chosen[name])
        rows += measure(name, lm, *sizes, repeats)
        if lm.config.kind == "decoder":
            if not options.model:
                # Larger weights than at initialization, so that rounding does not change the best
                # token.
                lm = lm.replace(params=jax.tree.map(lambda x: 3 * x, lm.params))
            rows.append(measure_generation(name, lm, *generated, repeats))
    common.print_table(rows)
    for what in dict.fromkeys(each["what"] for each in rows):
        ratios = [each["ratio"] for each in rows if each["what"] == what]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"{what}: {mean:.3f} of the time of transformers, geometric mean")
    common.print_report("models", rows)


if __name__ == "__main__":
    main()

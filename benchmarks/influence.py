"""How fast are gradient features, compared with the loop of the authors of LESS?

usage: python -m benchmarks.influence [--quick] [--repeats 5] [--no-torch]

The model is a Llama of 4 layers of width 256 with random weights in float32. Adapters of rank 8 at
the queries, keys, values and outputs have 65,536 numbers; there are 64 examples of 128 tokens.
Features are Adam's step on the gradient of each example, whole or projected to 8192 numbers. The
peer is `torch_influence`: PyTorch and peft, one example at a time, projected by blocks of a matrix
of signs. It projects all 64 rows at once, as jaxlm does, or 16, as the authors' script by default.

  examples_s   examples a second, median over interleaved repeats
  times        examples_s over that of the peer for the same features, 64 rows at a time
  times_16     the same for a peer that projects 16 rows at a time
  gradient_s   seconds for the gradients and Adam's steps of all examples
  project_s    seconds for their projection
  resident_MB  increase of the peak memory of a fresh process
  difference   whole features: largest |ours - theirs| over the largest |theirs|; projected
               features: largest difference between cosines of two examples and those of whole ones

The row "batch gradient" is `jax.grad` of the sum of all losses: one gradient for all examples, as a
training step computes it.

--quick uses 8 examples of 16 tokens and 512 numbers. The last line is one JSON object.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from benchmarks.shapes import SHIPPED
from jaxlm import influence, peft
from jaxlm.core import paths
from jaxlm.models import LanguageModel, init_params, transformer
from jaxlm.models.scoring import log_probs_of

SMALL = SHIPPED.replace(
    vocab_size=2000,
    hidden_size=256,
    num_heads=4,
    num_kv_heads=4,
    head_size=64,
    intermediate_size=688,
    embedding_size=256,
)
FAMILIES = ("rademacher", "countsketch", "srht")
WHOLE, BATCH = "gradient, Adam", "batch gradient"


def model() -> LanguageModel:
    """Return the model with adapters, none of which is zero."""
    lm = LanguageModel(SMALL, init_params(SMALL, jax.random.key(0)))
    lm = peft.lora(lm, jax.random.key(1), rank=8, targets=r"attention\.")

    def drawn(leaf):
        if not leaf.path.endswith("lora_b"):
            return leaf.value
        return 0.05 * jax.random.normal(jax.random.key(2), leaf.value.shape)

    return lm.replace(params=paths.map_with_path(drawn, lm.params))


def loss_of(lm: LanguageModel) -> Any:
    """Return a loss: the mean negative log-probability [N] of all tokens but the first."""

    def loss(params, ids, *, tap=None):
        x = lm.hidden(params, ids, tap=tap)
        scored = log_probs_of(transformer.logits(lm.config, params, x), jnp.roll(ids, -1, axis=1))
        return -scored[:, :-1].mean(1)

    return loss


def moments(lm: LanguageModel) -> Any:
    """Return a state of Adam whose moments have the size of gradients."""
    chosen = paths.split(lm.params, peft.LORA)[0]

    def like(seed, scale):
        key = jax.random.key(seed)
        return jax.tree.map(lambda p: scale * jax.random.normal(key, p.shape), chosen)

    second = jax.tree.map(jnp.square, like(4, 1e-2))
    return optax.ScaleByAdamState(jnp.int32(100), like(3, 1e-3), second)


def tokens(count: int, length: int) -> np.ndarray:
    """Draw token ids."""
    return np.random.default_rng(0).integers(3, SMALL.vocab_size, (count, length), np.int32)


def features_of(lm: LanguageModel, state: Any, ids: Any, family: str | None, dim: int) -> Any:
    """Return a function without arguments that computes features."""
    drawn = None if family is None else influence.projector(family, dim)
    options = {"adam_state": state, "select": peft.LORA, "projector": drawn}
    return functools.partial(influence.gradient_features, loss_of(lm), lm.params, ids, **options)


def batch_gradient(lm: LanguageModel, ids: Any) -> Any:
    """Return a function without arguments that computes the gradient of the sum of all losses."""
    chosen, frozen = paths.split(lm.params, peft.LORA)
    grad = jax.grad(lambda part: loss_of(lm)(paths.merge(part, frozen), ids).sum())
    return functools.partial(jax.jit(grad), chosen)


def torch_loop(lm: LanguageModel, state: Any) -> Any:
    """Return the peer, or None if PyTorch is not installed."""
    try:
        from benchmarks.torch_influence import Loop
    except ImportError as missing:
        print(f"no rows for PyTorch: {missing.name} is not installed (extra: parity)")
        return None
    return Loop(lm, *(by_path(tree) for tree in (state.mu, state.nu)), int(state.count))


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves by their paths, in the order of the tree."""
    return {leaf.path: leaf.value for leaf in paths.flatten(tree)[0]}


def cosines(rows: np.ndarray) -> np.ndarray:
    """Return the cosines of all pairs of rows."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def resident(name: str, count: int, length: int, dim: int) -> float:
    """Return the MB that computing features, already compiled, adds to the peak of this process."""
    lm = model()
    state, ids = moments(lm), tokens(count, length)
    family = None if name.endswith(WHOLE) else name.split()[-1]
    if name.startswith("torch"):
        import torch

        from benchmarks.torch_influence import Projector

        loop, rows = torch_loop(lm, state), torch.tensor(ids, dtype=torch.long)
        before = common.fresh_peak()
        if family is None:
            loop.directions(rows)
        else:
            loop.features(rows, Projector(len(loop.first), dim), len(rows))
    else:
        function = features_of(lm, state, ids, family, dim)
        jax.block_until_ready(function())
        before = common.fresh_peak()
        jax.block_until_ready(function())
    return (common.resident_bytes() - before) / 1e6


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    count, length, dim = (8, 16, 512) if options.quick else (64, 128, 8192)
    lm = model()
    state, ids = moments(lm), tokens(count, length)
    calls = {WHOLE: features_of(lm, state, ids, None, dim)}
    calls |= {name: features_of(lm, state, ids, name, dim) for name in FAMILIES}
    calls[BATCH] = batch_gradient(lm, ids)
    compile_s = {name: common.seconds(call) for name, call in calls.items()}
    values = {name: np.asarray(calls[name]()) for name in (WHOLE, *FAMILIES)}
    differences = {
        name: float(np.abs(cosines(values[name]) - cosines(values[WHOLE])).max())
        for name in FAMILIES
    }
    peers: dict[str, Any] = {}
    if not options.no_torch and (loop := torch_loop(lm, state)) is not None:
        import torch

        from benchmarks.torch_influence import AUTHORS_INTERVAL, Projector

        rows = torch.tensor(ids, dtype=torch.long)
        drawn = Projector(len(loop.first), dim)
        shapes = {path: leaf.shape for path, leaf in by_path(state.mu).items()}
        theirs = loop.directions(rows)
        wanted = np.stack([loop.ours(row, shapes) for row in theirs])
        differences[WHOLE] = float(np.abs(values[WHOLE] - wanted).max() / np.abs(wanted).max())
        peers[f"torch, {WHOLE}"] = lambda: loop.directions(rows)
        part = theirs[:AUTHORS_INTERVAL]
        peers["torch, projection"] = lambda: drawn(theirs)
        peers["torch, projection of 16"] = lambda: drawn(part)
    seconds = common.interleaved({**calls, **peers}, options.repeats)
    table = []

    def row(
        name: str,
        gradient_s: float,
        project_s: float,
        peer: float | None,
        peer_16: float | None = None,
    ) -> None:
        total = gradient_s + project_s
        fresh = not options.quick and name != BATCH
        call = f"influence.resident({name!r}, {count}, {length}, {dim})"
        held = common.in_fresh_process(call) if fresh else None
        table.append(
            {
                "features": name,
                "examples_s": count / total,
                "times": None if peer is None else peer / total,
                "times_16": None if peer_16 is None else peer_16 / total,
                "gradient_s": gradient_s,
                "project_s": project_s,
                "resident_MB": held,
                "compile_s": compile_s.get(name),
                "difference": differences.get(name),
            }
        )

    whole = peer_all = peer_16 = None
    if peers:
        whole = seconds[f"torch, {WHOLE}"]
        peer_all = whole + seconds["torch, projection"]
        peer_16 = whole + seconds["torch, projection of 16"] * -(-count // len(part))
    row(WHOLE, seconds[WHOLE], 0.0, whole)
    for name in FAMILIES:
        rest = max(0.0, seconds[name] - seconds[WHOLE])
        row(name, seconds[name] - rest, rest, peer_all, peer_16)
    row(BATCH, seconds[BATCH], 0.0, whole)
    if peers:
        row(f"torch, {WHOLE}", whole, 0.0, whole)
        row("torch, rademacher", whole, peer_all - whole, peer_all, peer_16)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few short examples, two repeats")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.repeats = min(2, options.repeats)
    table = measure(options)
    common.print_table(table)
    common.print_report("influence", table)


if __name__ == "__main__":
    main()

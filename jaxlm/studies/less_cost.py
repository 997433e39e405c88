"""The cost of a study of selections from sizes alone: FLOPs, bytes on disk and hours per stage.

For each token and parameter, the forward pass takes 2 FLOPs, and so does the backward pass to the
activations, since frozen weights get no gradient. Adapters take 6 FLOPs, attention 12 T D per token
and layer, for rows of T tokens. Padding, reading and writing are not counted.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxlm.core.checks import whole
from jaxlm.core.paths import path_predicate
from jaxlm.cost.device import Device
from jaxlm.influence.store import row_bytes
from jaxlm.models import ModelConfig, param_shapes
from jaxlm.peft import Lora
from jaxlm.studies.less import SelectionConfig, read_sides
from jaxlm.studies.less_rows import Source, Target
from jaxlm.studies.tables import aligned, size
from jaxlm.train.load import load_model

LLAMA_7B = ModelConfig(
    family="llama",
    kind="decoder",
    head="lm",
    vocab_size=32000,
    hidden_size=4096,
    embedding_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    intermediate_size=11008,
    max_positions=2048,
    tie_embeddings=False,
    activation="silu",
    gated_mlp=True,
    norm="rmsnorm",
    positions="rotary",
    attention_bias=False,
    output_bias=False,
    mlp_bias=False,
)
"""The shape of the model that LESS was published with."""

PAPER = SelectionConfig(
    sources={"paper": Source(messages="rows.jsonl")},
    target=Target(messages="target.jsonl"),
    output="less",
)
"""A study with the settings of the paper; its files are not read."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the data; by default those of LESS, with 5 target examples for each of 57 subtasks.

    Attributes:
        examples: number of rows to choose from.
        targets: number of target examples.
        subtasks: number of groups of them.
        tokens: mean number of tokens in a row.
        target_tokens: mean number of tokens in a target example; None for as many.
    """

    examples: int = 270_679
    targets: int = 285
    subtasks: int = 57
    tokens: int = 300
    target_tokens: int | None = None

    def __post_init__(self):
        whole(self, "examples", "targets", "subtasks", "tokens", "target_tokens", most=10**15)


class Plan(NamedTuple):
    """What the cost of a study depends on: by default the study of the paper."""

    model: ModelConfig = LLAMA_7B
    sizes: Sizes = Sizes()
    config: SelectionConfig = PAPER


class Cost(NamedTuple):
    """The FLOPs of a stage, the bytes that stay on disk, and what the paper reports on an A100."""

    stage: str
    flops: float | int
    bytes: float | int
    paper: str = ""


def adapter_size(model: ModelConfig, peft: Lora) -> int:
    """Return the number of parameters of the adapters.

    >>> adapter_size(LLAMA_7B, PAPER.recipe.peft)
    134217728
    """
    takes = path_predicate(peft.targets)
    return sum(
        math.prod(shape[:-2]) * (shape[-2] + shape[-1]) * peft.rank
        for path, shape in param_shapes(model).items()
        if path.endswith(".kernel") and takes(path)
    )


def row_flops(model: ModelConfig, peft: Lora, tokens: int) -> float:
    """Return the FLOPs of the loss of one row and its gradient with respect to the adapters."""
    shapes = param_shapes(model).items()
    weights = sum(math.prod(shape) for path, shape in shapes if path.endswith(".kernel"))
    weights += model.vocab_size * model.embedding_size
    attention = 12 * tokens * model.num_layers * model.num_heads * model.head_size
    return float(tokens * (4 * weights + 6 * adapter_size(model, peft) + attention))


def costs(plan: Plan) -> list[Cost]:
    """Return the cost of each stage of a plan, summed over its seeds."""
    model, sizes, config = plan
    features, recipe = config.features, config.recipe
    epochs, adapters = recipe.epochs, adapter_size(model, recipe.peft)
    row = row_flops(model, recipe.peft, sizes.tokens)
    target_tokens = sizes.tokens if sizes.target_tokens is None else sizes.target_tokens
    target = row_flops(model, recipe.peft, target_tokens)
    project = PROJECTION[features.family](adapters, features.dim)
    width = row_bytes(features.dtype, features.dim)
    chosen = int(config.fraction * sizes.examples)
    state = 12 * adapters  # float32: adapters and Adam's two moments
    run = 2 * state  # the previous checkpoint stays until the latest one is written
    found = []
    if "less" in config.methods:
        first = int(config.warmup_fraction * sizes.examples)
        rows, targets = sizes.examples * epochs, sizes.targets * epochs
        scoring = 2 * rows * features.dim * sizes.subtasks
        found += [
            Cost("warm-up", row * first * epochs, state * epochs + run, "6 h"),
            Cost(
                "features of the rows",
                rows * (row + ADAM * adapters + project),
                rows * width,
                "48 h, 17.7 GB",
            ),
            Cost("features of the target", targets * (target + project), targets * width),
            Cost("scores", scoring, 64 * sizes.examples, "< 1 min"),
        ]
    for method in config.methods:
        count = sizes.examples if method == "full" else chosen
        found.append(Cost(f"training on {method}", row * count * epochs, run))
    seeds = len(config.seeds)
    return [each._replace(flops=seeds * each.flops, bytes=seeds * each.bytes) for each in found]


ADAM = 12
"""FLOPs of Adam's direction per parameter."""

PROJECTION = {
    "countsketch": lambda size, dim: 2 * size,
    "srht": lambda size, dim: 2 * size * math.log2(dim),
    "rademacher": lambda size, dim: 2 * size * dim,
    "gaussian": lambda size, dim: 2 * size * dim,
}
"""FLOPs of a projection from the length of a gradient to the length of a row."""


def markdown(plan: Plan, device: Device) -> str:
    """Return the costs as a Markdown table that is also aligned for a terminal."""
    model, sizes, config = plan
    peft = config.recipe.peft
    parameters = sum(math.prod(shape) for shape in param_shapes(model).values())
    peak = device.flops / device.utilisation
    said = (
        f"{sizes.examples:,} rows of {sizes.tokens} tokens and {sizes.targets:,} target examples; "
        f"{model.family} of {parameters / 1e9:.3g} G parameters, LoRA of rank {peft.rank} with "
        f"{adapter_size(model, peft):,}; {device.name} of {peak / 1e12:g} TFLOP/s at "
        f"{100 * device.utilisation:g} %; seeds: {len(config.seeds)}. Last column: what LESS "
        "(arXiv:2402.04333) reports for 270,679 rows on one A100."
    )
    rate = 3600 * device.flops
    found = costs(plan)
    total = Cost("total", sum(c.flops for c in found), sum(c.bytes for c in found))
    cells = [
        (c.stage, f"{c.flops:.2e}", size(c.bytes), _hours(c.flops / rate), c.paper)
        for c in (*found, total)
    ]
    return f"{said}\n\n{aligned(('stage', 'FLOPs', 'on disk', 'hours', 'paper'), cells)}"


def plan_of(config: SelectionConfig, *, base_dir: Path | None = None) -> Plan:
    """Return the plan of a study. Its rows are read, the weights of its model are not."""
    lm = load_model(config.model, shapes_only=True)
    pool, target = read_sides(config, lm, base_dir=base_dir)
    groups = target.subtasks
    lengths = [sum(len(row.ids) for row in side.rows) for side in (pool, target)]
    sizes = Sizes(
        examples=len(pool.rows),
        targets=len(target.rows),
        subtasks=1 if groups is None else int(groups.max()) + 1,
        tokens=-(-lengths[0] // len(pool.rows)),
        target_tokens=-(-lengths[1] // len(target.rows)),
    )
    return Plan(lm.config, sizes, config)


def _hours(hours: float) -> str:
    return f"{hours:.2g}" if hours < 10 else f"{hours:.0f}"

"""The model, state and programs of a run as shapes, without weights."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.artifacts.files import file_path
from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.data import EncodedTask
from jaxlm.data.corpus import read_tokenizer
from jaxlm.data.encoding import Encoded as EncodedExample
from jaxlm.data.rows import EncodedRows, TokenRow
from jaxlm.evaluation.perplexity import total_nats
from jaxlm.models import LanguageModel, ModelConfig, init_params
from jaxlm.sharding import WHOLE, abstract, mesh_of, param_shardings
from jaxlm.sharding.placement import batch_places, with_places
from jaxlm.train.dynamics import Batches, Source, method_and_batches
from jaxlm.train.finetuning import FinetuneConfig, build, read_data
from jaxlm.train.load import load_model
from jaxlm.train.losses import lm_objective
from jaxlm.train.measure import GenerationMetric
from jaxlm.train.objectives.base import Encoded
from jaxlm.train.pretraining import PretrainConfig
from jaxlm.train.run import RunConfig
from jaxlm.train.state import Method, Program, TrainState, many_steps
from jaxlm.typing import Batch, LossFn, Params

Tail = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""For each key of a batch, the shape and dtype of one example."""

LONG = 2048
"""Longest context, in tokens, that is a fair guess at the length of a text."""

_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options that change the machine code, but neither operations nor memory."""
_IN_LOOPS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
"""The CPU compiler converts bfloat16 to float32 before products, and hoists that out of the loop
over layers, for whole stacks. An accelerator does neither; so convert one layer at a time."""


class Call(NamedTuple):
    """A program and the shapes of its arguments."""

    program: Program
    args: tuple[Any, ...]

    def compile(self, *, cpu: bool) -> Any:
        """Return the compiled program, which is not meant to run: its CPU code is not optimised.

        Args:
            cpu: whether the plan is for a CPU; False if a CPU compiles in place of an accelerator.
        """
        options = None
        if jax.default_backend() == "cpu":
            options = _QUICK if cpu else _QUICK | _IN_LOOPS
        return self.program.lower(*self.args).compile(compiler_options=options)


@dataclass(frozen=True, kw_only=True)
class ByShapes:
    """A run of which only shapes exist.

    Attributes:
        params: `jax.ShapeDtypeStruct`s, with their shardings on a mesh.
        select: the parameters that are trained.
        batch_size: examples in a step.
        unit: the devices and the dynamics divide a batch size evenly if it is a multiple of this.
        steps: number of updates.
        count: updates in the longest dispatch.
        make: maps a batch size to the method and its batches.
        evaluation: the program that measures the parameters, with its largest batch; None if there
            is none, as for generated answers.
    """

    params: Params
    select: paths.Select
    batch_size: int
    unit: int
    steps: int
    count: int
    make: Callable[[int], tuple[Method, Batches]]
    evaluation: Call | None

    def dispatch(self, batch_size: int | None = None, count: int | None = None) -> Call:
        """Return the program of `count` steps (None: the longest dispatch) at a batch size."""
        method, batches = self.make(self.batch_size if batch_size is None else batch_size)
        program = Program(many_steps(method.step), moves=True, rows=1 + method.rows)
        state, length = self.state(method), self.count if count is None else count
        read = shapes_of(batches(0, length), mesh_of(state.params), 1 + method.rows)
        return Call(program, (state, read))

    def state(self, method: Method) -> TrainState:
        """Return the state of a method before its first step."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        if method.mesh is None:
            return TrainState(
                self.params, abstract(method.init, mesh_of(self.params), self.params, key)
            )
        params = with_places(self.params, param_shardings(self.params, method.mesh, WHOLE))
        # A method with its own mesh chooses the sharding of its state itself.
        places = jax.jit(method.init).lower(params, key).compile().output_shardings
        return TrainState(params, with_places(jax.eval_shape(method.init, params, key), places))


def shapes_of(batch: Batch, mesh: Mesh | None, axis: int = 0) -> Any:
    """Return a batch as shapes, sharded as on the mesh; `axis` is the axis of the rows."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    return shapes if mesh is None else with_places(shapes, batch_places(shapes, mesh, axis))


def finetuning(
    config: FinetuneConfig, *, base_dir: Path | None = None, mesh: Mesh | None = None
) -> ByShapes:
    """Return a run of `jaxlm.train.finetuning.finetune`, with the longest batches that it reads.

    If the model has no tokenizer, the data are not read: rows then have `max_length` tokens, or as
    many as the model takes.
    """
    lm = load_model(
        config.model, param_dtype=config.param_dtype, bits=config.bits, shapes_only=True
    )
    if lm.tokenizer is None:
        setting = build(config, lm, None, encoded=_unread(config, lm.config), mesh=mesh)
    else:
        setting = build(config, lm, read_data(config, base_dir=base_dir), mesh=mesh)
    config, lm, encoded = setting.config, setting.lm, setting.encoded
    options = encoded.num_options if isinstance(encoded, EncodedTask) else 0
    loss_fn = setting.loss_fn(np.zeros(options, np.float32) if config.calibrate else None)
    metric, evaluation = setting.metric(), None
    if not isinstance(metric, GenerationMetric):
        batch = _longest_scored(config, encoded)
        evaluation = Call(metric.scorer, (lm.params, shapes_of(batch, mesh))) if batch else None
    return ByShapes(
        params=lm.params,
        select=config.optimizer.select,
        batch_size=config.batch_size,
        unit=_unit(config, mesh),
        steps=config.steps,
        count=_dispatch(config),
        make=_maker(config, loss_fn, _longest(config, encoded), mesh),
        evaluation=evaluation,
    )


def pretraining(config: PretrainConfig, *, mesh: Mesh | None = None) -> ByShapes:
    """Return a run of `jaxlm.train.pretraining.pretrain`; its corpus is not read."""
    tokenizer = read_tokenizer(file_path(config.tokenizer, "tokenizer"))
    model = config.model.build(tokenizer)
    key = jax.eval_shape(lambda: jax.random.key(0))
    lm = LanguageModel(model, abstract(functools.partial(init_params, model), mesh, key), tokenizer)
    size, length = config.batch_size, config.seq_len
    windows = {
        "input_ids": np.zeros((1, size, length + 1), np.int32),
        "weights": np.zeros((1, size, length), np.float32),
    }
    held_out = Call(
        Program(total_nats(lm.log_probs), rows=1), (lm.params, shapes_of(windows, mesh, 1))
    )
    tail = {"input_ids": ((length + 1,), np.dtype(np.int32))}
    return ByShapes(
        params=lm.params,
        select=config.optimizer.select,
        batch_size=size,
        unit=_unit(config, mesh),
        steps=config.steps,
        count=_dispatch(config),
        make=_maker(config, lm_objective(lm.log_probs), tail, mesh),
        evaluation=held_out if config.corpus.held_out else None,
    )


def _dispatch(config: RunConfig) -> int:
    """Return the number of steps in the longest dispatch."""
    return max((count for _, count in config.dispatches(0)), default=0)


def _unit(config: RunConfig, mesh: Mesh | None) -> int:
    dynamics = config.dynamics
    parts = getattr(dynamics, "parts", getattr(dynamics, "workers", 1))
    return parts * (1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"])


def _maker(
    config: RunConfig, loss_fn: LossFn, tail: Tail, mesh: Mesh | None
) -> Callable[[int], tuple[Method, Batches]]:
    def make(batch_size: int) -> tuple[Method, Batches]:
        return method_and_batches(
            config.optimizer,
            config.dynamics,
            loss_fn,
            _source(tail),
            steps=config.steps,
            batch_size=batch_size,
            seed=config.seed,
            mesh=mesh,
        )

    return make


def _source(tail: Tail) -> Source:
    """Return batches of zeros, which take no memory until they are read."""

    def source(batch_size: int, seeds: Sequence[int]) -> Batches:
        def batches(first: int, count: int) -> Batch:
            del first
            rows = count, len(seeds), batch_size
            return {key: np.zeros((*rows, *shape), dtype) for key, (shape, dtype) in tail.items()}

        return batches

    return source


def _longest(config: FinetuneConfig, encoded: Encoded) -> Tail:
    """Return the shapes of the largest batch of the first epoch, which has the longest example."""
    epoch = -(-encoded.sizes["train"] // config.batch_size)
    best: dict[str, Any] = {}
    for first, count in config.dispatches(0):
        if first < epoch:
            found = encoded.streams(
                first, count, batch_size=config.batch_size, seeds=(config.seed,)
            )
            tails = {key: (value.shape[3:], value.dtype) for key, value in found.items()}
            best = max(best, tails, key=_bytes)
    return best


def _bytes(tails: Tail) -> int:
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in tails.values())


def _longest_scored(config: FinetuneConfig, encoded: Encoded) -> Batch:
    """Return the largest batch that is scored."""
    best: Batch = {}
    for split in ("test", "validation", *(("train",) if config.calibrate else ())):
        for batch in encoded.eval_batches(split, batch_size=config.eval_batch_size):
            del batch["index"]
            best = max(best, batch, key=lambda each: sum(x.nbytes for x in each.values()))
    return best


def _unread(config: FinetuneConfig, model: ModelConfig) -> Encoded:
    """Return data of one example of the largest length, whose options have one token each."""
    given = config.data.max_length
    if config.objective is not None and config.objective.batches == "generation":
        raise UserError(
            f"objective: {config.objective.name} generates answers, but {config.model} has no "
            f"tokenizer (got {config.objective.name}). Add it."
        )
    if given is None and model.max_positions > LONG:
        raise UserError(
            f"{config.form}.max_length: is needed, since {config.model} has no tokenizer to encode "
            f"texts and takes up to {model.max_positions:,} tokens (got null). Give the length of "
            "a long text in tokens."
        )
    length = min(given or model.max_positions, model.max_positions)
    if config.task is None:
        row = TokenRow("", (0,) * length, tuple(range(1, length)))
        splits = {"train": [row], "validation": [], "test": [row]}
        return EncodedRows.pad(splits, pad_id=0, key=config.form)
    targets = config.task.answer_length if config.task.is_generative else 1
    length -= targets if config.task.is_generative else 0
    labels = config.task.labels or ("first", "second")
    example = EncodedExample(0, ((0,) * length,), ((length - 1,) * targets,), ())
    return EncodedTask(
        labels=labels,
        token_ids=np.arange(len(labels), dtype=np.int32),
        pad_id=0,
        buckets=(length,),
        train=(example,),
        validation=(),
        test=(example,),
        objective=config.task.objective or "classification",
    )

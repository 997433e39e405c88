"""The model, state and programs of a run as shapes, without weights."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.artifacts.files import file_path
from jaxlm.core.errors import UserError
from jaxlm.data import EncodedTask, TaskConfig
from jaxlm.data.corpus import read_tokenizer
from jaxlm.data.encoding import Encoded as EncodedExample
from jaxlm.evaluation.perplexity import total_nats
from jaxlm.models import LanguageModel, ModelConfig, init_params
from jaxlm.sharding import WHOLE, abstract, mesh_of, param_shardings
from jaxlm.sharding.placement import batch_places, with_places
from jaxlm.train.dynamics import Batches, method_and_batches
from jaxlm.train.finetuning import FinetuneConfig, build, read_data
from jaxlm.train.load import load_model
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

        With `cpu` False, a CPU compiles in place of an accelerator.
        """
        options = None
        if jax.default_backend() == "cpu":
            options = _QUICK if cpu else _QUICK | _IN_LOOPS
        return self.program.lower(*self.args).compile(compiler_options=options)


@dataclass(frozen=True, kw_only=True)
class ByShapes:
    """A run of which only shapes exist.

    Attributes:
        config: the run, with `steps` and `optimizer.select` filled in.
        params: `jax.ShapeDtypeStruct`s, with their shardings on a mesh.
        loss_fn: the loss of a batch.
        tail: an example of the longest batch.
        mesh: mesh of the parameters; None for one device.
        evaluation: the program that measures the parameters, with its largest batch; None if there
            is none, as for generated answers.
    """

    config: RunConfig
    params: Params
    loss_fn: LossFn
    tail: Tail
    mesh: Mesh | None
    evaluation: Call | None

    @property
    def count(self) -> int:
        """Number of updates in the longest dispatch."""
        return max((count for _, count in self.config.dispatches(0)), default=0)

    @property
    def unit(self) -> int:
        """The devices, the dynamics and `accumulate` divide the multiples of this evenly."""
        dynamics = self.config.dynamics
        parts = getattr(dynamics, "parts", getattr(dynamics, "workers", 1))
        devices = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return parts * self.config.accumulate * devices

    def make(self, batch_size: int) -> tuple[Method, Batches]:
        """Return the method and its batches, of zeros that take no memory until they are read."""

        def source(batch_size: int, seeds: Sequence[int]) -> Batches:
            def batches(first: int, count: int) -> Batch:
                del first
                rows = count, len(seeds), batch_size
                return {key: np.zeros((*rows, *s), dtype) for key, (s, dtype) in self.tail.items()}

            return batches

        return method_and_batches(
            self.config.optimizer,
            self.config.dynamics,
            self.loss_fn,
            source,
            steps=self.config.steps,
            batch_size=batch_size,
            seed=self.config.seed,
            mesh=self.mesh,
        )

    def dispatch(self, batch_size: int | None = None) -> Call:
        """Return the program of the longest dispatch at a batch size."""
        method, batches = self.make(self.config.batch_size if batch_size is None else batch_size)
        program = Program(many_steps(method.step), moves=True, rows=1 + method.rows)
        state = self.state(method)
        read = shapes_of(batches(0, self.count), mesh_of(state.params), 1 + method.rows)
        return Call(program, (state, read))

    def state(self, method: Method) -> TrainState:
        """Return the state of a method before its first step."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        if method.mesh is None:
            return TrainState(self.params, abstract(method.init, self.mesh, self.params, key))
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
        if config.epochs is not None:
            raise UserError(
                f"epochs: {config.model} has no tokenizer to count rows with (got "
                f"{config.epochs}). Give steps for the dry run."
            )
        setting = build(config, lm, None, encoded=_unread(config, lm.config), mesh=mesh)
    else:
        setting = build(config, lm, read_data(config, base_dir=base_dir), mesh=mesh)
    config, lm, encoded = setting.config, setting.lm, setting.encoded
    options = encoded.num_options if isinstance(encoded, EncodedTask) else 0
    metric, evaluation = setting.metric(), None
    if not isinstance(metric, GenerationMetric):
        batch = _longest_scored(config, encoded)
        evaluation = Call(metric.scorer, (lm.params, shapes_of(batch, mesh))) if batch else None
    return ByShapes(
        config=config,
        params=lm.params,
        loss_fn=setting.loss_fn(np.zeros(options, np.float32) if config.calibrate else None),
        tail=_longest(config, encoded),
        mesh=mesh,
        evaluation=evaluation,
    )


def pretraining(config: PretrainConfig, *, mesh: Mesh | None = None) -> ByShapes:
    """Return a run of `jaxlm.train.pretraining.pretrain`; its corpus is not read."""
    tokenizer = read_tokenizer(file_path(config.tokenizer, "tokenizer"))
    model = config.model_config(tokenizer)
    key = jax.eval_shape(lambda: jax.random.key(0))
    lm = LanguageModel(model, abstract(functools.partial(init_params, model), mesh, key), tokenizer)
    size, length = config.batch_size, config.seq_len
    evaluation = None
    if config.corpus.held_out:
        windows = {
            "input_ids": np.zeros((1, size, length + 1), np.int32),
            "weights": np.zeros((1, size, length), np.float32),
        }
        program = Program(total_nats(lm.log_probs), rows=1)
        evaluation = Call(program, (lm.params, shapes_of(windows, mesh, 1)))
    return ByShapes(
        config=config,
        params=lm.params,
        loss_fn=config.loss_fn(lm),
        tail={"input_ids": ((length + 1,), np.dtype(np.int32))},
        mesh=mesh,
        evaluation=evaluation,
    )


def _longest(config: FinetuneConfig, encoded: Encoded) -> Tail:
    """Return the shapes of the largest batch of the first epoch, which has the longest example."""
    epoch = -(-encoded.sizes["train"] // config.batch_size)
    options: dict[str, Any] = {"batch_size": config.batch_size, "seeds": (config.seed,)}
    read = (  # one at a time: an epoch may not fit into memory
        encoded.streams(first, count, **options)
        for first, count in config.dispatches(0)
        if first < epoch
    )
    tails = ({key: (x.shape[3:], x.dtype) for key, x in batch.items()} for batch in read)
    return max(tails, key=_bytes, default={})


def _bytes(tails: Tail) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tails.values())


def _longest_scored(config: FinetuneConfig, encoded: Encoded) -> Batch:
    """Return the largest batch that is scored."""
    best: Batch = {}
    for split in ("test", "validation", *(("train",) if config.calibrate else ())):
        for batch in encoded.eval_batches(split, batch_size=config.eval_batch_size):
            del batch["index"]
            best = max(best, batch, key=lambda batch: sum(x.nbytes for x in batch.values()))
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
    task = config.data
    if not isinstance(task, TaskConfig):
        return task.unread(length)
    targets = task.answer_length if task.is_generative else 1
    length -= targets if task.is_generative else 0
    labels = task.labels or ("first", "second")
    example = EncodedExample(0, ((0,) * length,), ((length - 1,) * targets,), ())
    return EncodedTask(
        labels=labels,
        token_ids=np.arange(len(labels), dtype=np.int32),
        pad_id=0,
        buckets=(length,),
        train=(example,),
        validation=(),
        test=(example,),
        objective=task.objective or "classification",
    )

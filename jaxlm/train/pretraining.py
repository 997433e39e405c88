"""Pretraining from a configuration to a model in the Hugging Face layout."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.core.errors import UserError
from jaxlm.data import corpus as corpora
from jaxlm.evaluation.perplexity import perplexity
from jaxlm.models import LanguageModel, ModelConfig, init_params, save_pretrained
from jaxlm.sharding import on_mesh
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.dynamics import (
    DYNAMICS,
    NOISE_INFO,
    Batches,
    Dynamics,
    Source,
    method_and_batches,
)
from jaxlm.train.logging import Progress
from jaxlm.train.loop import Diverged
from jaxlm.train.objective import lm_objective
from jaxlm.train.optimizers import OPTIMIZERS, FirstOrder
from jaxlm.train.run_folder import RunFolder, to_dict
from jaxlm.train.state import Method, Program, free, many_steps
from jaxlm.typing import Batch, Params

_FIRST_ORDER = {name: cls for name, cls in OPTIMIZERS.items() if issubclass(cls, FirstOrder)}
_STYLES: dict[str, dict[str, Any]] = {
    "llama": {
        "activation": "silu",
        "gated_mlp": True,
        "norm": "rmsnorm",
        "norm_eps": 1e-6,
        "positions": "rotary",
        "attention_bias": False,
        "output_bias": False,
        "mlp_bias": False,
    },
    "gpt2": {"activation": "gelu_tanh"},
}


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """The sizes of a decoder; its other choices are those of its family.

    Attributes:
        family: llama or gpt2.
        hidden_size: an even multiple of `num_heads`.
        num_layers: transformer blocks.
        num_heads: attention heads.
        intermediate_size: width inside the MLPs.
        max_positions: longest sequence.
        tie_embeddings: one table for the tokens and the head.
    """

    family: Literal["llama", "gpt2"] = "llama"
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions")
        _check_positive(self, *sizes)
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"hidden_size is {self.hidden_size}: give an even multiple of num_heads, "
                f"{self.num_heads}."
            )

    def build(self, tokenizer: Any) -> ModelConfig:
        """The whole configuration, for the vocabulary of `tokenizer`."""
        return ModelConfig(
            **asdict(self),
            **_STYLES[self.family],
            kind="decoder",
            head="lm",
            vocab_size=len(tokenizer),
            embedding_size=self.hidden_size,
            num_kv_heads=self.num_heads,
            head_size=self.hidden_size // self.num_heads,
            bos_id=tokenizer.bos_token_id,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
        )


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the text is, and the domains with their shares.

    Attributes:
        path: folder of `<domain>.jsonl[.gz]` files.
        domains: see `jaxlm.data.corpus.Domain`.
        held_out: domain of `path` to measure bits per byte on, and not among `domains`; or null.
    """

    path: str
    domains: tuple[corpora.Domain, ...]
    held_out: str | None = None


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pretraining run.

    Attributes:
        model: sizes; the vocabulary is the tokenizer's.
        tokenizer: folder with a tokenizer.json.
        corpus: the text.
        optimizer: a first-order one of `jaxlm.train.optimizers.OPTIMIZERS`, by its name.
        dynamics: what becomes of its steps, one of `jaxlm.train.dynamics.DYNAMICS` by its name.
        steps: updates in all.
        batch_size: windows in a step.
        seq_len: predicted tokens in a window.
        seed: of the initial parameters and the order of the text.
        log_every: steps over which a line of metrics.jsonl takes the mean of the loss.
        eval_every: steps between measurements on held-out text, a multiple of `log_every`.
        checkpoint_every: steps between checkpoints, a multiple of `log_every`.
        output: the run's folder.
    """

    model: DecoderSizes
    tokenizer: str
    corpus: CorpusConfig
    optimizer: FirstOrder = field(metadata={"registry": _FIRST_ORDER})
    dynamics: Dynamics | None = field(default=None, metadata={"registry": DYNAMICS})
    steps: int
    batch_size: int = 32
    seq_len: int = 128
    seed: int = 0
    log_every: int = 20
    eval_every: int = 200
    checkpoint_every: int = 200
    output: str

    def __post_init__(self) -> None:
        every = ("eval_every", "checkpoint_every")
        _check_positive(self, "steps", "batch_size", "seq_len", "log_every", *every)
        for name in every:
            if getattr(self, name) % self.log_every:
                raise UserError(
                    f"{name} is {getattr(self, name)}: give a multiple of log_every, "
                    f"{self.log_every}."
                )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: give a number from 0 to 2**32 - 1.")
        if self.dynamics is not None:
            self.dynamics.check(self.optimizer, self.batch_size)
        if self.seq_len > self.model.max_positions:
            raise UserError(
                f"seq_len is {self.seq_len}: give at most model.max_positions, "
                f"{self.model.max_positions}."
            )


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}: give 1 or more.")


def pretrain(config: PretrainConfig, *, mesh: Mesh | None = None) -> dict[str, Any]:
    """Runs `config` in its folder, goes on with it, or returns the summary of the finished run.

    Args:
        config: the run.
        mesh: of `jaxlm.sharding.make_mesh`; None for one device.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: see `jaxlm.data.corpus` and `RunFolder.check`; the loss is not finite.
    """
    folder = RunFolder(config.output)
    folder.check(config)
    summary = folder.summary()
    if summary is not None:
        return summary
    tokenizer = corpora.read_tokenizer(Path(config.tokenizer))
    model = config.model.build(tokenizer)
    init, key = functools.partial(init_params, model), jax.random.key(config.seed)
    params = init(key) if mesh is None else on_mesh(init, mesh, key)
    lm = LanguageModel(model, params, tokenizer)
    source = Path(config.corpus.path)
    paths = [corpora.find(source, domain.name) for domain in config.corpus.domains]
    apart = corpora.find(source, config.corpus.held_out) if config.corpus.held_out else None

    folder.create(config)
    cache = folder.path / "tokens"
    tokens = [corpora.cached(path, tokenizer, cache) for path in paths]
    chosen, batches = method_and_batches(
        config.optimizer,
        config.dynamics,
        lm_objective(lm.log_probs),
        _source(config, tokens),
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
        mesh=mesh,
    )
    measure = None
    if apart is not None:
        held_out = corpora.cached(apart, tokenizer, cache / "held_out")
        measure = perplexity(
            lm.log_probs,
            corpora.all_windows(held_out, config.seq_len),
            held_out.size,
            batch_size=config.batch_size,
        )
    summary = _train(config, folder, lm, chosen, batches, measure)
    folder.finish(summary)
    return summary


def _source(config: PretrainConfig, tokens: Sequence[corpora.Tokens]) -> Source:
    def source(batch_size: int, seeds: Sequence[int]) -> Batches:
        streams = [
            corpora.Windows(
                tokens,
                config.corpus.domains,
                steps=config.steps,
                batch_size=batch_size,
                seq_len=config.seq_len,
                seed=seed,
            )
            for seed in seeds
        ]

        def batches(first: int, count: int) -> Batch:
            rows = [
                [stream.batch(step)["input_ids"] for stream in streams]
                for step in range(first, first + count)
            ]
            return {"input_ids": np.array(rows)}

        return batches

    return source


def _train(
    config: PretrainConfig,
    folder: RunFolder,
    lm: LanguageModel,
    way: Method,
    batches: Batches,
    measure: Callable[[Params], dict[str, float]] | None,
) -> dict[str, Any]:
    run = Program(many_steps(way.step), moves=True, rows=1 + way.rows)
    state = way.start(lm.params, jax.random.key(config.seed))
    checkpoints = Checkpoints(folder.checkpoints)
    restored = checkpoints.restore(state, donate=True)
    first, seconds, stepping = 0, 0.0, 0.0
    if restored is not None:
        first, state, record = restored
        free(lm.params, keep=state)
        seconds, stepping = record["seconds"], record.get("stepping", 0.0)
    folder.metrics.cut(first)
    row: dict[str, Any] = folder.metrics.read()[-1] if first else {}

    begin = time.perf_counter() - seconds
    with Progress(config.steps, start=first, log=folder.log) as progress:
        for done in range(first, config.steps, config.log_every):
            count = min(config.log_every, config.steps - done)
            started, compiled = time.perf_counter(), run.compile_seconds
            state, infos = run(state, batches(done, count))
            infos, step = jax.device_get(infos), done + count
            stepping += time.perf_counter() - started - (run.compile_seconds - compiled)
            loss = float(np.mean(infos["loss"]))
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at step {step}: lower the learning rate.")
            row = {"step": step, "loss": loss, "tokens": step * config.batch_size * config.seq_len}
            row |= {name: float(infos[name][-1]) for name in NOISE_INFO if name in infos}
            last = step == config.steps
            if measure and (last or step % config.eval_every == 0):
                row |= {f"held_out_{name}": value for name, value in measure(state.params).items()}
            seconds = time.perf_counter() - begin
            folder.metrics.append(row | {"seconds": round(seconds, 1)})
            progress.update(step, {k: v for k, v in row.items() if k not in ("step", "tokens")})
            if last or step % config.checkpoint_every == 0:
                checkpoints.save(step, state, {"seconds": seconds, "stepping": stepping})
    checkpoints.close()
    save_pretrained(lm, folder.path / "model", state.params)
    return {
        **{name: value for name, value in row.items() if name not in ("step", "seconds")},
        "steps": config.steps,
        "seconds": round(seconds, 1),
        "goodput": stepping / seconds,
        "peak_memory_bytes": run.peak_bytes,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "dynamics": config.dynamics
        and config.dynamics.report(config.optimizer, config.steps, state.opt_state),
        "model": str(folder.path / "model"),
        "config": to_dict(config),
    }

"""Pretraining from a configuration to a model in the Hugging Face layout."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm.artifacts.files import file_path
from jaxlm.artifacts.stopping import defer_signals, pending_signal
from jaxlm.core.checks import one_of, seeds, whole
from jaxlm.core.errors import UserError
from jaxlm.core.precision import quantize
from jaxlm.data import corpus as corpora
from jaxlm.evaluation.perplexity import perplexity
from jaxlm.models import (
    LanguageModel,
    ModelConfig,
    from_pretrained,
    init_params,
    save_pretrained,
)
from jaxlm.sharding import on_mesh, place_params
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
from jaxlm.train.loop import Diverged, stopped, watch
from jaxlm.train.objective import lm_objective
from jaxlm.train.optimizers import OPTIMIZERS, FirstOrder
from jaxlm.train.run_folder import RunFolder, to_dict
from jaxlm.train.settings import MOST_ROWS, MOST_STEPS
from jaxlm.train.state import Method, Program, TrainState, free, many_steps
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
        one_of("model.family", self.family, tuple(_STYLES))
        whole(self, "num_layers", "num_heads", most=2**14, section="model.")
        sizes = "hidden_size", "intermediate_size", "max_positions"
        whole(self, *sizes, most=2**24, section="model.")
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"model.hidden_size: must be an even multiple of num_heads, {self.num_heads} (got "
                f"{self.hidden_size}). Correct it."
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

    def __post_init__(self) -> None:
        corpora.check_domains(self.domains, self.held_out)


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
        whole(self, "steps", "log_every", *every, most=MOST_STEPS)
        whole(self, "batch_size", most=MOST_ROWS)
        whole(self, "seq_len")
        seeds(self, "seed")
        for name in every:
            if getattr(self, name) % self.log_every:
                raise UserError(
                    f"{name}: must be a multiple of log_every, {self.log_every} (got "
                    f"{getattr(self, name)}). Correct it."
                )
        if self.dynamics is not None:
            self.dynamics.check(self.optimizer, self.batch_size)
        if self.seq_len > self.model.max_positions:
            raise UserError(
                f"seq_len: must be at most model.max_positions, {self.model.max_positions} (got "
                f"{self.seq_len}). Correct it."
            )


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
    if (summary := _finished(folder)) is not None:
        return summary
    with folder.held(config):
        return _finished(folder) or _pretrain(config, folder, mesh)


def _finished(folder: RunFolder) -> dict[str, Any] | None:
    """The summary of a finished run, or None."""
    numbers = dict.fromkeys(("steps", "tokens", "parameters"), int)
    return folder.summary(loss=float, seconds=float, config=dict, model=str, **numbers)


def _pretrain(config: PretrainConfig, folder: RunFolder, mesh: Mesh | None) -> dict[str, Any]:
    tokenizer = corpora.read_tokenizer(file_path(config.tokenizer, "tokenizer"))
    model = config.model.build(tokenizer)
    source = file_path(config.corpus.path, "corpus.path")
    paths = [corpora.find(source, domain.name) for domain in config.corpus.domains]
    apart = corpora.find(source, config.corpus.held_out) if config.corpus.held_out else None
    cache = folder.path / "tokens"
    every = paths if apart is None else [*paths, apart]
    digests = {str(path): corpora.source_digest(path, tokenizer) for path in every}
    folder.check_data(digests)
    tokens = [corpora.cached(path, tokenizer, cache, digests[str(path)]) for path in paths]
    held_out = None
    if apart is not None:
        held_out = corpora.cached(apart, tokenizer, cache / "held_out", digests[str(apart)])
    init, key = functools.partial(init_params, model), jax.random.key(config.seed)
    params = init(key) if mesh is None else on_mesh(init, mesh, key)
    lm = LanguageModel(model, params, tokenizer)
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
    if held_out is not None:
        measure = perplexity(
            lm.log_probs,
            corpora.all_windows(held_out, config.seq_len),
            held_out.size,
            batch_size=config.batch_size,
        )
    with defer_signals():
        summary = _train(config, folder, lm, chosen, batches, measure)
    folder.finish(summary)
    return summary


def trained_model(
    folder: RunFolder,
    *,
    param_dtype: str = "float32",
    bits: Literal[8, 4] | None = None,
    mesh: Mesh | None = None,
) -> LanguageModel:
    """The model of a run as it is: that in its folder `model`, or else of its last checkpoint.

    Args:
        folder: of the run.
        param_dtype, bits, mesh: see `jaxlm.from_pretrained`.

    Raises:
        UserError: the run has no checkpoint yet, or is not one of `pretrain`.
    """
    made = folder.path / "model"
    if _finished(folder) is not None and made.is_dir():
        return from_pretrained(made, param_dtype=param_dtype, bits=bits, mesh=mesh)
    lm = untrained_model(folder)
    params = None
    if folder.checkpoints.is_dir():
        params = Checkpoints(folder.checkpoints, read_only=True).best_params()
    if params is None:
        raise UserError(f"{folder.path}: the run has no checkpoint yet. Start it again.")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, param_dtype), params)
    params = params if bits is None else quantize(params, bits=bits)
    return lm.replace(params=params if mesh is None else place_params(params, mesh))


def untrained_model(folder: RunFolder) -> LanguageModel:
    """The model of a run without its parameters.

    Raises:
        UserError: `config.yaml` is not of such a run, or the tokenizer is not there.
    """
    stored = folder.config() or {}
    try:
        sizes = DecoderSizes(**stored["model"])
        tokenizer = corpora.read_tokenizer(file_path(stored["tokenizer"], "tokenizer"))
    except (KeyError, TypeError):
        raise folder.foreign() from None
    return LanguageModel(sizes.build(tokenizer), None, tokenizer)


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


class _Record(NamedTuple):
    """What a checkpoint holds beside the state; see `jaxlm.train.loop.Record`.

    Attributes:
        row: the last line of the metrics.
        best_step: where the run diverged, the step of the last checkpoint before.
    """

    seconds: float = 0.0
    stepping: float = 0.0
    first_loss: float | None = None
    diverged: int | None = None
    row: dict[str, Any] | None = None
    best_step: int | None = None


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
    first, record = 0, _Record()
    if restored is not None:
        first, state, saved = restored
        free(lm.params, keep=state)
        record = _Record(**saved)
    folder.metrics.cut(first)

    begin, saved_at = time.perf_counter() - record.seconds, first
    chance = math.log(lm.config.vocab_size)

    def save(step: int, state: TrainState) -> None:
        checkpoints.save(step, state, record._asdict())

    with Progress(config.steps, start=first, log=folder.log) as progress:
        progress.say(f"start from step {first}" if first else f"start {folder.path}")
        if first < config.steps:
            progress.say("compiling the steps")
        for done in range(first, config.steps, config.log_every):
            if signal := pending_signal():
                if saved_at != done:
                    save(done, state)
                raise stopped(signal, done, config.steps, kept=done > 0)
            count = min(config.log_every, config.steps - done)
            started, compiled = time.perf_counter(), run.compile_seconds
            state, infos = run(state, batches(done, count))
            infos, step = jax.device_get(infos), done + count
            stepping = time.perf_counter() - started - (run.compile_seconds - compiled)
            loss = float(np.mean(infos["loss"]))
            if not math.isfinite(loss):
                raise Diverged(
                    f"optimizer.learning_rate: the loss is {loss} at step {step} (got "
                    f"{config.optimizer.learning_rate:g}). Lower it."
                )
            row = {"step": step, "loss": loss, "tokens": step * config.batch_size * config.seq_len}
            row |= {name: float(infos[name][-1]) for name in NOISE_INFO if name in infos}
            sound = record.diverged is None
            record = watch(record, infos["loss"], done, chance, progress)
            if sound and record.diverged is not None and saved_at:
                record = record._replace(best_step=saved_at)
            row |= {} if record.diverged is None else {"diverged_since": record.diverged}
            last = step == config.steps
            if measure and (last or step % config.eval_every == 0):
                row |= {f"held_out_{name}": value for name, value in measure(state.params).items()}
            record = record._replace(
                seconds=time.perf_counter() - begin, stepping=record.stepping + stepping, row=row
            )
            folder.metrics.append(row | {"seconds": round(record.seconds, 1)})
            progress.update(step, {k: v for k, v in row.items() if k not in ("step", "tokens")})
            if last or step % config.checkpoint_every == 0:
                save(step, state)
                saved_at = step
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    dynamics = config.dynamics and config.dynamics.report(
        config.optimizer, config.steps, state.opt_state
    )
    params = state.params
    if record.best_step is not None:
        params = checkpoints.in_place_of(state, record.best_step)
    save_pretrained(lm, folder.path / "model", params)
    return {
        **{name: value for name, value in (record.row or {}).items() if name != "step"},
        "diverged_since": record.diverged,
        "steps": config.steps,
        "seconds": round(record.seconds, 1),
        "goodput": record.stepping / record.seconds,
        "peak_memory_bytes": run.peak_bytes,
        "parameters": size,
        "tested_step": config.steps if record.best_step is None else record.best_step,
        "dynamics": dynamics,
        "model": str(folder.path / "model"),
        "config": to_dict(config),
    }

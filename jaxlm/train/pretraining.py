"""Pretraining from a configuration to a model in the Hugging Face layout."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.artifacts.files import absolute, file_path
from jaxlm.core.checks import one_of, whole
from jaxlm.core.errors import UserError
from jaxlm.data import corpus as corpora
from jaxlm.evaluation.perplexity import perplexity
from jaxlm.models import LanguageModel, ModelConfig, init_params, save_pretrained
from jaxlm.sharding import on_mesh
from jaxlm.train.dynamics import Batches, Source
from jaxlm.train.logging import Progress
from jaxlm.train.losses import accumulate, lm_objective, num_targets
from jaxlm.train.run import RunConfig, finished_or_run, train
from jaxlm.train.run_folder import Digest, RunFolder
from jaxlm.train.settings import MOST_STEPS
from jaxlm.typing import Batch, LossFn, Params

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
    """The sizes of a decoder; its family determines the rest of the architecture.

    Attributes:
        family: llama or gpt2.
        hidden_size: an even multiple of `num_heads`.
        num_layers: transformer blocks.
        num_heads: attention heads.
        intermediate_size: width inside the MLPs.
        max_positions: longest sequence.
        tie_embeddings: share one table between the token embedding and the head.
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
        """Return the whole configuration, for the vocabulary of `tokenizer`."""
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
        held_out: domain of `path`, not in `domains`, to measure bits per byte on; or null.
    """

    path: str
    domains: tuple[corpora.Domain, ...]
    held_out: str | None = None

    def __post_init__(self) -> None:
        corpora.check_domains(self.domains, self.held_out)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """A pretraining run: the keys of `RunConfig` and those below.

    Attributes:
        model: sizes; the vocabulary is the tokenizer's.
        tokenizer: folder with a tokenizer.json.
        corpus: the text.
        seq_len: predicted tokens in a row.
    """

    model: DecoderSizes
    tokenizer: str
    corpus: CorpusConfig
    batch_size: int = 32
    seq_len: int = 128
    log_every: int = 20
    eval_every: int = 200
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "steps", most=MOST_STEPS)
        whole(self, "seq_len")
        if self.seq_len > self.model.max_positions:
            raise UserError(
                f"seq_len: must be at most model.max_positions, {self.model.max_positions} (got "
                f"{self.seq_len}). Correct it."
            )
        if self.patience is not None and self.corpus.held_out is None:
            raise UserError(
                f"patience: counts evaluations, and there is no held-out text (got "
                f"{self.patience}). Give corpus.held_out, or leave it out."
            )

    def model_config(self, tokenizer: Any) -> ModelConfig:
        """Return the architecture, for the vocabulary of `tokenizer`."""
        choices = {"compute_dtype": self.compute_dtype, "remat": self.remat}
        return self.model.build(tokenizer).replace(**choices)

    def loss_fn(self, lm: LanguageModel) -> LossFn:
        """Return the loss of a batch."""
        loss_fn = lm_objective(lm.log_probs)
        if self.accumulate == 1:
            return loss_fn
        return accumulate(loss_fn, self.accumulate, share=num_targets)


def pretrain(config: PretrainConfig, *, mesh: Mesh | None = None) -> dict[str, Any]:
    """Run `config` in its folder, resume it, or return the summary; see `jaxlm.pretrain`."""
    corpus = config.corpus
    stored = replace(
        config,
        corpus=replace(corpus, path=absolute(corpus.path, "corpus.path")),
        tokenizer=absolute(config.tokenizer, "tokenizer"),
    )

    def prepare() -> tuple[dict[str, Digest], Callable[[RunFolder], dict[str, Any]]]:
        tokenizer = corpora.read_tokenizer(file_path(config.tokenizer, "tokenizer"))
        names = [domain.name for domain in corpus.domains]
        names += [] if corpus.held_out is None else [corpus.held_out]
        root = file_path(corpus.path, "corpus.path")
        files = {name: corpora.find(root, name) for name in names}
        digests = {
            f"corpus.{name}": Digest(str(file), corpora.source_digest(file, tokenizer))
            for name, file in files.items()
        }
        return digests, functools.partial(_pretrain, config, mesh, tokenizer, digests)

    return finished_or_run(stored, prepare, loss=float, tokens=int, parameters=int)


def _pretrain(
    config: PretrainConfig,
    mesh: Mesh | None,
    tokenizer: Any,
    digests: Mapping[str, Digest],
    folder: RunFolder,
) -> dict[str, Any]:
    def read(domain: str, cache: Any) -> corpora.Tokens:
        file, sha256 = digests[f"corpus.{domain}"]
        return corpora.cached(Path(file), tokenizer, cache, sha256)

    cache, apart = folder.path / "tokens", config.corpus.held_out
    tokens = [read(domain.name, cache) for domain in config.corpus.domains]
    model = config.model_config(tokenizer)
    init, key = functools.partial(init_params, model), jax.random.key(config.seed)
    lm = LanguageModel(model, init(key) if mesh is None else on_mesh(init, mesh, key), tokenizer)
    size = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    evaluate = None
    if apart is not None:
        text = read(apart, cache / "held_out")
        windows = corpora.all_windows(text, config.seq_len)
        measure = perplexity(lm.log_probs, windows, text.size, batch_size=config.batch_size)

        def evaluate(params: Params) -> dict[str, float]:
            return {f"held_out_{name}": value for name, value in measure(params).items()}

    start = folder.resume()
    with Progress(config.steps, start=start or 0, log=folder.log) as progress:
        progress.say(f"start from step {start}" if start else f"start {folder.path}")
        trained = train(
            config,
            lm,
            config.loss_fn(lm),
            _source(config, tokens),
            folder,
            progress,
            evaluate=evaluate,
            # Without patience the last parameters are the model, not the best ones.
            monitor=None if config.patience is None else "held_out_loss",
            mode="min",
            chance=math.log(model.vocab_size),
        )
    save_pretrained(lm, folder.path / "model", trained.params)
    steps = trained.summary["steps"]
    return {
        **_measured(config, folder, steps, trained.summary["tested_step"]),
        **trained.summary,
        "tokens": steps * config.batch_size * config.seq_len,
        "parameters": size,
        "model": str(folder.path / "model"),
    }


def _measured(
    config: PretrainConfig, folder: RunFolder, steps: int, tested_step: int
) -> dict[str, float]:
    """Return the mean loss of the last `log_every` steps and the result's held-out measurements."""
    rows = folder.metrics.read()
    first = steps - config.log_every
    losses = [row["loss"] for row in rows if "loss" in row and row["step"] > first]
    measured = {
        name: value
        for row in rows
        for name, value in row.items()
        if name.startswith("held") and row["step"] <= tested_step
    }
    return {"loss": float(np.mean(losses)), **measured}


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

"""Where the probability goes when a model is trained on a single pair of one-token answers.

Every pair is trained on alone, from the same model. The two answers are predicted by the same
hidden state, so their CHES is 0 and orders nothing: what counts is how alike the rows of the two
tokens in the output embedding are, and which other rows they point to.
"""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from jaxlm import preference
from jaxlm.artifacts.files import file_path
from jaxlm.core.checks import real, show, whole
from jaxlm.core.errors import UserError
from jaxlm.data.rows import pad, round_up, tokenizer_of
from jaxlm.models import LanguageModel
from jaxlm.models.chat_template import render_chat
from jaxlm.preference import PairScores
from jaxlm.studies.figures import new_axes, save_figure
from jaxlm.studies.grid import Result, Say
from jaxlm.studies.tables import aligned
from jaxlm.train.load import load_model
from jaxlm.train.optimizers import OPTIMIZERS, FirstOrder, Optimizer
from jaxlm.typing import Params


@dataclass(frozen=True, kw_only=True)
class OneTokenPair:
    """A message of the user, and two answers of one token each."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True)
class OneTokenConfig:
    """The configuration of the study.

    Attributes:
        model: folder or hub id of a model with a chat template.
        pairs: each is trained on alone; all parameters are trained.
        loss: one of `jaxlm.preference.LOSSES`.
        beta: of the loss; null for its own.
        optimizer: one with gradients.
        steps: of each pair.
        sft_steps: steps on the chosen answer alone that come first.
        top: number of tokens to list that gained most probability.
        output: folder of the study.
    """

    model: str
    pairs: tuple[OneTokenPair, ...]
    loss: str = "dpo"
    beta: float | None = None
    optimizer: Optimizer = field(
        default=OPTIMIZERS["rmsprop"](learning_rate=1e-6), metadata={"registry": OPTIMIZERS}
    )
    steps: int = 30
    sft_steps: int = 0
    top: int = 3
    output: str

    study: ClassVar[str] = "one_token"

    def __post_init__(self):
        if not self.pairs:
            raise UserError("pairs: is empty (got nothing). Give at least one.")
        if not isinstance(self.optimizer, FirstOrder):
            raise UserError(
                f"optimizer.name: has no gradients (got {self.optimizer.name}). Give rmsprop."
            )
        preference.terms(self.loss)
        real("beta", self.beta, above=0)
        whole(self, "steps", "top")
        whole(self, "sft_steps", least=0)
        object.__setattr__(self, "output", str(file_path(self.output, "output")))


class Trace(NamedTuple):
    """What training did to one pair.

    Attributes:
        log_probs: of the chosen and the rejected token before each step and at the end.
        loss: at the same steps.
        gain: what each token of the vocabulary gained in probability.
    """

    log_probs: Float[np.ndarray, "steps 2"]
    loss: Float[np.ndarray, " steps"]
    gain: Float[np.ndarray, " V"]


def outline(config: OneTokenConfig, where: str, plan_flags: Any) -> str:
    """Return a line for each pair."""
    lines = (f"{each.chosen} over {each.rejected}: {each.prompt}" for each in config.pairs)
    return "\n".join(f"{config.steps} steps, {line}" for line in lines)


def run(
    config: OneTokenConfig, folder: Path, where: str, *, mesh: Mesh | None = None, say: Say = print
) -> Result:
    """Train on each pair; see `jaxlm.studies.study`."""
    lm = load_model(config.model, mesh=mesh)
    encoded = [_encode(lm, each) for each in config.pairs]
    length = round_up(max(len(ids) for ids, _ in encoded))
    traces = traced(config, lm, encoded, length, say)
    rows = [_row(lm, *each, config.top) for each in zip(config.pairs, traces, strict=True)]
    figure = draw(config.pairs, traces, folder / "probabilities.png")
    return Result({"rows": rows}, markdown(rows), (figure,))


def _encode(lm: LanguageModel, pair: OneTokenPair) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt and those of the two answers."""
    tokenizer = tokenizer_of(lm)
    message = {"role": "user", "content": pair.prompt}
    text = render_chat(tokenizer, [message], add_generation_prompt=True)
    answers = []
    for name in ("chosen", "rejected"):
        answer = getattr(pair, name)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(
                f"pairs.{name}: must be one token (got {show(answer)}, {len(ids)} tokens). Give "
                "another."
            )
        answers += ids
    if answers[0] == answers[1]:
        raise UserError(
            f"pairs.rejected: is the chosen answer (got {show(pair.rejected)}). Give another."
        )
    return tokenizer(text, add_special_tokens=False)["input_ids"], answers


def traced(
    config: OneTokenConfig, lm: LanguageModel, encoded: Any, length: int, say: Say
) -> list[Trace]:
    """Train on each pair from the parameters of `lm`, and return what happened."""
    options = {} if config.beta is None else {"beta": config.beta}
    stages = (("sft", config.sft_steps), (config.loss, config.steps))
    optimizer = config.optimizer.transform(max(config.steps, config.sft_steps))

    def next_token(params: Params, batch: Any) -> Any:
        logits = lm.apply(params, batch["ids"], batch["mask"], positions=batch["position"])
        return jax.nn.log_softmax(logits[0].astype(jnp.float32))

    def loss(params: Params, batch: Any, name: str) -> Any:
        both = next_token(params, batch)[batch["answers"]]
        scores = PairScores(*both[:, None], *batch["reference"][:, None], *jnp.ones((2, 1)))
        return preference.loss(scores, name, **({} if name == "sft" else options))[0], both

    @partial(jax.jit, donate_argnums=(0, 1), static_argnums=3)
    def step(params: Params, state: Any, batch: Any, name: str) -> Any:
        (value, both), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, name)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, both

    predict, began, traces = jax.jit(next_token), time.perf_counter(), []
    for number, (ids, answers) in enumerate(encoded, start=1):
        rows, mask = pad([ids], (length,))
        batch = {"ids": rows, "mask": mask, "position": np.array([len(ids) - 1], np.int32)}
        batch["answers"] = np.array(answers, np.int32)
        params = jax.tree.map(jnp.array, lm.params)  # a copy, which the steps may overwrite
        for name, steps in stages:
            start = predict(params, batch)
            batch["reference"] = start[batch["answers"]]
            state, seen = optimizer.init(params), []
            for _ in range(steps):
                params, state, *values = step(params, state, batch, name)
                seen.append(jax.device_get(values))
        seen.append(jax.device_get(loss(params, batch, config.loss)))
        gain = np.exp(np.asarray(predict(params, batch), np.float64)) - np.exp(start)
        losses, both = (np.array(values, np.float64) for values in zip(*seen, strict=True))
        traces.append(Trace(both, losses, gain))
        left = (time.perf_counter() - began) / number * (len(encoded) - number)
        say(f"pair {number}/{len(encoded)}, about {left:.0f} s left")
    return traces


def _row(lm: LanguageModel, pair: OneTokenPair, trace: Trace, top: int) -> dict[str, Any]:
    gainers = np.argsort(-trace.gain)[:top]
    tokenizer = tokenizer_of(lm)
    return {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "p_chosen": np.exp(trace.log_probs[[0, -1], 0]).tolist(),
        "p_rejected": np.exp(trace.log_probs[[0, -1], 1]).tolist(),
        "loss": trace.loss[[0, -1]].tolist(),
        "gained": [(tokenizer.decode([int(i)]), float(trace.gain[i])) for i in gainers],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table, and in how many pairs the chosen token became less likely."""

    def change(values: list[float]) -> str:
        return f"{values[0]:.3g} to {values[1]:.3g}"

    cells = [
        (
            f"{row['chosen']} over {row['rejected']}: {row['prompt']}",
            change(row["p_chosen"]),
            change(row["p_rejected"]),
            change(row["loss"]),
            ", ".join(f"{token!r} {gain:+.2g}" for token, gain in row["gained"]),
        )
        for row in rows
    ]
    header = ("pair", "probability of chosen", "of rejected", "loss", "tokens that gained most")
    fell = sum(
        row["p_chosen"][1] < row["p_chosen"][0] and row["loss"][1] < row["loss"][0] for row in rows
    )
    note = f"The chosen token became less likely while the loss fell in {fell} of {len(rows)} pairs"
    return f"{aligned(header, cells)}\n\n{note}.\n"


def draw(pairs: tuple[OneTokenPair, ...], traces: list[Trace], path: Path) -> Path:
    """Draw the log-probabilities of both answers over training."""
    axes = new_axes((5.2, 3.4))
    for i, (pair, trace) in enumerate(zip(pairs, traces, strict=True)):
        label = f"{i + 1}: {pair.chosen} over {pair.rejected}"
        axes.plot(trace.log_probs[:, 0], "-", color=f"C{i}", label=label)
        axes.plot(trace.log_probs[:, 1], "--", color=f"C{i}")
    axes.set(xlabel="step", ylabel="log-probability (dashed: of rejected)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    return save_figure(axes, path)


Config = OneTokenConfig

"""Where the probability goes when a model is trained on a single pair of one-token answers.

Every pair is trained on alone, from the same model. The two answers are predicted by the same
hidden state, so their CHES is 0 for every pair. By the paper (arXiv:2410.08847), the change then
depends on the rows of the tokens in the output embedding; this study does not measure these.
"""

import time
from dataclasses import dataclass, field
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
from jaxlm.core import paths
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
from jaxlm.train.optimizers import OPTIMIZERS, Optimizer
from jaxlm.train.state import method
from jaxlm.typing import Params


@dataclass(frozen=True, kw_only=True)
class OneTokenPair:
    """A question with two answers.

    Attributes:
        prompt: message of the user.
        chosen: the preferred answer, one token.
        rejected: the other one, one token.
    """

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True)
class OneTokenConfig:
    """The configuration of the study.

    Attributes:
        model: folder or hub id of a model with a chat template.
        pairs: each is trained on alone.
        loss: one of `jaxlm.preference.LOSSES`.
        beta: of the loss; null for its own.
        optimizer: one of `jaxlm.train.optimizers.OPTIMIZERS`, by its name.
        steps: number of steps for each pair.
        sft_steps: steps on the chosen answer alone that come first; the reference is the model
            after these.
        top: number of tokens to list that gained most probability.
        output: folder of the study.
    """

    model: str
    pairs: tuple[OneTokenPair, ...]
    loss: str = "dpo"
    beta: float | None = None
    optimizer: Optimizer = field(
        default=OPTIMIZERS["rmsprop"](name="rmsprop", learning_rate=1e-6),
        metadata={"registry": OPTIMIZERS},
    )
    steps: int = 30
    sft_steps: int = 0
    top: int = 3
    output: str

    study: ClassVar[str] = "one_token"

    def __post_init__(self):
        if not self.pairs:
            raise UserError("pairs: is empty (got nothing). Give at least one.")
        preference.terms(self.loss)
        real("beta", self.beta, above=0)
        whole(self, "steps", "top")
        whole(self, "sft_steps", least=0)
        object.__setattr__(self, "output", str(file_path(self.output, "output")))


class Trace(NamedTuple):
    """What training did to one pair.

    Attributes:
        values: log-probability of the chosen and of the rejected token and the loss, before each
            step and at the end.
        gain: what each token of the vocabulary gained in probability.
        cosine: of the gradients, before the first step, of the chosen token's log-probability and
            of its difference to the rejected one's. Below 0, a small first step of plain gradient
            descent makes the chosen token less likely.
    """

    values: Float[np.ndarray, "steps 3"]
    gain: Float[np.ndarray, " V"]
    cosine: float


def outline(config: OneTokenConfig, where: str, plan_flags: Any) -> str:
    """Return a line for each pair."""
    lines = (f"{each.chosen} over {each.rejected}: {each.prompt}" for each in config.pairs)
    return "\n".join(f"{config.steps} steps, {line}" for line in lines)


def run(
    config: OneTokenConfig, folder: Path, where: str, *, mesh: Mesh | None = None, say: Say = print
) -> Result:
    """Train on each pair; see `jaxlm.studies.study`."""
    lm = load_model(config.model, mesh=mesh)
    encoded = [encode(lm, each) for each in config.pairs]
    length = round_up(max(len(ids) for ids, _ in encoded))
    traces = traced(config, lm, encoded, length, say)
    rows = [_row(lm, *each, config.top) for each in zip(config.pairs, traces, strict=True)]
    figure = draw(config.pairs, traces, folder / "probabilities.png")
    return Result({"rows": rows}, markdown(rows), (figure,))


def encode(lm: LanguageModel, pair: OneTokenPair) -> tuple[list[int], list[int]]:
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

    def next_token(params: Params, batch: Any) -> Any:
        logits = lm.apply(params, batch["ids"], batch["mask"], positions=batch["position"])
        return jax.nn.log_softmax(logits[0].astype(jnp.float32))

    def stage(terms: Any, steps: int) -> tuple[int, Any, Any]:
        def loss_fn(params: Params, batch: Any) -> Any:
            both = next_token(params, batch)[batch["answers"]]
            scores = PairScores(*both[:, None], *batch["reference"][:, None], *jnp.ones((2, 1)))
            return preference.loss(scores, terms)[0], {"chosen": both[0], "rejected": both[1]}

        training = method(config.optimizer, loss_fn, max(steps, 1))
        return steps, training, jax.jit(training.step, donate_argnums=(0, 1))

    @jax.jit
    def agreement(params: Params, batch: Any) -> Any:
        trained, rest = paths.split(params, config.optimizer.select)

        def scores(part: Params) -> Any:
            chosen, rejected = next_token(paths.merge(part, rest), batch)[batch["answers"]]
            return chosen, chosen - rejected

        chosen, margin = jax.jacrev(scores)(trained)
        return optax.tree.vdot(chosen, margin) / optax.tree.norm(chosen) / optax.tree.norm(margin)

    predict = jax.jit(next_token)
    loss = preference.terms(config.loss, beta=config.beta)
    stages = stage(preference.terms("sft"), config.sft_steps), stage(loss, config.steps)
    began, traces = time.perf_counter(), []
    for number, (ids, answers) in enumerate(encoded, start=1):
        rows, mask = pad([ids], (length,))
        batch = {"ids": rows, "mask": mask, "position": np.array([len(ids) - 1], np.int32)}
        batch["answers"] = np.array(answers, np.int32)
        params = jax.tree.map(jnp.array, lm.params)  # a copy, which the steps may overwrite
        for steps, training, step in stages:
            start, cosine = predict(params, batch), agreement(params, batch)
            batch["reference"] = start[batch["answers"]]
            state, infos = training.init(params, jax.random.key(0)), []
            for _ in range(steps):
                params, state, info = step(params, state, batch)
                infos.append(jax.device_get([info[k] for k in ("chosen", "rejected", "loss")]))
        end = predict(params, batch)
        scores = PairScores(*end[batch["answers"]][:, None], *batch["reference"][:, None])
        scores = scores._replace(chosen_tokens=jnp.ones(1), rejected_tokens=jnp.ones(1))
        infos.append([*end[batch["answers"]], preference.loss(scores, loss)[0]])
        gain = np.exp(np.asarray(end, np.float64)) - np.exp(np.asarray(start, np.float64))
        traces.append(Trace(np.array(infos, np.float64), gain, float(cosine)))
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
        "p_chosen": np.exp(trace.values[[0, -1], 0]).tolist(),
        "p_rejected": np.exp(trace.values[[0, -1], 1]).tolist(),
        "loss": trace.values[[0, -1], 2].tolist(),
        "cosine": trace.cosine,
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
            f"{row['cosine']:.2f}",
            ", ".join(f"{token!r} {gain:+.2g}" for token, gain in row["gained"]),
        )
        for row in rows
    ]
    header = (
        "pair",
        "probability of chosen",
        "of rejected",
        "loss",
        "cosine",
        "tokens that gained most",
    )
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
        axes.plot(trace.values[:, 0], "-", color=f"C{i}", label=label)
        axes.plot(trace.values[:, 1], "--", color=f"C{i}")
    axes.set(xlabel="step", ylabel="log-probability (dashed: of rejected)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    return save_figure(axes, path)


Config = OneTokenConfig

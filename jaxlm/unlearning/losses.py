r"""Losses that make a model forget rows, and terms that keep what it says about others.

A row has n targets $y_t$, tokens with the log-probabilities $\ell_t$ under the policy, and
$\ell = \sum_t \ell_t$. $\bar\ell_t$, $\bar\ell$ are the same under the reference, the frozen model
that unlearning starts from; $z_t$ [V] are logits, $\varsigma(x) = \log(1 + e^x)$, and the bracket
$\langle\cdot\rangle$ is the mean over all targets of the batch.

Each loss is a function `(policy, reference, *, options) -> [B]` whose mean over the rows is the
loss; a mean over targets returns each row's share of it. `FORGET` has the losses of rows to forget
by name, `RETAIN` those of rows to keep; a method minimizes $\gamma$ times one of the former plus
$\alpha$ times one of the latter. Where a paper and its released code differ, `variant` chooses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import softplus
from jaxtyping import Array, Float, Num

from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.core.terms import Term, TermSpec, configuration, terms

Values: TypeAlias = Float[Array, " B"]
Number: TypeAlias = float | int | Array
"""An option of a loss: a number, or an array that may be traced."""
Variant: TypeAlias = Literal["paper", "released"]


class TokenScores(NamedTuple):
    """What a model says about a batch of rows.

    Attributes:
        log_probs: [B, T], of the targets, in at least float32.
        mask: [B, T], 1 for targets and 0 for padding.
        targets: [B, T], token ids.
        logits: [B, T, V], at the states that predict the targets.
        states: [B, T, D], hidden states there, after one of the layers.
        alternative: the same for another answer to each prompt, such as a refusal.
        per_target: [B], rows divided by targets, counted over the whole batch; None to count these
            rows.
    """

    log_probs: Any = None
    mask: Any = None
    targets: Any = None
    logits: Any = None
    states: Any = None
    alternative: Any = None
    per_target: Any = None

    def need(self, name: str) -> Any:
        """Return a field, or raise UserError if it is None."""
        if getattr(self, name) is None:
            raise UserError(f"{name}: is needed here (got None). Give it in TokenScores.")
        return getattr(self, name)

    @property
    def sums(self) -> Values:
        r"""The log-probability $\ell$ of each row."""
        return jnp.sum(jnp.where(self.mask > 0, self.need("log_probs"), 0), axis=1)

    @property
    def counts(self) -> Num[Array, " B"]:
        """The number of targets of each row, 1 for a row without."""
        return jnp.maximum(jnp.sum(self.mask > 0, axis=1), 1)

    def share(self, values: Any, mask: Any = None) -> Values:
        """Return each row's share of the mean of values [B, T] over all targets."""
        mask = (self.mask if mask is None else mask) > 0
        sums = jnp.sum(jnp.where(mask, values, 0), axis=1)
        if self.per_target is not None:
            return sums * self.per_target
        return sums * len(mask) / jnp.maximum(jnp.sum(mask), 1)


def _frozen(reference: TokenScores | None, name: str) -> Any:
    if reference is None:
        raise UserError("reference: is needed here (got None). Give the scores of that model.")
    return lax.stop_gradient(reference.need(name))


def _ratio(policy: TokenScores, reference: TokenScores | None) -> Values:
    return policy.sums - _frozen(reference, "sums")


def ga(policy: TokenScores, reference: TokenScores | None = None) -> Values:
    r"""Gradient ascent on the likelihood, $\langle\ell_t\rangle$.

    With the term `nll` it is gradient difference (arXiv:2203.12817).
    """
    return policy.share(policy.need("log_probs"))


def npo(
    policy: TokenScores,
    reference: TokenScores | None = None,
    *,
    beta: Number = 0.1,
    variant: Variant = "paper",
) -> Values:
    r"""NPO, $\frac2\beta\,\varsigma(\beta(\ell - \bar\ell))$ (arXiv:2404.05868).

    Its gradient has the weight $2\sigma(\beta(\ell - \bar\ell))$, which vanishes as the row is
    forgotten. As β goes to 0 it is $\ell - \bar\ell + \frac2\beta\log 2$, ascent on the sum.

    released: the code of MUSE, the mean over positions and the vocabulary of the same function of
    raw logits, which is not a likelihood ratio.
    """
    if variant == "paper":
        return 2 / beta * softplus(beta * _ratio(policy, reference))
    difference = policy.need("logits") - _frozen(reference, "logits")
    return jnp.mean(2 / beta * softplus(beta * difference), axis=(1, 2))


def simnpo(
    policy: TokenScores,
    reference: TokenScores | None = None,
    *,
    beta: Number = 4.5,
    delta: Number = 0.0,
) -> Values:
    r"""SimNPO, $\frac2\beta\,\varsigma(\beta(\ell/n + \delta))$ (arXiv:2410.07163).

    The paper's margin γ is βδ.
    """
    return 2 / beta * softplus(beta * (policy.sums / policy.counts + delta))


def dpo_idk(
    policy: TokenScores, reference: TokenScores | None = None, *, beta: Number = 0.1
) -> Values:
    r"""DPO towards a refusal, $\frac2\beta\,\varsigma(\beta(s_f - s_r))$, $s = \ell - \bar\ell$.

    $s_f$ is of the answer to forget and $s_r$ of the `alternative`. The factor $2/\beta$ is that of
    NPO. Reference: arXiv:2401.06121, arXiv:2404.05868.
    """
    refusal = _ratio(policy.need("alternative"), _frozen(reference, "alternative"))
    return 2 / beta * softplus(beta * (_ratio(policy, reference) - refusal))


def wga(policy: TokenScores, reference: TokenScores | None = None, *, beta: Number = 1.0) -> Values:
    r"""Weighted ascent, $\langle p_t^\beta\,\ell_t\rangle$; $p_t = e^{\ell_t}$ has no gradient.

    Tokens that are forgotten already count less; β = 0 is `ga`. Reference: arXiv:2502.19301.
    """
    log_probs = policy.need("log_probs")
    return policy.share(jnp.exp(beta * lax.stop_gradient(log_probs)) * log_probs)


def satimp(
    policy: TokenScores,
    reference: TokenScores | None = None,
    *,
    beta1: Number = 5.0,
    beta2: Number = 1.0,
) -> Values:
    r"""SatImp, $\langle p_t^{\beta_1} (1 - p_t)^{\beta_2}\,\ell_t\rangle$ (arXiv:2505.11953).

    The weights have no gradient; with both exponents 0 it is `ga`. The defaults are those of the
    authors' configuration in open-unlearning, whose class has 1 and 0.1.
    """
    log_probs = policy.need("log_probs")
    p = jnp.exp(lax.stop_gradient(log_probs))
    return policy.share(p**beta1 * (1 - p) ** beta2 * log_probs)


def _cross_entropy(logits: Any, probabilities: Any) -> Float[Array, "B T"]:
    return -jnp.sum(probabilities * jax.nn.log_softmax(logits), axis=-1)


def undial(
    policy: TokenScores, reference: TokenScores | None = None, *, beta: Number = 10.0
) -> Values:
    r"""UNDIAL, self-distillation: $\langle\mathrm{CE}(z_t, q_t)\rangle$.

    $q_t = \mathrm{softmax}(\bar z_t - \beta e_{y_t})$ is the reference with the target's logit
    lowered. Reference: arXiv:2402.10052. open-unlearning averages over prompts and padding, too.
    """
    logits = policy.need("logits")
    lowered = _frozen(reference, "logits") - beta * _one_hot(policy, logits)
    return policy.share(_cross_entropy(logits, jax.nn.softmax(lowered)))


def _one_hot(policy: TokenScores, logits: Any) -> Any:
    return jax.nn.one_hot(policy.need("targets"), logits.shape[-1], dtype=logits.dtype)


def ceu(policy: TokenScores, reference: TokenScores | None = None) -> Values:
    r"""CE-U, $\langle\mathrm{CE}(z_t, q_t)\rangle$, $q_t$ the policy without the target.

    That is $\mathrm{softmax}(z_t)$ with $z_{t,y_t} = -\infty$ and no gradient. The first target of
    a row is left out. Reference: arXiv:2503.01224.
    """
    logits = policy.need("logits")
    masked = jnp.where(_one_hot(policy, logits) > 0, -jnp.inf, lax.stop_gradient(logits))
    scored = policy.mask > 0
    rest = scored & (jnp.cumsum(scored, axis=1) > 1)
    # The number of targets changes, so a share that was computed of all of them does not fit.
    return policy._replace(per_target=None).share(
        _cross_entropy(logits, jax.nn.softmax(masked)), rest
    )


def pdu(
    policy: TokenScores, reference: TokenScores | None = None, *, variant: Variant = "paper"
) -> Values:
    r"""PDU's flat logits, $\langle(\max_v z_{tv} - \mathrm{mean}_v z_{tv})^2\rangle$.

    The primal-dual method updates the weight α of the retained rows by `dual_step`; a run keeps it
    fixed. released: the logits one place late, as in the authors' code; give one place more after
    the last target. Reference: arXiv:2506.05314.
    """
    logits = policy.need("logits")
    squares = (jnp.max(logits, axis=-1) - jnp.mean(logits, axis=-1)) ** 2
    mask = policy.mask if variant == "paper" else jnp.pad(policy.mask, ((0, 0), (1, 0)))[:, :-1]
    return policy.share(squares, mask)


def dual_step(alpha: Number, retain_loss: Number, *, eta: Number = 1.0, eps: Number = 0.0) -> Any:
    r"""Return PDU's next weight of the retained rows, $\max(0, \alpha + \eta(L_r - \epsilon))$."""
    return jnp.maximum(0, alpha + eta * (retain_loss - eps))


def control_vector(size: int, seed: int = 0) -> Float[Array, " D"]:
    """Return RMU's direction: uniform numbers from 0 to 1, over their norm."""
    u = jax.random.uniform(jax.random.key(seed), (size,))
    return u / jnp.linalg.norm(u)


def rmu(
    policy: TokenScores,
    reference: TokenScores | None = None,
    *,
    coefficient: Number = 20.0,
    layer: int = 8,
    seed: int = 0,
) -> Values:
    r"""RMU: pull the states h of a layer to a random direction u.

    $\frac1n \sum_t \frac1D \|h_t - c u\|^2$ with `control_vector`, after 8 layers by default: what
    the authors' code calls layer 7. The term of the retained rows is `hidden`. As in that code, all
    entries of the direction are positive. Reference: arXiv:2403.03218.
    """
    states = policy.need("states")
    u = control_vector(states.shape[-1], seed)[None, None]
    return _row_means(policy, jnp.mean((states - coefficient * u) ** 2, axis=-1))


def _row_means(scores: TokenScores, values: Any) -> Values:
    return jnp.sum(jnp.where(scores.mask > 0, values, 0), axis=1) / scores.counts


Divergence: TypeAlias = Literal["kl", "tv", "js", "pearson"]


def flat(
    policy: TokenScores,
    reference: TokenScores | None = None,
    *,
    divergence: Divergence = "tv",
) -> Values:
    r"""FLAT, $f^*(P_f) - g(P_r)$ of mean probabilities of the answer and of a refusal.

    $P = \frac1n\sum_t e^{\ell_t}$, of the answer to forget and of the `alternative`.
    kl: $e^{P_f - 1} - P_r$; tv: $(\tanh P_f - \tanh P_r)/2$; js: $\log(1 + e^{-P_r}) + P_f +
    \log(1 + e^{-P_f}) - 2\log 2$; pearson: $P_f + P_f^2/4 - P_r$. Reference: arXiv:2410.11143.
    Its code averages over padding, too, and has three more divergences, whose gradients move both
    probabilities the wrong way.
    """
    other = policy.need("alternative")
    p_f = _row_means(policy, jnp.exp(policy.need("log_probs")))
    p_r = _row_means(other, jnp.exp(other.need("log_probs")))
    if divergence == "kl":
        return jnp.exp(p_f - 1) - p_r
    if divergence == "tv":
        return (jnp.tanh(p_f) - jnp.tanh(p_r)) / 2
    if divergence == "js":
        return softplus(-p_r) + p_f + softplus(-p_f) - 2 * jnp.log(2.0)
    return p_f + p_f**2 / 4 - p_r


def nll(policy: TokenScores, reference: TokenScores | None = None) -> Values:
    r"""Negative log-likelihood of the retained rows, $-\langle\ell_t\rangle$."""
    return -policy.share(policy.need("log_probs"))


def kl(
    policy: TokenScores, reference: TokenScores | None = None, *, variant: Variant = "paper"
) -> Values:
    r"""Divergence from the reference, $\langle\mathrm{KL}(\bar p_t \| p_t)\rangle$ of tokens.

    released: the code of MUSE, $\sum_{tv} e^{\bar z_{tv}}(\bar z_{tv} - z_{tv})$ of raw logits,
    which is no divergence and may be negative.
    """
    logits, other = policy.need("logits"), _frozen(reference, "logits")
    if variant == "released":
        return jnp.sum(jnp.exp(other) * (other - logits), axis=(1, 2))
    log_q = jax.nn.log_softmax(other)
    return policy.share(jnp.sum(jnp.exp(log_q) * (log_q - jax.nn.log_softmax(logits)), axis=-1))


def hidden(policy: TokenScores, reference: TokenScores | None = None, *, layer: int = 8) -> Values:
    r"""RMU's distance from the reference's states, $\frac1n\sum_t \frac1D\|h_t - \bar h_t\|^2$."""
    difference = policy.need("states") - _frozen(reference, "states")
    return _row_means(policy, jnp.mean(difference**2, axis=-1))


MEANINGS = {
    "beta": "β of the equation.",
    "beta1": "exponent of the probability.",
    "beta2": "exponent of one minus the probability.",
    "delta": "margin, in nats a token.",
    "coefficient": "length c of the direction.",
    "layer": "number of layers before the states.",
    "seed": "of the direction.",
    "divergence": "kl, tv, js or pearson.",
    "variant": "paper, or released: for npo and kl the code of MUSE, for pdu that of its authors.",
}


BOUNDS = {"beta": {"above": 0.0}, "wga.beta": {"least": 0.0}}


@dataclass(frozen=True, kw_only=True)
class TokenLoss(Term):
    """A loss of rows with its options, called with the scores of both models; see `Term`."""

    bounds = BOUNDS
    fields: ClassVar[tuple[str, ...]] = ("log_probs",)
    """Fields of the policy's `TokenScores` that it reads."""
    reference_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of the reference's."""

    def __call__(self, policy: TokenScores, reference: TokenScores | None = None) -> Values:
        """Return the loss of each row, [B], without the weight."""
        scores = (each if each is None else _wide(each) for each in (policy, reference))
        return type(self).function(*scores, **self.options)

    @property
    def layer_of_states(self) -> int | None:
        """The layer whose states it reads; None if it reads none."""
        return getattr(self, "layer", None)


class RetainLoss(TokenLoss):
    """A loss of rows that are to be kept."""

    section = "retain"


def _wide(scores: TokenScores) -> TokenScores:
    def widened(x: Any) -> Any:
        x = jnp.asarray(x)
        return wide(x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widened, scores)


def _row(
    function: Callable[..., Any],
    *fields: str,
    reference: tuple[str, ...] = (),
    base: type[TokenLoss] = TokenLoss,
) -> type[Any]:
    return configuration(
        function,
        base,
        MEANINGS,
        fields=fields or ("log_probs",),
        reference_fields=reference,
    )


FORGET: dict[str, type[Any]] = {
    "npo": _row(npo, reference=("log_probs",)),
    "ga": _row(ga),
    "simnpo": _row(simnpo),
    "dpo_idk": _row(dpo_idk, "log_probs", "alternative", reference=("log_probs", "alternative")),
    "wga": _row(wga),
    "satimp": _row(satimp),
    "undial": _row(undial, "logits", reference=("logits",)),
    "ceu": _row(ceu, "logits"),
    "pdu": _row(pdu, "logits"),
    "rmu": _row(rmu, "states"),
    "flat": _row(flat, "log_probs", "alternative"),
}
"""Losses of rows to forget; a new one is a function above and a line here."""
RETAIN: dict[str, type[Any]] = {
    "nll": _row(nll, base=RetainLoss),
    "kl": _row(kl, "logits", reference=("logits",), base=RetainLoss),
    "hidden": _row(hidden, "states", reference=("states",), base=RetainLoss),
}
"""Losses of rows to keep."""


def forget_loss(
    name: TermSpec, policy: TokenScores, reference: TokenScores | None = None, **options: Any
) -> Values:
    """Return the loss of each row to forget, [B], whose mean over the batch is the loss.

    Args:
        name: one of `FORGET`, or several with weights, see `jaxlm.core.terms.TermSpec`.
        policy: the model that unlearns.
        reference: the model that it starts from, if the loss has one.
        options: for every loss that has them.

    Raises:
        UserError: the name or an option is unknown or out of range, or scores are missing.

    >>> scores = TokenScores(jnp.array([[-1.0, -3.0]]), jnp.ones((1, 2)))
    >>> forget_loss("ga", scores).tolist()
    [-2.0]
    """
    return _sum(name, FORGET, policy, reference, options)


def retain_loss(
    name: TermSpec, policy: TokenScores, reference: TokenScores | None = None, **options: Any
) -> Values:
    """Return the loss of each row to keep, [B]; arguments as in `forget_loss`, of `RETAIN`."""
    return _sum(name, RETAIN, policy, reference, options)


def _sum(
    name: TermSpec, registry: Any, policy: Any, reference: Any, options: dict[str, Any]
) -> Values:
    found = terms(name, registry, **options)
    for option in options:
        if not any(hasattr(term, option) for term in found):
            raise UserError(
                f"{option}: {found[0].name} has no such option (got {options[option]}). Leave it "
                "out."
            )
    return sum((term.weight * term(policy, reference) for term in found), jnp.zeros(()))


def task_vector(params: Any, start: Any, tuned: Any, alpha: Number) -> Any:
    r"""Return $\theta - \alpha(\theta_{tuned} - \theta_{start})$: unlearning by subtraction.

    Args:
        params: θ, the model that is to forget, often `start` itself.
        start: the model that `tuned` was fine-tuned from.
        tuned: the same, fine-tuned further on what is to be forgotten.
        alpha: how far to go.

    Reference: Ilharco et al., arXiv:2212.04089.
    """
    return jax.tree.map(lambda x, a, b: (x - alpha * (b - a)).astype(x.dtype), params, start, tuned)


def whp_logits(
    logits: Float[Array, "*B V"], reinforced: Float[Array, "*B V"], alpha: Number
) -> Float[Array, "*B V"]:
    r"""Return Who's Harry Potter's logits, $z - \alpha\max(0, z_r - z)$ (arXiv:2310.02238).

    Args:
        logits: z, of the model that is to forget.
        reinforced: $z_r$, of the same model fine-tuned further on what is to be forgotten.
        alpha: how far to go.
    """
    return logits - alpha * jnp.maximum(reinforced - logits, 0)

r"""Losses of preference pairs, as functions of the log-probabilities of the two responses.

A pair is a prompt with a chosen response w and a rejected one l. c and l are the sums of the
log-probabilities of their tokens, rc and rl the same under a frozen reference, $n_w$ and $n_l$ the
numbers of tokens. In all equations

$$s_w = c - rc, \quad s_l = l - rl, \quad d = s_w - s_l, \quad \ell(x) = -\log\sigma(x).$$

Each loss is a function `(scores, *, options) -> [B]` whose mean over the batch is the loss. A term
that is a mean over all tokens of the batch returns each pair's share of it. `LOSSES` has them by
name, as dataclasses of their options that check themselves; `loss` computes one, or a weighted sum.
Defaults are those of the papers, or of the authors' code where a paper has several.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp
from jax import lax
from jax.nn import log_sigmoid, relu, sigmoid, softplus
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from jaxlm.core.checks import one_of, show
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.core.terms import Term, TermSpec, configuration
from jaxlm.core.terms import terms as core_terms

Values: TypeAlias = Float[Array, " B"]
Number: TypeAlias = float | int | Array
"""An option of a loss: a number, or an array that may be traced."""
Divergence: TypeAlias = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Variant: TypeAlias = Literal["paper", "released"]

MOST_EXPONENT = 80.0
"""Largest exponent of a divergence, e^80; float32 overflows at e^88."""


class PairScores(NamedTuple):
    """What a model says about a batch of pairs. A pair without chosen tokens is padding.

    Attributes:
        chosen: [B], c, in at least float32: a sum of 300 nats in bfloat16 has steps of 2.
        rejected: [B], l.
        ref_chosen: [B], rc; None without a reference.
        ref_rejected: [B], rl.
        chosen_tokens: [B], n_w, the number of scored tokens; None where no length is needed.
        rejected_tokens: [B], n_l.
        z: [], the reference point of `kto`.
        samples: [B, K], log-ratios s of K responses of the model itself, for `d2o`.
    """

    chosen: Any
    rejected: Any
    ref_chosen: Any = None
    ref_rejected: Any = None
    chosen_tokens: Any = None
    rejected_tokens: Any = None
    z: Any = None
    samples: Any = None

    def need(self, *names: str) -> "PairScores":
        """Return the scores themselves, or raise UserError if one of these fields is None."""
        for name in names:
            if getattr(self, name) is None:
                raise UserError(f"{name}: is needed here (got None). Give it in PairScores.")
        return self

    @property
    def chosen_ratio(self) -> Any:
        """The log-ratio s_w."""
        return self.chosen - self.need("ref_chosen").ref_chosen

    @property
    def rejected_ratio(self) -> Any:
        """The log-ratio s_l."""
        return self.rejected - self.need("ref_rejected").ref_rejected

    @property
    def margin(self) -> Any:
        """The difference d of the log-ratios."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def counted(self) -> Bool[Array, " B"]:
        """False for padding."""
        tokens = jnp.ones_like(self.chosen) if self.chosen_tokens is None else self.chosen_tokens
        return jnp.asarray(tokens) > 0

    def mean(self, values: Any) -> Float[Array, ""]:
        """Return the mean of values [B] over the pairs that are not padding."""
        return jnp.where(self.counted, wide(jnp.asarray(values)), 0).sum() / self.counted.sum()

    def per_token(self, chosen: Any, rejected: Any) -> tuple[Any, Any]:
        """Divide values of the two responses by their lengths; an empty response counts as 1."""
        self.need("chosen_tokens", "rejected_tokens")
        lengths = jnp.maximum(self.chosen_tokens, 1), jnp.maximum(self.rejected_tokens, 1)
        return chosen / lengths[0], rejected / lengths[1]

    @property
    def margin_per_token(self) -> Any:
        r"""The difference of the mean log-ratios, $s_w/n_w - s_l/n_l$."""
        chosen, rejected = self.per_token(self.chosen_ratio, self.rejected_ratio)
        return chosen - rejected


def _smoothed(x: Any, label_smoothing: Number) -> Values:
    return (1 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)


def dpo(scores: PairScores, *, beta: Number = 0.1) -> Values:
    r"""DPO, $\ell(\beta d)$ (arXiv:2305.18290)."""
    return softplus(-beta * scores.margin)


def cdpo(scores: PairScores, *, beta: Number = 0.1, label_smoothing: Number = 0.1) -> Values:
    r"""Conservative DPO, $(1-e)\,\ell(\beta d) + e\,\ell(-\beta d)$ (Mitchell 2023, cdpo.pdf)."""
    return _smoothed(beta * scores.margin, label_smoothing)


def robust(scores: PairScores, *, beta: Number = 0.1, label_smoothing: Number = 0.1) -> Values:
    r"""Robust DPO, $((1-e)\,\ell(\beta d) - e\,\ell(-\beta d))/(1-2e)$ (arXiv:2403.00409)."""
    x, e = beta * scores.margin, label_smoothing
    return ((1 - e) * softplus(-x) - e * softplus(x)) / (1 - 2 * e)


def hinge(scores: PairScores, *, beta: Number = 0.1) -> Values:
    r"""SLiC's hinge on log-ratios, $\max(0, 1 - \beta d)$ (arXiv:2305.10425, 2309.06657)."""
    return relu(1 - beta * scores.margin)


def ipo(scores: PairScores, *, beta: Number = 0.1) -> Values:
    r"""IPO per token, $(s_w/n_w - s_l/n_l - 1/(2\beta))^2$, as in TRL (arXiv:2310.12036)."""
    return (scores.margin_per_token - 1 / (2 * beta)) ** 2


def ipo_sum(scores: PairScores, *, beta: Number = 0.1) -> Values:
    r"""IPO as in its equation 17, $(d - 1/(2\beta))^2$: $1/(2\beta)$ is in nats of a response."""
    return (scores.margin - 1 / (2 * beta)) ** 2


def exo_pair(scores: PairScores, *, beta: Number = 0.1, label_smoothing: Number = 1e-3) -> Values:
    r"""EXO, $\mathrm{KL}(q\|p)$, $q = (\sigma(\beta d), \sigma(-\beta d))$, $p = (1-e, e)$.

    Reference: arXiv:2402.00856, equation 16.
    """
    x = beta * scores.margin
    chosen = sigmoid(x) * (log_sigmoid(x) - jnp.log1p(-label_smoothing))
    return chosen + sigmoid(-x) * (log_sigmoid(-x) - jnp.log(label_smoothing))


def nca_pair(scores: PairScores, *, beta: Number = 0.1) -> Values:
    r"""NCA, $\ell(\beta s_w) + (\ell(-\beta s_w) + \ell(-\beta s_l))/2$ (arXiv:2402.05369)."""
    chosen, rejected = beta * scores.chosen_ratio, beta * scores.rejected_ratio
    return softplus(-chosen) + (softplus(chosen) + softplus(rejected)) / 2


def bco_pair(scores: PairScores, *, beta: Number = 0.1) -> Values:
    r"""BCO without a shift of rewards, $\ell(\beta s_w) + \ell(-\beta s_l)$ (arXiv:2404.04656)."""
    return softplus(-beta * scores.chosen_ratio) + softplus(beta * scores.rejected_ratio)


def sppo_hard(scores: PairScores, *, beta: Number = 0.1) -> Values:
    r"""SPPO, win rates 1 and 0, $(s_w - 1/2\beta)^2 + (s_l + 1/2\beta)^2$ (arXiv:2405.00675)."""
    target = 1 / (2 * beta)
    return (scores.chosen_ratio - target) ** 2 + (scores.rejected_ratio + target) ** 2


def apo_zero(scores: PairScores, *, beta: Number = 0.1) -> Values:
    r"""APO, for chosen responses better than the model's (arXiv:2408.06266, equation 7).

    $\sigma(-\beta s_w) + \sigma(\beta s_l)$.
    """
    return sigmoid(-beta * scores.chosen_ratio) + sigmoid(beta * scores.rejected_ratio)


def apo_down(scores: PairScores, *, beta: Number = 0.1) -> Values:
    r"""APO, for chosen responses worse than the model's (arXiv:2408.06266, equation 8).

    $\sigma(\beta s_w) + \sigma(-\beta d)$.
    """
    return sigmoid(beta * scores.chosen_ratio) + sigmoid(-beta * scores.margin)


def discopop(scores: PairScores, *, beta: Number = 0.1, tau: Number = 0.05) -> Values:
    r"""DiscoPOP, $(1 - m)\,\ell(\beta d) + m e^{-\beta d}$, $m = \sigma(\beta d/\tau)$.

    Reference: arXiv:2406.08414, equation 5.
    """
    x = beta * scores.margin
    # One exponential: for very negative x, m is 0 and exp(-x) infinite.
    return softplus(-x) * sigmoid(-x / tau) + jnp.exp(log_sigmoid(x / tau) - x)


def dpo_norm(scores: PairScores, *, beta: Number = 5.0) -> Values:
    r"""DPO per token, $\ell(\beta(s_w/n_w - s_l/n_l))$ (Tulu 3, arXiv:2411.15124)."""
    return softplus(-beta * scores.margin_per_token)


def dpo_gamma(scores: PairScores, *, beta: Number = 0.1, gamma: Number = 0.5) -> Values:
    r"""DPO with a part of the reference, $\ell(\beta((c - l) - \gamma(rc - rl)))$.

    γ = 1 is DPO, 0 is without a reference. Reference: arXiv:2405.19534, equation 4.
    """
    scores.need("ref_chosen", "ref_rejected")
    chosen = scores.chosen - gamma * scores.ref_chosen  # in the order of `dpo`, for equal bits
    return softplus(-beta * (chosen - (scores.rejected - gamma * scores.ref_rejected)))


def flex_dpo(
    scores: PairScores, *, beta_chosen: Number = 0.1, beta_rejected: Number = 0.02
) -> Values:
    r"""Flex-DPO, $\ell(\beta_w s_w - \beta_l s_l)$, which pushes the rejected response down less.

    Reference: arXiv:2406.07327. Form and constants are not checked against code: none is public.
    """
    margin = beta_chosen * scores.chosen_ratio - beta_rejected * scores.rejected_ratio
    return softplus(-margin)


def dpop(scores: PairScores, *, beta: Number = 0.1, penalty: Number = 50.0) -> Values:
    r"""DPO-Positive, $\ell(\beta(d - \lambda \max(0, -s_w)))$, λ the `penalty` (arXiv:2402.13228).

    Some code adds the penalty to the loss instead.
    """
    return softplus(-beta * (scores.margin - penalty * relu(-scores.chosen_ratio)))


def cream(scores: PairScores, *, beta: Number = 0.1, consistency: Number = 0.9) -> Values:
    r"""CREAM, $C\,\ell(\beta d) + (1-C)\,\ell(-\beta d)$ (arXiv:2410.12735).

    $C = (\tau + 1)/2$, where τ is Kendall's rank correlation between two models: its mean over
    prompts or, in this function, one value for each pair, [B].
    """
    return _smoothed(beta * scores.margin, 1 - consistency)


def _transported(x: Any, y: Any, counted: Bool[Array, " B"]) -> Values:
    """Return x less the y of the same rank, the optimal coupling of two samples; 0 for padding."""
    order = jnp.argsort(jnp.where(counted, x, jnp.inf))
    difference = x[order] - jnp.sort(jnp.where(counted, y, jnp.inf))
    return jnp.zeros_like(x).at[order].set(jnp.where(counted[order], difference, 0))


def aot(scores: PairScores, *, beta: Number = 0.1, label_smoothing: Number = 0.0) -> Values:
    r"""AOT, `cdpo` with $d = \mathrm{sort}(c - l) - \mathrm{sort}(rc - rl)$ over the batch.

    Reference: arXiv:2406.05882.
    """
    scores.need("ref_chosen", "ref_rejected")
    policy, reference = scores.chosen - scores.rejected, scores.ref_chosen - scores.ref_rejected
    return _smoothed(beta * _transported(policy, reference, scores.counted), label_smoothing)


def aot_unpaired(
    scores: PairScores, *, beta: Number = 0.1, label_smoothing: Number = 0.0
) -> Values:
    r"""AOT, `cdpo` with $d = \mathrm{sort}(s_w) - \mathrm{sort}(s_l)$ (arXiv:2406.05882)."""
    d = _transported(scores.chosen_ratio, scores.rejected_ratio, scores.counted)
    return _smoothed(beta * d, label_smoothing)


def kto(
    scores: PairScores,
    *,
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
) -> Values:
    r"""KTO, $\frac12(w_d\,\sigma(\beta(z - s_w)) + w_u\,\sigma(\beta(s_l - z)))$.

    z is the mean log-ratio of responses to other prompts, at least 0, without a gradient. It comes
    with the scores, since it needs forward passes of its own.
    Reference: arXiv:2402.01306.
    """
    z = lax.stop_gradient(relu(scores.need("z").z))
    desirable = desirable_weight * sigmoid(beta * (z - scores.chosen_ratio))
    return (desirable + undesirable_weight * sigmoid(beta * (scores.rejected_ratio - z))) / 2


def d2o(scores: PairScores, *, beta: Number = 0.1, alpha: Number = 0.1) -> Values:
    r"""D2O, $\ell(\frac{\beta}{K}\sum_k s_k - \alpha s_l)$ with K samples in place of w.

    $s_k$ and $s_l$ may have different references. Reference: arXiv:2403.03419; the constants are
    not checked against the authors' code.
    """
    samples = beta * jnp.mean(scores.need("samples").samples, axis=-1)
    return softplus(alpha * scores.rejected_ratio - samples)


def sft(scores: PairScores) -> Values:
    r"""Negative log-likelihood of the chosen tokens of the batch, $-\sum c / \sum n_w$."""
    tokens = jnp.sum(scores.need("chosen_tokens").chosen_tokens)
    return -scores.chosen * scores.counted.sum() / tokens


def _nll_per_token(scores: PairScores) -> Values:
    return -scores.per_token(scores.chosen, scores.rejected)[0]


def irpo(scores: PairScores, *, beta: Number = 0.1, alpha: Number = 1.0) -> Values:
    r"""Iterative RPO, $\ell(\beta d) - \alpha c/n_w$ (arXiv:2404.19733)."""
    return dpo(scores, beta=beta) + alpha * _nll_per_token(scores)


def rpo(scores: PairScores, *, beta: Number = 0.01, eta: Number = 0.005) -> Values:
    r"""RPO, $\ell(\beta d) - \beta\eta c$ (arXiv:2405.16436).

    c is a sum, as in the paper; the authors' later code has the mean, which is `irpo`.
    """
    return dpo(scores, beta=beta) - beta * eta * scores.chosen


def simpo(scores: PairScores, *, beta: Number = 2.0, gamma: Number = 0.5) -> Values:
    r"""SimPO, $\ell(\beta(c/n_w - l/n_l) - \gamma)$ (arXiv:2405.14734)."""
    chosen, rejected = scores.per_token(scores.chosen, scores.rejected)
    return softplus(gamma - beta * (chosen - rejected))


def cpo(scores: PairScores, *, beta: Number = 0.1, alpha: Number = 1.0) -> Values:
    r"""CPO, $\ell(\beta(c - l))$ + α `sft`, per token as in TRL (arXiv:2401.08417)."""
    return softplus(-beta * (scores.chosen - scores.rejected)) + alpha * sft(scores)


def _log_odds(mean: Any) -> Values:
    # A response that is certain in float32 would have infinite odds.
    mean = jnp.minimum(mean, -jnp.finfo(mean.dtype).eps)
    # log(1 - e^mean), by the form that is exact; the other one's gradient must be finite too.
    near = mean > -0.7
    small, large = jnp.where(near, mean, -0.7), jnp.where(near, -0.7, mean)
    return mean - jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def orpo(scores: PairScores, *, beta: Number = 0.1, variant: Variant = "paper") -> Values:
    r"""ORPO, $\mathrm{NLL} + \beta\,\ell(o(c/n_w) - o(l/n_l))$, $o(a) = a - \log(1 - e^a)$.

    NLL is $-c/n_w$ in the paper and `sft` in the released code, there over the prompt too.
    Reference: arXiv:2403.07691.
    """
    chosen, rejected = map(jnp.asarray, scores.per_token(scores.chosen, scores.rejected))
    nll = _nll_per_token(scores) if variant == "paper" else sft(scores)
    return nll + beta * softplus(_log_odds(rejected) - _log_odds(chosen))


def f_divergence(
    scores: PairScores, kind: str = "reverse_kl", alpha: float | int = 0.5
) -> PairScores:
    r"""Return scores with $f'(e^s)$ in place of both log-ratios s, for another divergence than KL.

    reverse_kl: s; forward_kl: $1 - e^{-s}$; js: $\log 2 + \log\sigma(s)$; alpha:
    $(e^{(\alpha - 1)s} - 1)/(\alpha - 1)$, with s as the limit at α = 1. Exponents end at 80.

    Reference: arXiv:2309.16240, with the constants of TRL 1.16, which matter to losses per token.
    """
    one_of("kind", kind, get_args(Divergence))
    power = {"forward_kl": -1.0, "alpha": alpha - 1}.get(kind, 0.0)
    if kind == "reverse_kl" or (kind == "alpha" and abs(power) < 1e-6):
        return scores

    def transformed(s: Any) -> Any:
        if kind == "js":
            return jnp.log(2.0) + log_sigmoid(s)
        return jnp.expm1(jnp.minimum(power * s, MOST_EXPONENT)) / power

    chosen, rejected = transformed(scores.chosen_ratio), transformed(scores.rejected_ratio)
    return scores._replace(chosen=chosen, rejected=rejected, ref_chosen=0.0, ref_rejected=0.0)


def wpo_weight(
    log_probs: Float[Array, "B T"],
    log_square_sums: Float[Array, "B T"],
    mask: Num[ArrayLike, "B T"],
) -> Values:
    r"""Return WPO's weight of one side, $\exp \frac1n \sum_t (\log p_t - \log\sum_v p_{tv}^2)$.

    A pair's loss is multiplied by the weights of both sides. They have no gradient.

    Args:
        log_probs: $\log p_t$ of the tokens.
        log_square_sums: $\log \sum_v p_{tv}^2$ over the vocabulary.
        mask: 1 for scored tokens.

    Reference: arXiv:2406.11827, equation 2.
    """
    scored = jnp.asarray(mask) > 0
    total = jnp.sum(jnp.where(scored, log_probs - log_square_sums, 0), axis=1)
    return lax.stop_gradient(jnp.exp(total / jnp.maximum(scored.sum(axis=1), 1)))


def ld_log_probs(
    log_probs: Float[Array, "B T"],
    mask: Num[ArrayLike, "B T"],
    shared_tokens: Num[ArrayLike, " B"],
    alpha: Number,
) -> Values:
    """Return LD-DPO's c or l: tokens beyond the length of the other response count α times.

    Args:
        log_probs: of the tokens.
        mask: 1 for scored tokens.
        shared_tokens: the smaller of n_w and n_l.
        alpha: from 0, which cuts the longer response, to 1, which is DPO.

    Reference: arXiv:2409.06411.
    """
    scored = jnp.asarray(mask) > 0
    tail = jnp.cumsum(scored, axis=1) > jnp.asarray(shared_tokens)[:, None]
    return jnp.sum(jnp.where(scored, log_probs, 0) * jnp.where(tail, alpha, 1.0), axis=1)


BOUNDS: dict[str, dict[str, float]] = {
    "beta": {"above": 0.0},
    "label_smoothing": {"least": 0.0, "below": 0.5},
    "exo_pair.label_smoothing": {"least": 1e-3, "below": 0.5},  # log(0) otherwise
    "tau": {"above": 0.0},
    "consistency": {"least": 0.0, "most": 1.0},
    "f_alpha": {},
}
MEANINGS = {
    "beta": "β of the equation. With a smaller one, the optimum is further from the reference.",
    "label_smoothing": "share of pairs whose labels are assumed to be flipped.",
    "tau": "temperature of the mixture of the two losses.",
    "gamma": "margin that is asked for; of dpo_gamma, the part of the reference that counts.",
    "alpha": "weight of the likelihood of the chosen response; of d2o, that of the rejected one.",
    "eta": "weight of the likelihood of the chosen response, times beta.",
    "penalty": "weight of the fall of the chosen response below the reference.",
    "beta_chosen": "strength of the chosen log-ratio.",
    "beta_rejected": "strength of the rejected log-ratio.",
    "consistency": "agreement of two models' rankings, from 0 to 1.",
    "desirable_weight": "weight of chosen responses.",
    "undesirable_weight": "weight of rejected responses.",
    "variant": "paper, or the released code of its authors.",
}


@dataclass(frozen=True, kw_only=True)
class PairLoss(Term):
    """A loss of pairs with its options, called with scores; see `Term`."""

    bounds = BOUNDS
    needs_reference: ClassVar[bool] = True
    needs_whole_batch: ClassVar[bool] = False
    """Whether parts of the batch, as in gradient accumulation, would make another loss."""

    def __call__(self, scores: PairScores) -> Values:
        """Return the loss of each pair, [B], without the weight."""
        scores = PairScores(*(x if x is None else wide(jnp.asarray(x)) for x in scores))
        return type(self).function(self.transformed(scores), **self.options)

    def transformed(self, scores: PairScores) -> PairScores:
        """Return the scores that the function receives."""
        return scores


@dataclass(frozen=True, kw_only=True)
class DivergenceLoss(PairLoss):
    """A loss of the log-ratios alone, whose divergence from the reference may be chosen.

    Attributes:
        f_divergence: reverse_kl, forward_kl, js or alpha.
        f_alpha: order of the divergence alpha.
    """

    f_divergence: Divergence = "reverse_kl"
    f_alpha: float = 0.5

    def transformed(self, scores: PairScores) -> PairScores:
        """See `f_divergence`."""
        return f_divergence(scores, self.f_divergence, self.f_alpha)


def _row(
    function: Callable[..., Any],
    base: type[PairLoss] = PairLoss,
    *,
    reference: bool = True,
    whole_batch: bool = False,
) -> type[Any]:
    return configuration(
        function, base, MEANINGS, needs_reference=reference, needs_whole_batch=whole_batch
    )


LOSSES: dict[str, type[Any]] = {
    "dpo": _row(dpo, DivergenceLoss),
    "cdpo": _row(cdpo, DivergenceLoss),
    "robust": _row(robust, DivergenceLoss),
    "hinge": _row(hinge, DivergenceLoss),
    "ipo": _row(ipo, DivergenceLoss),
    "ipo_sum": _row(ipo_sum, DivergenceLoss),
    "exo_pair": _row(exo_pair, DivergenceLoss),
    "discopop": _row(discopop, DivergenceLoss),
    "dpo_norm": _row(dpo_norm, DivergenceLoss),
    "cream": _row(cream),
    "flex_dpo": _row(flex_dpo),
    "nca_pair": _row(nca_pair),
    "bco_pair": _row(bco_pair),
    "sppo_hard": _row(sppo_hard),
    "apo_zero": _row(apo_zero),
    "apo_down": _row(apo_down),
    "dpo_gamma": _row(dpo_gamma),
    "dpop": _row(dpop),
    "d2o": _row(d2o),
    "irpo": _row(irpo),
    "rpo": _row(rpo),
    "aot": _row(aot, whole_batch=True),
    "aot_unpaired": _row(aot_unpaired, whole_batch=True),
    "kto": _row(kto, whole_batch=True),
    "simpo": _row(simpo, reference=False),
    "cpo": _row(cpo, reference=False),
    "orpo": _row(orpo, reference=False),
    "sft": _row(sft, reference=False),
}
"""Name to a dataclass, a `PairLoss`; a new loss is a function above and a line here."""


def terms(losses: TermSpec, **shared: Any) -> tuple[PairLoss, ...]:
    """Return the losses of a specification, see `jaxlm.core.terms.terms`.

    >>> [(term.name, term.weight) for term in terms([("dpo", 0.8), {"name": "sft"}])]
    [('dpo', 0.8), ('sft', 1.0)]
    """
    return core_terms(losses, LOSSES, **shared)


def loss(
    scores: PairScores,
    losses: TermSpec = "dpo",
    *,
    beta: float | int | None = None,
    label_smoothing: float | int | None = None,
    f_divergence: str | None = None,
) -> Values:
    """Return the loss of each pair, whose mean over the batch is the loss.

    Args:
        scores: log-probabilities of the responses, see `PairScores`.
        losses: a name, or a list of names with weights, see `TermSpec`.
        beta, label_smoothing, f_divergence: for every loss that has the option, in place of its
            own; None keeps these.

    Returns:
        [B], in at least float32. `sft`, and with it `cpo`, is a mean over the tokens of this batch:
        under gradient accumulation, over those of a part.

    Raises:
        UserError: a name or an option is unknown, a number out of range, or scores are missing.

    >>> scores = PairScores(*jnp.array([[-2.0], [-3.0], [-2.0], [-3.0]]))
    >>> float(loss(scores, "dpo", beta=0.5)[0]) == float(jnp.log(2.0))
    True
    """
    shared = {"beta": beta, "label_smoothing": label_smoothing, "f_divergence": f_divergence}
    found = terms(losses, **shared)
    for option, value in shared.items():
        if value is not None and not any(hasattr(term, option) for term in found):
            taking = [name for name, kind in LOSSES.items() if hasattr(kind, option)]
            raise UserError(
                f"{option}: {found[0].name} has no such option (got {show(value)}). Leave it out, "
                f"or choose one of {', '.join(taking)}."
            )
    return sum((term.weight * term(scores) for term in found), jnp.zeros(()))

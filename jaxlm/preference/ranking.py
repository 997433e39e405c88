r"""Does a model rank the chosen response first, could it, and what does training change?

Ranking accuracy is of the policy alone, $c \ge l$; reward accuracy, which trainers log, is of its
log-ratios to the reference, $s_w > s_l$. A model may have one without the other.

References: Chen et al., "Preference Learning Algorithms Do Not Learn Preference Rankings",
arXiv:2405.19534; Razin et al., arXiv:2410.08847 (displacement). The authors' code of the former
divides log-probabilities where the paper has a ratio of probabilities; this module follows the
paper.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from jaxlm.core.checks import one_of
from jaxlm.core.terms import TermSpec
from jaxlm.preference.losses import PairScores, loss


def ranking_accuracy(
    scores: PairScores, *, length_normalize: bool = False, band: float | int = 0.0
) -> Float[Array, ""]:
    """Return the share of pairs whose chosen response is at least as likely, c >= l.

    Args:
        scores: only those of the policy are needed.
        length_normalize: compare means over tokens.
        band: log-probabilities that differ by less are a tie, which counts one half.
    """
    chosen, rejected = scores.chosen, scores.rejected
    if length_normalize:
        chosen, rejected = scores.per_token(chosen, rejected)
    difference = chosen - rejected
    return scores.mean(jnp.where(jnp.abs(difference) < band, 0.5, difference >= 0))


def reward_accuracy(scores: PairScores) -> Float[Array, ""]:
    """Return the share of pairs whose chosen response has the larger log-ratio, s_w > s_l."""
    return scores.mean(scores.margin > 0)


def idealized_ranking_accuracy(
    scores: PairScores, rate: ArrayLike, beta: ArrayLike, *, eps: float = 1e-3
) -> Float[Array, "*K"]:
    r"""Return the ranking accuracy of a policy that fits the preferences exactly.

    The optimum of DPO prefers w by $(rc - rl) + \frac1\beta \log\frac{a}{1-a}$ nats; the accuracy
    is the share of pairs where this is above 0. As β grows it is that of the reference.

    Args:
        scores: only those of the reference are needed.
        rate: a, the share of people who prefer the chosen response; a number or [B].
        beta: β, a number or [K].
        eps: rates are clipped to [eps, 1 - eps].

    Returns:
        [], or [K] for several β.
    """
    scores.need("ref_chosen", "ref_rejected")
    rate = jnp.clip(jnp.asarray(rate), eps, 1 - eps)
    prior, gain = scores.ref_chosen - scores.ref_rejected, jnp.log(rate) - jnp.log1p(-rate)
    return jnp.vectorize(lambda beta: scores.mean(prior + gain / beta > 0))(jnp.asarray(beta))


def listwise_ranking_accuracy(
    log_probs: Float[Array, "B K"], ratings: Num[ArrayLike, "B K"], *, band: float | int = 0.0
) -> Float[Array, ""]:
    """Return the ranking accuracy over all rated pairs among K responses to each prompt.

    Args:
        log_probs: of the responses, as sums or as means over tokens.
        ratings: higher is better; NaN for no response.
        band: ratings that differ by at most this are ties, which are left out.

    Returns:
        The mean over all pairs of all prompts; NaN if there is none.
    """
    ratings = jnp.asarray(ratings)
    better = ratings[:, :, None] - ratings[:, None, :] > band  # false with NaN
    right = log_probs[:, :, None] >= log_probs[:, None, :]
    return (better & right).sum() / better.sum()


def flip_threshold(scores: PairScores, beta: float | int, kind: str = "dpo") -> Float[Array, " B"]:
    r"""Return the loss at or below which a pair is ranked correctly.

    DPO: $-\log\sigma(\beta k)$ with $k = rl - rc$. IPO of sums: $(1/(2\beta) - k)^2$.

    For DPO, $c \ge l$ if and only if the loss is at most the threshold. IPO's loss is large again
    where c is far above l, so only "if" holds; where $k > 1/(2\beta)$, even loss 0 means $c < l$,
    and the threshold is -inf.

    Args:
        scores: only those of the reference are needed, and lengths for dpo_norm and ipo.
        beta: β, or τ of IPO.
        kind: the loss; for dpo_norm and ipo, ranking compares mean log-probabilities.
    """
    one_of("kind", kind, ("dpo", "dpo_norm", "ipo", "ipo_sum"))
    chosen, rejected = scores.need("ref_chosen", "ref_rejected")[2:4]
    if kind in ("dpo_norm", "ipo"):
        chosen, rejected = scores.per_token(chosen, rejected)
    k = rejected - chosen
    if kind in ("dpo", "dpo_norm"):
        return -log_sigmoid(beta * k)
    slack = 1 / (2 * beta) - k
    return jnp.where(slack >= 0, slack**2, -jnp.inf)


class FlipTable(NamedTuple):
    """For each group of pairs, their number, and how many are ranked correctly afterwards."""

    pairs: Int[Array, " G"]
    right: Int[Array, " G"]


def flip_table(
    before: PairScores, after: PairScores, edges: Sequence[float | int] = (0.0,)
) -> FlipTable:
    """Count the pairs that are ranked correctly after training, by c - l before it.

    Group g has `edges[g - 1] <= c - l < edges[g]`. With the default, group 0 has the pairs that
    were ranked wrong, of which `right` have been corrected, and group 1 the others.

    Args:
        before, after: scores of the policy at two steps.
        edges: [G - 1], increasing values of c - l in nats.
    """
    margin = before.chosen - before.rejected
    group = jnp.searchsorted(jnp.asarray(edges), jnp.asarray(margin), side="right")
    pairs = before.counted.astype(jnp.int32)
    right = pairs * (after.chosen >= after.rejected)
    groups = len(edges) + 1
    return FlipTable(*(jax.ops.segment_sum(x, group, groups) for x in (pairs, right)))


class Displacement(NamedTuple):
    """What training did to a set of pairs.

    Attributes:
        fraction: share of pairs whose chosen response became less likely.
        chosen, rejected: mean changes of c and l, in nats.
        loss: change of the mean loss. Likelihood displacement means that `loss` and `chosen` are
            both below 0.
    """

    fraction: Float[Array, ""]
    chosen: Float[Array, ""]
    rejected: Float[Array, ""]
    loss: Float[Array, ""]


def displacement(before: PairScores, after: PairScores, losses: TermSpec = "dpo") -> Displacement:
    """Compare the scores of one set of pairs at two steps of training, by a loss as in `loss`."""
    return Displacement(
        fraction=before.mean(after.chosen < before.chosen),
        chosen=before.mean(after.chosen - before.chosen),
        rejected=before.mean(after.rejected - before.rejected),
        loss=after.mean(loss(after, losses)) - before.mean(loss(before, losses)),
    )

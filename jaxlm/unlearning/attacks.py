r"""How well a model still knows texts: membership inference, memorisation, and TOFU's measures.

All are functions of numbers on the host. A statistic is small where the model knows the text. `auc`
compares it between forgotten texts and held-out texts, which are of the same kind but were never
trained on; `privleak` compares that area with the one of a retrained model.

References: MUSE, arXiv:2407.06460; TOFU, arXiv:2401.06121; open-unlearning, arXiv:2506.12618.
"""

import zlib
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import scipy
from jaxtyping import Bool, Float, Num

from jaxlm.core.checks import one_of, real
from jaxlm.core.errors import UserError

LEAST_AUC = 0.05
"""Smallest AUC of a retrained model that is accepted, since `relative_auc` divides by it."""


def min_k(
    log_probs: Float[np.ndarray, "N T"],
    mask: Num[np.ndarray, "N T"],
    k: float = 0.4,
    *,
    plus_plus: tuple[Float[np.ndarray, "N T"], Float[np.ndarray, "N T"]] | None = None,
) -> Float[np.ndarray, " N"]:
    r"""Return Min-K %, minus the mean of the $\lfloor kn \rfloor$ lowest log-probabilities.

    With k = 1 it is the mean loss.

    Args:
        log_probs: of the targets.
        mask: 1 for targets.
        k: share of the targets.
        plus_plus: mean and standard deviation of $\log p(v)$ over $v \sim p$ at each target, by
            which Min-K %++ standardises the log-probabilities.

    Raises:
        UserError: k is not above 0 and at most 1, or a text has so few targets that their share is
            none. MUSE's code returns NaN there.

    References: arXiv:2310.16789; Min-K %++, arXiv:2404.02936.

    >>> min_k(np.array([[-1.0, -2.0, -3.0, -4.0, -5.0]]), np.ones((1, 5)), 0.4)
    array([4.5])
    """
    real("k", k, above=0, most=1)
    scored = np.asarray(mask) > 0
    # A share such as 0.29 of 100 is 28.999...; the small number keeps it whole.
    counts = np.floor(k * scored.sum(axis=1) + 1e-9).astype(int)
    if short := int((counts == 0).sum()):
        raise UserError(
            f"k: this share is less than one token in {short} of {len(counts)} texts (got {k}). "
            "Raise it, or leave these out."
        )
    values = np.asarray(log_probs, np.float64)
    if plus_plus is not None:
        mean, std = (np.asarray(x, np.float64) for x in plus_plus)
        values = np.divide(values - mean, std, out=np.zeros_like(values), where=scored)
    ranked = np.sort(np.where(scored, values, np.inf), axis=1)
    lowest = np.arange(ranked.shape[1]) < counts[:, None]
    return -np.where(lowest, ranked, 0).sum(axis=1) / counts


def zlib_ratio(losses: Float[np.ndarray, " N"], texts: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Return losses over the bytes of the compressed texts, an attack of Carlini et al. (2021)."""
    return np.asarray(losses) / [len(zlib.compress(text.encode())) for text in texts]


def auc(forget: Num[np.ndarray, " N"], holdout: Num[np.ndarray, " M"]) -> float:
    r"""Return the probability that a held-out text has the lower statistic; ties count one half.

    It is 0 where the model knows the forgotten texts, 0.5 where it treats both alike, and 1 where
    it avoids the forgotten ones.

    >>> auc(np.array([1, 2, 2, 3]), np.array([2, 3, 4, 5]))
    0.15625
    """
    ranked = np.sort(_finite("holdout", holdout))
    below, upto = (np.searchsorted(ranked, _finite("forget", forget), side) for side in SIDES)
    return float(np.mean((below + upto) / (2 * len(ranked))))


SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


def _finite(name: str, values: Num[np.ndarray, " N"]) -> Num[np.ndarray, " N"]:
    if not len(values):
        raise UserError(f"{name}: is empty (got no text). Give some.")
    if not np.isfinite(values).all():
        raise UserError(f"{name}: a statistic is not finite (got nan or inf). Check the model.")
    return values


def privleak(
    forget: Num[np.ndarray, " N"], holdout: Num[np.ndarray, " M"], retrain_auc: float
) -> float:
    r"""Return MUSE's $100\,(A - A_r)/A_r$ for the `auc` A, and $A_r$ of a retrained model.

    It is 0 for that model, -100 where the forgotten texts are known, and far above 0 where
    unlearning went too far, which gives them away, too.

    Raises:
        UserError: $A_r$ is below 0.05, where the ratio says nothing.
    """
    return relative_auc(auc(forget, holdout), retrain_auc)


def relative_auc(area: float, retrain_auc: float) -> float:
    r"""Return $100\,(A - A_r)/A_r$, see `privleak`."""
    real("retrain_auc", retrain_auc, least=LEAST_AUC, most=1)
    return 100 * (area - retrain_auc) / retrain_auc


def exact_memorization(
    right: Bool[np.ndarray, "N T"], mask: Num[np.ndarray, "N T"]
) -> Float[np.ndarray, " N"]:
    """Return the share of targets that the model would choose; `right` says which these are."""
    scored = np.asarray(mask) > 0
    return (right & scored).sum(axis=1) / np.maximum(scored.sum(axis=1), 1)


def extraction_strength(
    right: Bool[np.ndarray, "N T"], mask: Num[np.ndarray, "N T"]
) -> Float[np.ndarray, " N"]:
    """Return the share of targets at the end of each text that the model would write by itself.

    That is 1 - k/n for the first k from which on all n - k targets are right. It is 0 where the
    last one is wrong; open-unlearning's code gives 1/n there.
    """
    scored = np.asarray(mask) > 0
    from_here = np.logical_and.accumulate((right | ~scored)[:, ::-1], axis=1)[:, ::-1]
    return (from_here & scored).sum(axis=1) / np.maximum(scored.sum(axis=1), 1)


Aggregate: TypeAlias = Literal["raw", "forget", "retain", "share"]


def truth_ratio(
    wrong_loss: Num[np.ndarray, " N"], true_loss: Num[np.ndarray, " N"], kind: Aggregate = "raw"
) -> Float[np.ndarray, " N"]:
    r"""Return TOFU's truth ratio $t = e^{-L_{wrong}} / e^{-L_{true}}$ of losses a token.

    Args:
        wrong_loss: mean loss of the wrong answers to each question, so that their probability is a
            geometric mean, as in the authors' code.
        true_loss: loss of the right answer.
        kind: "raw" for t; "forget" for $\min(t, 1/t)$, "retain" for $\max(0, 1 - t)$, or "share"
            for the probability of the right answer over both.
    """
    one_of("kind", kind, get_args(Aggregate))
    log_t = np.asarray(true_loss, np.float64) - np.asarray(wrong_loss)
    if kind == "raw":
        return np.exp(log_t)
    if kind == "forget":
        return np.exp(-np.abs(log_t))
    return np.maximum(0, -np.expm1(log_t)) if kind == "retain" else scipy.special.expit(-log_t)


def forget_quality(truth_ratios: Num[np.ndarray, " N"], retrained: Num[np.ndarray, " M"]) -> float:
    """Return TOFU's p-value that raw truth ratios are those of a retrained model.

    It is that of the two-sample Kolmogorov-Smirnov test.
    """
    return float(scipy.stats.ks_2samp(truth_ratios, retrained).pvalue)


def model_utility(values: Num[np.ndarray, " N"]) -> float:
    """Return the harmonic mean of measures from 0 to 1; 0 if one of them is."""
    values = np.asarray(values, np.float64)
    return float(len(values) / np.sum(1 / values)) if (values > 0).all() else 0.0

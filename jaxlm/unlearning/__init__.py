"""Unlearning: losses that forget a part of the data, attacks, and unlearning without gradients."""

from jaxlm.unlearning import bottleneck
from jaxlm.unlearning.attacks import (
    auc,
    exact_memorization,
    extraction_strength,
    forget_quality,
    min_k,
    model_utility,
    privleak,
    relative_auc,
    truth_ratio,
    zlib_ratio,
)
from jaxlm.unlearning.losses import (
    FORGET,
    RETAIN,
    TokenLoss,
    TokenScores,
    control_vector,
    dual_step,
    forget_loss,
    retain_loss,
    task_vector,
    whp_logits,
)

__all__ = [
    "FORGET",
    "RETAIN",
    "TokenLoss",
    "TokenScores",
    "auc",
    "bottleneck",
    "control_vector",
    "dual_step",
    "exact_memorization",
    "extraction_strength",
    "forget_loss",
    "forget_quality",
    "min_k",
    "model_utility",
    "privleak",
    "relative_auc",
    "retain_loss",
    "task_vector",
    "truth_ratio",
    "whp_logits",
    "zlib_ratio",
]

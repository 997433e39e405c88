"""Preference learning: losses of pairs, their side effects on likelihoods, ranking accuracy."""

from jaxlm.preference import losses
from jaxlm.preference.ches import ches, last_hidden_inner_product, negative_edit_distance
from jaxlm.preference.losses import (
    LOSSES,
    PairLoss,
    PairScores,
    f_divergence,
    ld_log_probs,
    loss,
    terms,
    wpo_weight,
)
from jaxlm.preference.ranking import (
    Displacement,
    FlipTable,
    displacement,
    flip_table,
    flip_threshold,
    idealized_ranking_accuracy,
    listwise_ranking_accuracy,
    ranking_accuracy,
    reward_accuracy,
)

__all__ = [
    "LOSSES",
    "Displacement",
    "FlipTable",
    "PairLoss",
    "PairScores",
    "ches",
    "displacement",
    "f_divergence",
    "flip_table",
    "flip_threshold",
    "idealized_ranking_accuracy",
    "last_hidden_inner_product",
    "ld_log_probs",
    "listwise_ranking_accuracy",
    "loss",
    "losses",
    "negative_edit_distance",
    "ranking_accuracy",
    "reward_accuracy",
    "terms",
    "wpo_weight",
]

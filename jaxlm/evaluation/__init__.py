"""Evaluation: how well a model chooses among options."""

from jaxlm.evaluation.classification import (
    accuracy,
    calibrate,
    calibration_offsets,
    majority_accuracy,
    option_scores,
    score_split,
)

__all__ = [
    "accuracy",
    "calibrate",
    "calibration_offsets",
    "majority_accuracy",
    "option_scores",
    "score_split",
]

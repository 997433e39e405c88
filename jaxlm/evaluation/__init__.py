"""Evaluation: what a model chooses among options, and what it writes."""

from jaxlm.evaluation.classification import (
    accuracy,
    calibrate,
    calibration_offsets,
    majority_accuracy,
    option_scores,
    score_split,
)
from jaxlm.evaluation.generation import Completion, generate_text, stream_text

__all__ = [
    "Completion",
    "accuracy",
    "calibrate",
    "calibration_offsets",
    "generate_text",
    "majority_accuracy",
    "option_scores",
    "score_split",
    "stream_text",
]

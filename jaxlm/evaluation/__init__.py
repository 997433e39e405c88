"""Evaluation: what a model chooses among options, and what it writes."""

from jaxlm.evaluation.answers import (
    Answers,
    evaluate_generation,
    exact_match,
    normalise_answer,
    token_f1,
)
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
    "Answers",
    "Completion",
    "accuracy",
    "calibrate",
    "calibration_offsets",
    "evaluate_generation",
    "exact_match",
    "generate_text",
    "majority_accuracy",
    "normalise_answer",
    "option_scores",
    "score_split",
    "stream_text",
    "token_f1",
]

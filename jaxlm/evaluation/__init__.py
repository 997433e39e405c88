"""Evaluation of a model's choices among options, and of the text that it generates."""

from jaxlm.evaluation.answers import (
    GenerationResult,
    evaluate_generation,
    exact_match,
    normalise_answer,
    token_f1,
)
from jaxlm.evaluation.calibration import (
    calibrate,
    calibration_offsets,
    domain_offsets,
    domain_scores,
    option_offsets,
    subtract_domain_scores,
)
from jaxlm.evaluation.classification import (
    accuracy,
    majority_accuracy,
    option_scores,
    score_split,
)
from jaxlm.evaluation.generation import Completion, generate_text, stream_text

__all__ = [
    "Completion",
    "GenerationResult",
    "accuracy",
    "calibrate",
    "calibration_offsets",
    "domain_offsets",
    "domain_scores",
    "evaluate_generation",
    "exact_match",
    "generate_text",
    "majority_accuracy",
    "normalise_answer",
    "option_offsets",
    "option_scores",
    "score_split",
    "stream_text",
    "subtract_domain_scores",
    "token_f1",
]

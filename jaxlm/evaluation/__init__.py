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
    is_right,
    majority_accuracy,
    option_scores,
    right_options,
    score_split,
)
from jaxlm.evaluation.generation import Completion, generate_text, stream_text
from jaxlm.evaluation.report import (
    class_report,
    confusion_matrix,
    expected_calibration_error,
    paired_standard_error,
    probabilities,
    standard_error,
)
from jaxlm.evaluation.rouge import RougeL, rouge_l
from jaxlm.evaluation.tagging import entities, tag_report
from jaxlm.evaluation.unlearning import (
    TextScores,
    UnlearningData,
    attacks,
    gradient_norms,
    halves,
    knowledge,
    text_scores,
    unlearning_report,
    verbatim,
)

__all__ = [
    "Completion",
    "GenerationResult",
    "RougeL",
    "TextScores",
    "UnlearningData",
    "accuracy",
    "attacks",
    "calibrate",
    "calibration_offsets",
    "class_report",
    "confusion_matrix",
    "domain_offsets",
    "domain_scores",
    "entities",
    "evaluate_generation",
    "exact_match",
    "expected_calibration_error",
    "generate_text",
    "gradient_norms",
    "halves",
    "is_right",
    "knowledge",
    "majority_accuracy",
    "normalise_answer",
    "option_offsets",
    "option_scores",
    "paired_standard_error",
    "probabilities",
    "right_options",
    "rouge_l",
    "score_split",
    "standard_error",
    "stream_text",
    "subtract_domain_scores",
    "tag_report",
    "text_scores",
    "token_f1",
    "unlearning_report",
    "verbatim",
]

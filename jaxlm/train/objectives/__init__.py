"""What a run minimizes: a registry of objectives, each of which names the data forms it reads.

A new objective is a subclass of `Objective` and a row of `OBJECTIVES`. It then works with every
optimizer, tuning, `dynamics` and mesh, in dry runs, and when a run resumes.
"""

from jaxlm.train.objectives.base import Objective
from jaxlm.train.objectives.likelihood import Classification, Completion, TokenClassification
from jaxlm.train.objectives.preference import Preference
from jaxlm.train.objectives.rewards import F1, Accuracy
from jaxlm.train.objectives.unlearning import Unlearn

OBJECTIVES: dict[str, type[Objective]] = {
    "classification": Classification,
    "completion": Completion,
    "token_classification": TokenClassification,
    "accuracy": Accuracy,
    "f1": F1,
    "preference": Preference,
    "unlearn": Unlearn,
}

__all__ = [
    "F1",
    "OBJECTIVES",
    "Accuracy",
    "Classification",
    "Completion",
    "Objective",
    "Preference",
    "TokenClassification",
    "Unlearn",
]

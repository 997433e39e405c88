"""Topic models learned from anchor words, and their unlearning with a bound on what is left."""

from jaxlm.topics.head import Head, head_fit, head_unlearn
from jaxlm.topics.learning import (
    TopicModel,
    cooccurrence,
    find_anchors,
    fit,
    match,
    recover,
)
from jaxlm.topics.unlearning import Privacy, Unlearned, deletion_capacity, noise_scale, unlearn

__all__ = [
    "Head",
    "Privacy",
    "TopicModel",
    "Unlearned",
    "cooccurrence",
    "deletion_capacity",
    "find_anchors",
    "fit",
    "head_fit",
    "head_unlearn",
    "match",
    "noise_scale",
    "recover",
    "unlearn",
]

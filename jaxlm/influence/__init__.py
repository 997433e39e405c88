"""Which training examples help a target: gradient features of examples, and scores from them."""

from jaxlm.core.projection import Projector, projector
from jaxlm.influence.features import (
    FeaturesInfo,
    features_info,
    features_with_info,
    gradient_features,
)

__all__ = [
    "FeaturesInfo",
    "Projector",
    "features_info",
    "features_with_info",
    "gradient_features",
    "projector",
]

"""Which training examples help a target: gradient features, a store of them, scores, selections."""

from jaxlm.core.fingerprints import fingerprint
from jaxlm.core.projection import Projector, projector
from jaxlm.influence._score import score
from jaxlm.influence._select import select
from jaxlm.influence.features import (
    FeaturesInfo,
    features_info,
    features_with_info,
    gradient_features,
)
from jaxlm.influence.specs import StoreSpec, projection_name
from jaxlm.influence.store import GradientStore
from jaxlm.influence.writer import StoreWriter

__all__ = [
    "FeaturesInfo",
    "GradientStore",
    "Projector",
    "StoreSpec",
    "StoreWriter",
    "features_info",
    "features_with_info",
    "fingerprint",
    "gradient_features",
    "projection_name",
    "projector",
    "score",
    "select",
]

"""Which training examples help a target: gradient features, a store of them, scores, selections."""

from jaxlm.artifacts.arrays import fingerprint
from jaxlm.gradients.projection import Projector, projector
from jaxlm.influence._bm25 import bm25
from jaxlm.influence._lds import LDS, lds, leave_one_out, subset_masks
from jaxlm.influence._score import score
from jaxlm.influence._select import select
from jaxlm.influence.attribution import (
    el2n,
    grad_dot,
    grand,
    pool,
    random_scores,
    representation_similarity,
    tracin,
    trak,
)
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
    "LDS",
    "FeaturesInfo",
    "GradientStore",
    "Projector",
    "StoreSpec",
    "StoreWriter",
    "bm25",
    "el2n",
    "features_info",
    "features_with_info",
    "fingerprint",
    "grad_dot",
    "gradient_features",
    "grand",
    "lds",
    "leave_one_out",
    "pool",
    "projection_name",
    "projector",
    "random_scores",
    "representation_similarity",
    "score",
    "select",
    "subset_masks",
    "tracin",
    "trak",
]

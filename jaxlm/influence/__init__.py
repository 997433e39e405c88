"""Which training examples help a target: gradient features, a store of them, scores, selections."""

from jaxlm.gradients.adam import Adam
from jaxlm.gradients.projection import Projector, projector
from jaxlm.influence.attribution import (
    bm25,
    el2n,
    grad_dot,
    grand,
    pool,
    random_scores,
    representation_similarity,
    score,
    select,
    tracin,
    trak,
)
from jaxlm.influence.datamodels import LDS, lds, leave_one_out, subset_masks
from jaxlm.influence.features import FeaturesInfo, features_with_info, gradient_features
from jaxlm.influence.store import GradientStore, StoreSpec, StoreWriter, projection_name

__all__ = [
    "LDS",
    "Adam",
    "FeaturesInfo",
    "GradientStore",
    "Projector",
    "StoreSpec",
    "StoreWriter",
    "bm25",
    "el2n",
    "features_with_info",
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

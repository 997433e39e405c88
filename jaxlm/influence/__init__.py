"""Which training examples help a target: gradient features on disk, scores, and selections."""

from jaxlm.core.fingerprints import fingerprint
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
from jaxlm.influence.specs import StoreSpec, projection_name
from jaxlm.influence.store import GradientStore
from jaxlm.influence.writer import StoreWriter

__all__ = [
    "LDS",
    "GradientStore",
    "StoreSpec",
    "StoreWriter",
    "bm25",
    "el2n",
    "fingerprint",
    "grad_dot",
    "grand",
    "lds",
    "leave_one_out",
    "pool",
    "projection_name",
    "random_scores",
    "representation_similarity",
    "score",
    "select",
    "subset_masks",
    "tracin",
    "trak",
]

"""Which training examples help a target: gradient features on disk, scores, and selections."""

from jaxlm.core.fingerprints import fingerprint
from jaxlm.influence._score import score
from jaxlm.influence._select import select
from jaxlm.influence.specs import StoreSpec, projection_name
from jaxlm.influence.store import GradientStore
from jaxlm.influence.writer import StoreWriter

__all__ = [
    "GradientStore",
    "StoreSpec",
    "StoreWriter",
    "fingerprint",
    "projection_name",
    "score",
    "select",
]

"""Transformer families as pure functions of a nested dict of parameters."""

from jaxlm.models.config import ModelConfig
from jaxlm.models.hf import from_pretrained, save_pretrained, shapes_from_pretrained
from jaxlm.models.initialise import init_params, param_shapes
from jaxlm.models.language_model import LanguageModel, add_classifier

__all__ = [
    "LanguageModel",
    "ModelConfig",
    "add_classifier",
    "from_pretrained",
    "init_params",
    "param_shapes",
    "save_pretrained",
    "shapes_from_pretrained",
]

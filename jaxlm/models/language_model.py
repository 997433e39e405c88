"""A model as users hold it: configuration, parameters, tokenizer."""

import dataclasses
from typing import Any

import jax

from jaxlm.models import transformer
from jaxlm.models.config import ModelConfig
from jaxlm.models.initialise import init_params


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A pretrained model.

    Attributes:
      config: sizes and choices.
      params: nested dict of arrays.
      tokenizer: a transformers tokenizer, or None.
    """

    config: ModelConfig
    params: Any
    tokenizer: Any = None

    def apply(self, params, input_ids, attention_mask=None, **options):
        """Logits for any parameters of this shape; see `jaxlm.models.transformer.apply`."""
        return transformer.apply(self.config, params, input_ids, attention_mask, **options)

    def hidden(self, params, input_ids, attention_mask=None, **options):
        """Hidden states [B, T, D]; see `jaxlm.models.transformer.hidden`."""
        return transformer.hidden(self.config, params, input_ids, attention_mask, **options)

    def replace(self, **changes) -> "LanguageModel":
        """A copy with some attributes changed: `lm.replace(params=trained)`."""
        return dataclasses.replace(self, **changes)


def add_classifier(lm: LanguageModel, num_labels: int, key: jax.Array) -> LanguageModel:
    """Puts a new classifier on the first token of an encoder; the pooler, if any, is kept.

    Args:
      lm: an encoder.
      num_labels: number of classes.
      key: of the new head's random initialisation.
    """
    if lm.config.kind != "encoder":
        raise ValueError("a classifier head needs an encoder; decoders are prompted instead")
    config = dataclasses.replace(lm.config, head="classifier", num_labels=num_labels, pooled=True)
    dtype = jax.tree.leaves(lm.params)[0].dtype
    fresh = init_params(dataclasses.replace(config, num_layers=1), key, dtype)
    params = {name: node for name, node in lm.params.items() if name not in ("mlm", "lm_head")}
    params = {"pooler": fresh["pooler"], **params, "classifier": fresh["classifier"]}
    return dataclasses.replace(lm, config=config, params=params)

"""A model as users hold it: configuration, parameters, tokenizer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxlm.core.paths import flatten
from jaxlm.models import generation, scoring, transformer
from jaxlm.models.config import ModelConfig
from jaxlm.models.initialise import init_leaf, nest, param_shapes


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

    def log_probs(self, params, input_ids, attention_mask=None, **options):
        """Log-probabilities [B, T - 1] of every token but the first; see `jaxlm.models.scoring`."""
        return scoring.next_token_log_probs(
            self.config, params, input_ids, attention_mask, **options
        )

    def continuation_log_probs(self, params, prompt_ids, prompt_mask, continuation_ids, **options):
        """Log-probabilities [B, C, K] of options after a prompt; see `jaxlm.models.scoring`."""
        return scoring.continuation_log_probs(
            self.config, params, prompt_ids, prompt_mask, continuation_ids, **options
        )

    def generate(self, params, input_ids, attention_mask=None, **options):
        """New tokens; see `jaxlm.models.generation.generate`."""
        return generation.generate(self.config, params, input_ids, attention_mask, **options)

    def replace(self, **changes) -> "LanguageModel":
        """A copy with some attributes changed: `lm.replace(params=trained)`."""
        return dataclasses.replace(self, **changes)


def add_classifier(
    lm: LanguageModel, num_labels: int, key: jax.Array, label_names: Sequence[str] = ()
) -> LanguageModel:
    """Puts a new classifier on the first token of an encoder, in place of any head.

    Args:
      lm: an encoder; its pooler is kept, or a new one made.
      num_labels: number of classes.
      key: of the random initialisation of what is new.
      label_names: what the classes are called, for `config.label_names`; none by default.

    Raises:
      ValueError: for a decoder, which is prompted instead; for another number of names.
    """
    if len(label_names) not in (0, num_labels):
        raise ValueError(f"label_names has {len(label_names)} names for {num_labels} classes")
    if lm.config.kind != "encoder":
        raise ValueError("a classifier needs an encoder; a decoder is prompted instead")
    config = lm.config.replace(
        head="classifier", num_labels=num_labels, label_names=tuple(label_names), pooled=True
    )
    flat = {leaf.path: leaf.value for leaf in flatten(lm.params)[0]}
    dtype = flat["embed.tokens.embedding"].dtype
    new = {
        path: init_leaf(path, shape, config, key, dtype)
        for path, shape in param_shapes(config).items()
        if path not in flat or path.startswith("classifier.")
    }
    params = {path: new[path] if path in new else flat[path] for path in param_shapes(config)}
    return dataclasses.replace(lm, config=config, params=nest(params))

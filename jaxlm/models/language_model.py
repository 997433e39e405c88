"""The object that users hold: configuration, parameters, tokenizer."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax

from jaxlm.core.errors import UserError
from jaxlm.core.paths import flatten
from jaxlm.models import generation, scoring, transformer
from jaxlm.models.config import ModelConfig
from jaxlm.models.families import family
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
        """Return logits; see `jaxlm.models.transformer.apply`."""
        return transformer.apply(self.config, params, input_ids, attention_mask, **options)

    def hidden(self, params, input_ids, attention_mask=None, **options):
        """Return hidden states [B, T, D]; see `jaxlm.models.transformer.hidden`."""
        return transformer.hidden(self.config, params, input_ids, attention_mask, **options)

    def log_probs(self, params, input_ids, attention_mask=None, **options):
        """Return log-probabilities [B, T - 1] of all tokens but the first; see `models.scoring`."""
        return scoring.next_token_log_probs(
            self.config, params, input_ids, attention_mask, **options
        )

    def continuation_log_probs(self, params, prompt_ids, prompt_mask, continuation_ids, **options):
        """Return log-probabilities [B, C, K] of options after a prompt; see `models.scoring`."""
        return scoring.continuation_log_probs(
            self.config, params, prompt_ids, prompt_mask, continuation_ids, **options
        )

    def generate(self, params, input_ids, attention_mask=None, **options):
        """Return new tokens; see `jaxlm.models.generation.generate`."""
        return generation.generate(self.config, params, input_ids, attention_mask, **options)

    def replace(self, **changes) -> "LanguageModel":
        """Return a copy with some attributes changed: `lm.replace(params=trained)`."""
        return dataclasses.replace(self, **changes)


def add_classifier(
    lm: LanguageModel,
    num_labels: int,
    key: jax.Array,
    label_names: Sequence[str] = (),
    *,
    head: Literal["classifier", "token_classifier"] = "classifier",
) -> LanguageModel:
    """Replace the head by a new classifier.

    Args:
      lm: an encoder, whose pooler is kept, or initialised if there is none; or a decoder that has
        a classifier already, or that is to have one of every token.
      num_labels: number of classes.
      key: PRNG key of the initialisation.
      label_names: names of the classes, for `config.label_names`.
      head: a classifier on the first token or `config.pooling`, or on every token.

    Raises:
      UserError: the model cannot have this head, or the number of names is not `num_labels`.
    """
    if len(label_names) not in (0, num_labels):
        raise UserError(
            f"label_names: must be {num_labels} names (got {len(label_names)}). Correct it."
        )
    encoder = lm.config.kind == "encoder"
    names = {row.path for row in family(lm.config.family).names(lm.config)}
    if head == "token_classifier" and "classifier.kernel" not in names:
        raise UserError(
            "model: a classifier of tokens needs an encoder or a decoder laid out like Llama (got "
            f"{lm.config.family}). Give another model."
        )
    if head == "classifier" and not encoder and lm.config.head != "classifier":
        raise UserError(
            f"model: a classifier needs an encoder (got {lm.config.family}). Prompt it instead."
        )
    config = lm.config.replace(
        head=head,
        num_labels=num_labels,
        label_names=tuple(label_names),
        pooled=encoder and head == "classifier",
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

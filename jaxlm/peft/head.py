"""Head tuning: only what turns the last hidden states into scores is trained."""

import jax
import jax.numpy as jnp

from jaxlm.core.errors import UserError
from jaxlm.models import LanguageModel
from jaxlm.models.initialise import nest, unnest

TABLE, HEAD = "embed.tokens.embedding", "lm_head.embedding"


def head_selection(lm: LanguageModel) -> str:
    """The regular expression that selects the head.

    That of a language model is its output embedding: where it is tied, the token embedding too is
    then trained, if `untie` was not called first. Heads of encoders are taken with their dense
    layers and biases.

    Raises:
      UserError: for a model without a head.
    """
    head = lm.config.head
    if head == "none":
        raise UserError("lm: has no head to train. Call jaxlm.models.add_classifier first.")
    if head == "classifier":
        return r"^(pooler|classifier)\."
    tied = r"|embed\.tokens\." if lm.config.tie_embeddings else ""
    return rf"^(mlm\.|lm_head\.{tied})"


def untie(lm: LanguageModel) -> LanguageModel:
    """Gives a tied model an output embedding of its own, at first a copy of the token embedding.

    A model without tied embeddings is returned as it is.

    Raises:
      UserError: for a model whose head gives no tokens.
    """
    if lm.config.head not in ("lm", "mlm"):
        raise UserError(
            f"peft: the model has no output embedding to untie (got head '{lm.config.head}'). Take "
            "lora."
        )
    if not lm.config.tie_embeddings:
        return lm
    flat = unnest(lm.params)
    flat[HEAD] = jax.tree.map(jnp.copy, flat[TABLE])
    return lm.replace(config=lm.config.replace(tie_embeddings=False), params=nest(flat))

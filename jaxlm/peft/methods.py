r"""Fine-tuning of few parameters: LoRA, prefixes, BitFit, and the head alone.

A function such as `lora` or `prefix` adds leaves to a model, and a regular expression on paths
selects what is trained. A configuration names a dataclass of `TUNINGS`, which does both:
`peft: {name: lora, rank: 4}`.

LoRA adds a product of two thin matrices to a kernel W that stays as it is:

    y = x W + b + (alpha / r) x A B,        A [in, r], B [r, out]

Prefix tuning adds m keys and values to every layer, which every token sees:

    softmax(s q [P_k; K]^T) [P_v; V],       P_k, P_v [m, G, K]

Tokens keep their positions, and no mask or window hides a prefix. As in arXiv:2305.17333, the keys
and values are trained directly, without a network that computes them.

References: LoRA, Hu et al., arXiv:2106.09685; prefix tuning, Li and Liang, arXiv:2101.00190;
BitFit, Ben Zaken et al., arXiv:2106.10199.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.core.paths import Select, path_predicate
from jaxlm.core.prng import leaf_key
from jaxlm.models import LanguageModel, adapters
from jaxlm.models.adapters import LORA, PREFIX
from jaxlm.models.initialise import nest, unnest
from jaxlm.models.transformer import empty_cache, extend
from jaxlm.typing import PRNGKey

BITFIT = r"\.bias$"
KEYS, VALUES = "layers.attention.prefix_keys", "layers.attention.prefix_values"


def lora(
    lm: LanguageModel,
    key: PRNGKey,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Select = r"attention\.(q|v)_proj",
    dtype="float32",
) -> LanguageModel:
    """Add low-rank adapters to kernels; the model computes the same until they are trained.

    Train them with `select=jaxlm.peft.LORA`. B starts at 0, so the first gradient of A is 0, and a
    zeroth-order step sees A only together with a perturbed B.

    Args:
      lm: the model; its kernels may be packed.
      key: PRNG key of A, which is uniform between ±1 / sqrt(in).
      rank: r.
      alpha: numerator of the factor alpha / r, which becomes `config.lora_scale`.
      targets: which kernels, a regular expression searched in their paths or a predicate.
      dtype: dtype of the adapters; float32 keeps small steps, whatever dtype the weights have.

    Returns:
      A model with additional leaves, `lora_a` and `lora_b`. It shares other arrays with `lm`.

    Raises:
      UserError: the model already has LoRA, no kernel is selected, alpha is not finite,
        or the rank is below 1 or above the largest side of the matrices.
    """
    flat = unnest(lm.params)
    refuse_second(lm)
    checks.integer("rank", rank)
    checks.real("alpha", alpha, least=-1e30, most=1e30)
    kernels = [path for path in flat if path.endswith(".kernel")]
    is_target = path_predicate(targets, "targets")
    chosen = [path for path in kernels if is_target(path)]
    if not chosen:
        shown = ", ".join(kernels[:8]) + (", ..." if len(kernels) > 8 else "")
        raise UserError(f"targets: selects no kernel (got {targets!r}). Name some of {shown}.")
    most = max(max(flat[path].shape[-2:]) for path in chosen)
    if rank > most:
        raise UserError(
            f"rank: must be at most {most}, the side of the largest matrix (got {rank}). Lower it."
        )
    for path in chosen:
        *stack, size_in, size_out = flat[path].shape
        left = path.removesuffix(".kernel") + ".lora_a"
        bound = 1 / math.sqrt(size_in)
        shape = (*stack, size_in, rank)
        drawn = jax.random.uniform(leaf_key(key, left), shape, jnp.float32, -bound, bound)
        flat[left] = drawn.astype(dtype)
        flat[left[:-1] + "b"] = jnp.zeros((*stack, rank, size_out), dtype)
    return lm.replace(config=lm.config.replace(lora_scale=alpha / rank), params=nest(flat))


def refuse_second(lm: LanguageModel) -> None:
    """Raise UserError for a model with low-rank adapters, since all adapters share one scale."""
    if adapters.has(lm.params, LORA):
        raise UserError(
            "lm: has a LoRA adapter already (got lora_a). Call jaxlm.peft.merge on it first."
        )


def merge(lm: LanguageModel) -> LanguageModel:
    """Return the same model with kernels `W + (alpha / r) A B`, summed in float32.

    Raises:
      UserError: a kernel with an adapter is packed.
    """
    params = adapters.merge(lm.config, lm.params)
    return lm.replace(config=lm.config.replace(lora_scale=1.0), params=params)


def prefix(
    lm: LanguageModel,
    key: PRNGKey,
    *,
    length: int = 5,
    init: Literal["activations", "normal"] = "activations",
    dtype="float32",
) -> LanguageModel:
    """Add a prefix to the keys and values of every layer; train it with `select=PREFIX`.

    A prefix has no tap (`jaxlm.core.taps`).

    Args:
      lm: the model.
      key: PRNG key of the initialisation.
      length: m.
      init: `activations` takes keys and values of m tokens that are drawn uniformly from the
        vocabulary and read by the model; `normal` draws from N(0, 1).
      dtype: dtype of the prefix.

    Returns:
      A model with the additional leaves `layers.attention.prefix_keys` and `prefix_values`, each
      [L, m, G, K]. It shares the other arrays with `lm`.

    Raises:
      UserError: the model has a prefix already, or the length is not from 1 to `max_positions`.
    """
    config = lm.config
    if adapters.has(lm.params, PREFIX):
        raise UserError("lm: has a prefix already (got prefix_keys). Give the model without it.")
    checks.integer("length", length, most=config.max_positions)
    checks.one_of("init", init, ("activations", "normal"))
    if init == "activations":
        draw = leaf_key(key, KEYS)
        ids = jax.random.randint(draw, (1, length), 0, config.vocab_size, jnp.int32)
        keys, values = activations(lm, ids)
    else:
        shape = (config.num_layers, length, config.num_kv_heads, config.head_size)
        keys, values = (
            jax.random.normal(leaf_key(key, path), shape, jnp.float32) for path in (KEYS, VALUES)
        )
    leaves = {KEYS: keys.astype(dtype), VALUES: values.astype(dtype)}
    return lm.replace(params=nest(unnest(lm.params) | leaves))


def activations(lm: LanguageModel, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return keys and values [L, T, G, K] of one row of tokens [1, T], as attention sees them."""
    dtype = lm.config.compute_dtype or lm.params["embed"]["tokens"]["embedding"].dtype
    cache = empty_cache(lm.config, 1, ids.shape[1], dtype)
    _, cache = extend(lm.config, lm.params, ids, None, cache)
    keys, values = (jnp.swapaxes(x[:, 0], 1, 2) for x in (cache.keys, cache.values))
    return keys, values


def bitfit_selection(lm: LanguageModel) -> str:
    """Return `BITFIT`, the regular expression that selects biases.

    Raises:
      UserError: the model has no biases, like most Llamas.
    """
    if not adapters.has(lm.params, BITFIT):
        raise UserError(
            f"peft: needs a model with biases (got {lm.config.family}). Choose lora or head."
        )
    return BITFIT


def head_selection(lm: LanguageModel) -> str:
    """Return the regular expression that selects the head.

    For a language model that is its output embedding. If it is tied, the token embedding is
    trained with it, unless `untie` was called before. The head of an encoder includes its dense
    layers and biases.

    Raises:
      UserError: the model has no head.
    """
    head = lm.config.head
    if head == "none":
        raise UserError("lm: has no head to train (got 'none'). Call add_classifier first.")
    if head in ("classifier", "token_classifier"):
        return r"^(pooler|classifier)\."
    tied = r"|embed\.tokens\." if lm.config.tie_embeddings else ""
    return rf"^(mlm\.|lm_head\.{tied})"


def untie(lm: LanguageModel) -> LanguageModel:
    """Give a tied model its own output embedding, a copy of the token embedding.

    A model without tied embeddings is returned as it is.

    Raises:
      UserError: the model has no head of tokens.
    """
    if lm.config.head not in ("lm", "mlm"):
        raise UserError(
            f"peft: the model has no output embedding to untie (got head '{lm.config.head}'). "
            "Choose lora."
        )
    if not lm.config.tie_embeddings:
        return lm
    flat = unnest(lm.params)
    flat["lm_head.embedding"] = jax.tree.map(jnp.copy, flat["embed.tokens.embedding"])
    return lm.replace(config=lm.config.replace(tie_embeddings=False), params=nest(flat))


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A kind of fine-tuning.

    Attributes:
        name: key in `TUNINGS`.
    """

    name: str

    def prepare(self, lm: LanguageModel, key: PRNGKey) -> LanguageModel:
        """Return the model with the leaves to train."""
        del key
        return lm

    def select(self, lm: LanguageModel) -> str:
        """Return the regular expression that selects what is trained in a prepared model."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Lora(Tuning):
    """Low-rank adapters, `jaxlm.peft.lora`.

    Attributes:
        rank: rank of the adapters.
        alpha: numerator of their factor alpha / rank.
        targets: regular expression searched in the paths of kernels.
    """

    name: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: str = r"attention\.(q|v)_proj"

    def __post_init__(self):
        checks.whole(self, "rank", section="peft.")
        checks.number(self, "alpha", above=0.0, most=1e30, section="peft.")
        checks.regex("peft.targets", self.targets)

    def prepare(self, lm: LanguageModel, key: PRNGKey) -> LanguageModel:
        return lora(lm, key, rank=self.rank, alpha=self.alpha, targets=self.targets)

    def select(self, lm: LanguageModel) -> str:
        return LORA


@dataclass(frozen=True, kw_only=True)
class Prefix(Tuning):
    """Keys and values before those of the tokens, `jaxlm.peft.prefix`.

    Attributes:
        length: length of the prefix.
        init: how it is initialised.
    """

    name: str = "prefix"
    length: int = 5
    init: Literal["activations", "normal"] = "activations"

    def __post_init__(self):
        checks.whole(self, "length", section="peft.")

    def prepare(self, lm: LanguageModel, key: PRNGKey) -> LanguageModel:
        return prefix(lm, key, length=self.length, init=self.init)

    def select(self, lm: LanguageModel) -> str:
        return PREFIX


@dataclass(frozen=True, kw_only=True)
class BitFit(Tuning):
    """The biases alone."""

    name: str = "bitfit"

    def select(self, lm: LanguageModel) -> str:
        return bitfit_selection(lm)


@dataclass(frozen=True, kw_only=True)
class Head(Tuning):
    """The head alone.

    Attributes:
        untie: whether a tied head first gets its own output embedding, so that the token embedding
            is not trained.
    """

    name: str = "head"
    untie: bool = False

    def prepare(self, lm: LanguageModel, key: PRNGKey) -> LanguageModel:
        return untie(lm) if self.untie else lm

    def select(self, lm: LanguageModel) -> str:
        return head_selection(lm)


TUNINGS: dict[str, type[Tuning]] = {
    "lora": Lora,
    "prefix": Prefix,
    "bitfit": BitFit,
    "head": Head,
}

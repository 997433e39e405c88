"""The one configuration that describes every model family."""

import dataclasses
from typing import Any, Literal

Kind = Literal["decoder", "encoder"]
Head = Literal["lm", "mlm", "classifier", "token_classifier", "none"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Rope = Literal["linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than those of pretraining.

    Attributes:
      kind: `linear` divides every frequency by `factor`. `llama3` divides only those that make few
        turns within `original_positions`. `yarn` (arXiv:2309.00071) blends by the number of turns
        as well, and also scales the attention.
      factor: how much longer the context is.
      original_positions: length of the context in pretraining.
      slow, fast: a frequency with fewer turns than `slow` is divided; one with more than `fast` is
        kept.
      attention_factor: factor of cosines and sines.
      truncate: whether yarn rounds the bounds of its blend to whole pairs.
    """

    kind: Rope
    factor: float
    original_positions: int = 0
    slow: float = 1.0
    fast: float = 32.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes and choices of a transformer; a family module maps it to and from the HF config.

    Attributes:
      family: name of the module in `models/families` that reads and writes this model.
      kind: `decoder` attends causally, `encoder` in both directions.
      head: next-token logits, masked-token logits, a classifier on one token or on every token, or
        no head.
      embedding_size: width of the token embedding; projected to `hidden_size` if they differ.
      positions: absolute `learned` embeddings, or `rotary`.
      position_offset: index of the first position in the table (OPT 2, RoBERTa 2).
      token_types: number of segment embeddings; 0 for none.
      norm_bias: whether a LayerNorm has a bias.
      norm_offset: number added to a stored scale (Gemma stores scale - 1).
      norm_position: norm of the input of each sublayer (`pre`), of the sum with the residual
        (`post`), of the output of the sublayer (`after`), or of input and output (`both`).
      first_norm: whether the first layer norms the input of its attention, like the others.
      parallel: attention and MLP read the same residual, and both are added to it (GPT-NeoX).
      rotary_size: number of leading elements of a head that are rotated; None for all.
      local_rope_theta: theta of layers with a window, which are not scaled; None for that of all.
      unrotated: for each layer, whether its heads are not rotated; empty if all are.
      query_key_norm: RMSNorm of queries and keys, of each `head` or of `all` heads together.
      clip_qkv: bound on the absolute value of queries, keys and values.
      window: number of last tokens, itself included, that a query of a windowed layer sees; in an
        encoder, as many next ones too.
      windowed: for each layer, whether it has the window; empty if none has.
      attention_scale: factor of the scores; None for `head_size**-0.5`.
      attention_cap, logit_cap: c of the soft cap `c tanh(x / c)` of scores and of logits.
      embedding_scale: factor of the token embeddings.
      residual_scale: factor of what a sublayer adds to the residual; None for 1.
      logit_divisor: number by which logits are divided; None for 1.
      head_bias: whether the dense layer of the masked-token head has a bias.
      pooled: whether there is a pooler for the classifier to read.
      pooler: a dense layer with `tanh` or `relu`; or dense layer and norm of the masked-token head
        (`mlm`), which the classifier, or that of every token, then shares.
      pooling: what the pooler reads, the `first` token or the `mean` of all; or the `last` token,
        which the classifier of a decoder reads itself.
      num_labels: number of classes of the classifier.
      label_names: names of the classes in order, or empty.
      bos_id, eos_id, pad_id: special token ids, or None; the first one if HF lists several.
      stop_ids: tokens that end a generated text, if not `eos_id` alone.
      attention: implementation, one of `jaxlm.models.attention.IMPLEMENTATIONS`.
      score_gradient: whether gradients pass through the attention weights. False treats the weights
        as constants, so that queries and keys get no gradient from them.
      remat: what the backward pass recomputes: `none`; the whole `layer`; or everything but matrix
        products with parameters and the output of attention (`dots`), which is faster and smaller
        than keeping everything.
      lora_scale: factor of `x @ lora_a @ lora_b` if the tree has these leaves (`jaxlm.peft`).
      compute_dtype: dtype to which parameters are cast when they are read; None for their own.
    """

    family: str
    kind: Kind
    head: Head
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    max_positions: int
    embedding_size: int
    activation: Activation
    gated_mlp: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_affine: bool = True
    norm_bias: bool = True
    norm_offset: float = 0.0
    norm_position: Literal["pre", "post", "after", "both"] = "pre"
    first_norm: bool = True
    parallel: bool = False
    embedding_norm: bool = False
    final_norm: bool = True
    positions: Literal["learned", "rotary"] = "learned"
    position_offset: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_size: int | None = None
    local_rope_theta: float | None = None
    unrotated: tuple[bool, ...] = ()
    query_key_norm: Literal["head", "all"] | None = None
    clip_qkv: float | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float | None = None
    residual_scale: float | None = None
    logit_divisor: float | None = None
    token_types: int = 0
    attention_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    tie_embeddings: bool = True
    head_bias: bool = True
    pooled: bool = False
    pooler: Literal["tanh", "relu", "mlm"] = "tanh"
    pooling: Literal["first", "mean", "last"] = "first"
    num_labels: int = 0
    label_names: tuple[str, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    lora_scale: float = 1.0
    attention: str = "xla"
    score_gradient: bool = True
    remat: Literal["none", "layer", "dots"] = "dots"
    compute_dtype: str | None = None

    @property
    def transforms(self) -> bool:
        """Whether the head applies dense layer and norm of the masked-token head to every token."""
        return self.head == "mlm" or (self.head == "token_classifier" and self.pooler == "mlm")

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end a generated text: `stop_ids`, or `eos_id`, or none."""
        return self.stop_ids or (() if self.eos_id is None else (self.eos_id,))

    @property
    def longest_text(self) -> int:
        """Largest number of tokens of a text, generated ones included."""
        # With scaled rotary positions, some configurations give the length before scaling and
        # others the length after it, so take the larger of the two.
        scaling = self.rope_scaling
        if scaling is None:
            return self.max_positions
        original = scaling.original_positions or self.max_positions
        return max(self.max_positions, int(original * scaling.factor))

    def replace(self, **changes: Any) -> "ModelConfig":
        """Return a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

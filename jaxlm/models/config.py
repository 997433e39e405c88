"""The one configuration that describes every model family."""

import dataclasses
from typing import Any, Literal

Kind = Literal["decoder", "encoder"]
Head = Literal["lm", "mlm", "classifier", "none"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Rope = Literal["linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining.

    Attributes:
      kind: `linear` divides every frequency by `factor`; `llama3` only the slow ones, by how often
        they turn within `original_positions`; `yarn` (arXiv:2309.00071) blends by the same count
        and scales the attention.
      factor: how many times longer.
      original_positions: positions of pretraining.
      slow, fast: turns within the original positions below which a frequency is divided, and above
        which it stays.
      attention_factor: multiplies cosines and sines.
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
    """A transformer by its sizes and choices; the family file maps it to and from the HF config.

    Attributes:
      family: name of the module in `models/families` that reads and writes this model.
      kind: `decoder` attends causally, `encoder` in both directions.
      head: what stands on top: next-token logits, masked-token logits, a classifier on the first
        token, or nothing.
      embedding_size: width of the token embedding; projected to `hidden_size` where it differs.
      positions: absolute `learned` embeddings, or `rotary`.
      position_offset: index of the first position in the table (OPT 2, RoBERTa 2).
      token_types: number of segment embeddings, 0 for none.
      norm_offset: added to a stored scale (Gemma stores scale - 1).
      norm_position: norm before each sublayer (`pre`), after the residual sum (`post`), of what the
        sublayer adds (`after`), or both `pre` and `after` (`both`).
      parallel: attention and MLP read the same residual, and both are added to it (GPT-NeoX).
      rotary_size: leading elements of a head that turn; all if None.
      query_key_norm: RMSNorm of each head's queries and keys (`head`) or of all heads together.
      clip_qkv: bound on the size of queries, keys and values.
      window: how many tokens back, itself included, a query of a windowed layer sees.
      windowed: for each layer, whether it has the window; empty for no layer.
      attention_scale: factor of the scores; `head_size**-0.5` if None.
      attention_cap, logit_cap: c of the soft cap `c tanh(x / c)` of scores and of logits.
      embedding_scale: factor of the token embeddings.
      pooled: there is a pooler, tanh(dense(first token)), which the classifier reads.
      num_labels: classes of the classifier.
      label_names: what the classes are called, in their order; empty for classes without names.
      bos_id, eos_id, pad_id: special token ids, or None; the first where HF lists several.
      stop_ids: tokens that end a generated text, where there are others than `eos_id`.
      attention: implementation, one of `jaxlm.models.attention.IMPLEMENTATIONS`.
      remat: what the backward pass computes again: `none`, the whole `layer`, or all but the
        products with its matrices and what attention returns (`dots`), which is faster than keeping
        everything, and smaller.
      lora_scale: factor of `x @ lora_a @ lora_b` where the tree has these leaves (`jaxlm.peft`).
      compute_dtype: parameters are cast to it when they are read; None computes in theirs.
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
    norm_offset: float = 0.0
    norm_position: Literal["pre", "post", "after", "both"] = "pre"
    parallel: bool = False
    embedding_norm: bool = False
    final_norm: bool = True
    positions: Literal["learned", "rotary"] = "learned"
    position_offset: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_size: int | None = None
    query_key_norm: Literal["head", "all"] | None = None
    clip_qkv: float | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float | None = None
    token_types: int = 0
    attention_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    tie_embeddings: bool = True
    pooled: bool = False
    num_labels: int = 0
    label_names: tuple[str, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    lora_scale: float = 1.0
    attention: str = "xla"
    remat: Literal["none", "layer", "dots"] = "dots"
    compute_dtype: str | None = None

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end a generated text: `stop_ids`, or `eos_id`, or none."""
        return self.stop_ids or (() if self.eos_id is None else (self.eos_id,))

    @property
    def longest_text(self) -> int:
        """How many tokens a text may have, new ones included.

        Some configurations with stretched rotary positions tell the length before, others the one
        after stretching: the larger of both counts.
        """
        scaling = self.rope_scaling
        if scaling is None:
            return self.max_positions
        original = scaling.original_positions or self.max_positions
        return max(self.max_positions, int(original * scaling.factor))

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

"""The one configuration that describes every model family."""

import dataclasses
from typing import Literal

Kind = Literal["decoder", "encoder"]
Head = Literal["lm", "mlm", "classifier", "none"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


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
      norm_position: norm before each sublayer (`pre`) or after the residual sum (`post`).
      pooled: there is a pooler, tanh(dense(first token)), which the classifier reads.
      num_labels: classes of the classifier.
      bos_id, eos_id, pad_id: special token ids, or None; the first where HF lists several.
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
    norm_position: Literal["pre", "post"] = "pre"
    embedding_norm: bool = False
    final_norm: bool = True
    positions: Literal["learned", "rotary"] = "learned"
    position_offset: int = 0
    rope_theta: float = 10000.0
    token_types: int = 0
    attention_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    tie_embeddings: bool = True
    pooled: bool = False
    num_labels: int = 0
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None

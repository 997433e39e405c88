"""Model families: one module each maps HF configurations and weight names to ours.

A family module has `PREFIX`, the HF name of the model without its head, which some checkpoints
leave out; `read_config(hf)` and `write_config(config)`; and `names(config)`, a list of `Name`. A
path may occur several times in it: the first name that a checkpoint holds is read, all are written.
"""

import dataclasses
import importlib
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxlm.models.config import Activation, ModelConfig, RopeScaling

MODULES = (
    "bert",
    "distilbert",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "modernbert",
    "olmo",
    "olmo2",
    "olmo3",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "roberta",
    "smollm3",
)
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclasses.dataclass(frozen=True)
class Name:
    """Where a HF checkpoint holds one of our leaves.

    Attributes:
      path: our path.
      hf: the HF name, with `{layer}` under `layers`.
      transpose: whether HF keeps the matrix as [out, in], like Linear of torch.
      part: (i, n) if our leaf is the i-th of n equal parts of the HF tensor, on its last axis after
        the transpose.
      span: number of these parts that our leaf fills, from the i-th on.
      groups: number of equal groups of that axis, each of which holds all n parts side by side.
    """

    path: str
    hf: str
    transpose: bool = False
    part: tuple[int, int] = (0, 1)
    span: int = 1
    groups: int = 1

    def whole(self, length: int) -> int:
        """Return the length of the HF tensor's last axis, given that of ours."""
        return length // self.span * self.part[1]


def linear(
    path: str,
    hf: str,
    part: tuple[int, int] = (0, 1),
    span: int = 1,
    groups: int = 1,
    transpose: bool = True,
) -> list[Name]:
    """Return the names of `kernel` and `bias` of a torch Linear, or of parts of one."""
    return [
        Name(path + ".kernel", hf + ".weight", transpose, part, span, groups),
        Name(path + ".bias", hf + ".bias", False, part, span, groups),
    ]


def layer_norm(path: str, hf: str) -> list[Name]:
    """Return the names of a torch LayerNorm or RMSNorm."""
    return [Name(path + ".scale", hf + ".weight"), Name(path + ".bias", hf + ".bias")]


SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "activation": "hidden_act",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
"""Fields of `ModelConfig` and their usual HF keys."""
CLASSIFIERS = {
    "classifier": "ForSequenceClassification",
    "token_classifier": "ForTokenClassification",
}
"""How HF's classes of models with a classifier end, by our head."""


def read_fields(hf: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Return fields of a decoder's `ModelConfig`: those in `keys`, special ids and usual sizes.

    `keys` maps a field to the HF key with the same meaning; a missing one raises KeyError.
    """
    fields = {ours: hf[theirs] for ours, theirs in keys.items()}
    fields["activation"] = read_activation(hf, keys["activation"])
    width, heads = fields["hidden_size"], fields["num_heads"]
    sizes = {"num_kv_heads": heads, "head_size": width // heads, "embedding_size": width}
    return {"kind": "decoder", "head": "lm", **sizes, **fields, **read_special_ids(hf)}


def write_fields(config: ModelConfig, keys: Mapping[str, str], architecture: str) -> dict[str, Any]:
    """Return the HF keys of `read_fields`, with the HF class that opens them."""
    fields = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    fields[keys["activation"]] = write_activation(config.activation)
    if config.head in CLASSIFIERS:
        architecture = architecture.replace("ForCausalLM", CLASSIFIERS[config.head])
        names = config.label_names or [f"LABEL_{i}" for i in range(config.num_labels)]
        fields["id2label"] = dict(enumerate(names))
        fields["label2id"] = {name: i for i, name in enumerate(names)}
    kind = {"model_type": config.family, "architectures": [architecture]}
    return {**kind, **fields, **write_special_ids(config)}


def require(hf: dict[str, Any], key: str, accepted: Any) -> None:
    """Raise ValueError if the value of `key` in the HF config is not implemented here."""
    if hf.get(key, accepted) != accepted:
        raise ValueError(
            f"{key} is not supported (got {hf[key]!r}). Use a model with {accepted!r}."
        )


def read_activation(hf: dict[str, Any], key: str) -> Activation:
    """Return our name of the activation at `key`; raise ValueError if there is none."""
    name = hf[key]
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{key} is not supported (got {name!r}). Use a model with one of {known}.")
    return _ACTIVATIONS[name]


def write_activation(activation: Activation) -> str:
    """Return the HF name of one of our activations."""
    return next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == activation)


def read_special_ids(hf: dict[str, Any]) -> dict[str, Any]:
    """Return `bos_id`, `eos_id`, `pad_id` and `stop_ids` for `ModelConfig`."""
    fields: dict[str, Any] = {}
    for name in ("bos", "eos", "pad"):
        ids = hf.get(f"{name}_token_id")
        several = [i for i in (ids if isinstance(ids, list) else [ids]) if i not in (None, -1)]
        fields[name + "_id"] = several[0] if several else None
        if name == "eos":
            fields["stop_ids"] = tuple(several) if isinstance(ids, list) else ()
    return fields


def write_special_ids(config: ModelConfig) -> dict[str, Any]:
    """Return the HF keys of the special token ids."""
    ids = {f"{name}_token_id": getattr(config, name + "_id") for name in ("bos", "eos", "pad")}
    return ids | ({"eos_token_id": list(config.stop_ids)} if config.stop_ids else {})


def read_rope(hf: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` for `ModelConfig`, from old and new HF configs."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    for kind in ("full_attention", "sliding_attention"):  # `split_rope` takes them apart
        require(rope, kind, None)
    theta = rope.get("rope_theta") or hf.get("rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3", "yarn"):
        known = "default, linear, llama3, yarn"
        raise ValueError(f"rope_type is not supported (got {kind!r}). Use a model with {known}.")
    scaling = RopeScaling(kind, float(rope["factor"]))
    if kind != "linear":
        original = rope.get("original_max_position_embeddings") or hf["max_position_embeddings"]
        scaling = dataclasses.replace(scaling, original_positions=original)
    if kind == "llama3":
        slow, fast = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        scaling = dataclasses.replace(scaling, slow=slow, fast=fast)
    if kind == "yarn":
        given = rope.get("attention_factor")
        scaling = dataclasses.replace(
            scaling,
            slow=float(rope.get("beta_slow") or 1),
            fast=float(rope.get("beta_fast") or 32),
            attention_factor=float(_yarn_attention(rope) if given is None else given),
            truncate=rope.get("truncate", True),
        )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _yarn_attention(rope: dict[str, Any]) -> float:
    """Return the factor of cosines and sines that YaRN derives if the config gives none."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    one, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(one) / scale(all_dims) if one and all_dims else scale(1.0)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Return the HF `rope_parameters`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is None:
        return rope
    rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return rope
    rope["original_max_position_embeddings"] = scaling.original_positions
    if scaling.kind == "llama3":
        return rope | {"low_freq_factor": scaling.slow, "high_freq_factor": scaling.fast}
    return rope | {
        "beta_slow": scaling.slow,
        "beta_fast": scaling.fast,
        "attention_factor": scaling.attention_factor,
        "truncate": scaling.truncate,
    }


def split_rope(hf: dict[str, Any], theta: float, local: float) -> tuple[dict[str, Any], float]:
    """Return a HF config for `read_rope`, and `local_rope_theta`.

    `theta` and `local` are those of layers without and with a window if `rope_parameters` has none.
    """
    rope = hf.get("rope_parameters") or {}
    windowed = rope.get("sliding_attention") or {}
    require(windowed, "rope_type", "default")
    full = rope.get("full_attention") or hf.get("rope_scaling") or {}
    hf = {**hf, "rope_parameters": {"rope_theta": theta, **full}}
    return hf, windowed.get("rope_theta") or local


def write_both_ropes(config: ModelConfig) -> dict[str, Any]:
    """Return the HF `rope_parameters` of layers without and with a window."""
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return {"full_attention": write_rope(config), "sliding_attention": local}


def read_windows(hf: dict[str, Any], default: tuple[bool, ...]) -> dict[str, Any]:
    """Return `window` and `windowed` for `ModelConfig`; `default` if there are no layer types."""
    window, kinds = hf.get("sliding_window"), hf.get("layer_types")
    windowed = default if kinds is None else tuple(x == "sliding_attention" for x in kinds)
    if len(windowed) not in (0, layers := hf["num_hidden_layers"]):
        raise ValueError(
            f"layer_types must name {layers} layers (got {len(windowed)}). Correct it, or download "
            "the file again."
        )
    if window is None or not any(windowed):
        return {}
    return {"window": window, "windowed": windowed}


def local_layers(hf: dict[str, Any], every: int) -> list[str]:
    """Return the HF `layer_types` of a family in which each `every`-th layer has no window."""
    layers = range(1, hf["num_hidden_layers"] + 1)
    return ["sliding_attention" if layer % every else "full_attention" for layer in layers]


def write_windows(config: ModelConfig, unused: int | None = None) -> dict[str, Any]:
    """Return the HF keys of the windows; `unused` is the size where no layer has one."""
    windowed = config.windowed or (False,) * config.num_layers
    kinds = ["sliding_attention" if local else "full_attention" for local in windowed]
    return {"sliding_window": config.window or unused, "layer_types": kinds}


def family(model_type: str) -> ModuleType:
    """Return the module of a HF `model_type`; raise KeyError if there is none."""
    if model_type not in MODULES:
        raise KeyError(model_type)
    return importlib.import_module(f"{__name__}.{model_type}")

"""What each field of config.json may hold: one table, so that no reader of a family meets another.

A field has the same meaning in every family that has it. Fields that no family reads are not looked
at.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxlm.core.checks import MOST, show
from jaxlm.core.errors import UserError
from jaxlm.models.config import ModelConfig


class Kind(NamedTuple):
    """A kind of value: what a message asks for, and whether a value is of it."""

    wanted: str
    holds: Callable[[Any], bool]


def whole(least: int = 1, most: int = MOST) -> Kind:
    """Whole numbers; `2.0` and `true` are none."""
    return Kind(
        f"a whole number from {least} to {most}", lambda x: type(x) is int and least <= x <= most
    )


def number(above: float = 0.0, most: float = 1e30) -> Kind:
    """Finite numbers; a whole number is one. The comparison is exact for any count of digits."""
    return Kind(
        f"a number above {above:g} and at most {most:g}",
        lambda x: type(x) in (int, float) and above < x <= most,
    )


def optional(kind: Kind) -> Kind:
    """A kind, or null."""
    return Kind(f"{kind.wanted}, or null", lambda x: x is None or kind.holds(x))


def texts(*known: str) -> Kind:
    """Lists of texts, of those that are known if any are given."""
    wanted = f"a list of {', '.join(known)}" if known else "a list of texts"
    return Kind(
        wanted,
        lambda x: (
            isinstance(x, list)
            and all(isinstance(item, str) and (not known or item in known) for item in x)
        ),
    )


FLAG = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a text", lambda x: isinstance(x, str))
SECTION = Kind("a section", lambda x: isinstance(x, dict))
WIDTH, DEPTH = whole(1, 2**24), whole(1, 2**16)
TOKEN = whole(-1)  # -1 means none in some configurations
TOKENS = Kind(
    "a token id, a list of at least one, or null",
    lambda x: (
        x is None
        or TOKEN.holds(x)
        or (isinstance(x, list) and len(x) > 0 and all(map(TOKEN.holds, x)))
    ),
)
LABELS = Kind(
    "a text for each of the classes 0, 1, ...",
    lambda x: (
        isinstance(x, dict)
        and {*x} == {str(i) for i in range(len(x))}
        and all(isinstance(name, str) for name in x.values())
    ),
)

FIELDS = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), whole()),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "ffn_dim"), WIDTH),
    **dict.fromkeys(("n_inner", "word_embed_proj_dim", "head_dim"), optional(WIDTH)),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_attention_heads", "n_head"), DEPTH),
    "num_key_value_heads": optional(DEPTH),
    "type_vocab_size": whole(0, 2**16),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"), number(most=1.0)),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), optional(TEXT)),
    **dict.fromkeys(
        (
            *("attention_bias", "mlp_bias", "enable_bias", "tie_word_embeddings"),
            *("use_parallel_residual", "use_sliding_window", "do_layer_norm_before"),
            *("_remove_final_layer_norm", "layer_norm_elementwise_affine"),
        ),
        FLAG,
    ),
    **dict.fromkeys(("rope_theta", "rotary_emb_base"), number(above=1.0)),
    "rotary_pct": number(most=1.0),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), optional(SECTION)),
    "sliding_window": optional(whole()),
    "max_window_layers": whole(0),
    "layer_types": optional(texts("full_attention", "sliding_attention")),
    "query_pre_attn_scalar": whole(),
    **dict.fromkeys(
        ("clip_qkv", "attn_logit_softcapping", "final_logit_softcapping"), optional(number())
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKENS),
    "id2label": optional(LABELS),
    "architectures": optional(texts()),
}
ROPE = {
    **dict.fromkeys(("rope_type", "type"), TEXT),
    "rope_theta": optional(number(above=1.0)),
    "original_max_position_embeddings": optional(whole()),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), number()),
    **dict.fromkeys(
        ("beta_slow", "beta_fast", "attention_factor", "mscale", "mscale_all_dim"),
        optional(number()),
    ),
    "partial_rotary_factor": number(most=1.0),
    "truncate": FLAG,
    # Frequencies of their own for each type of layer, which no family here has.
    **dict.fromkeys(("full_attention", "sliding_attention"), Kind("left out", lambda x: False)),
}


def check_fields(found: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Holds the fields that are there against the table.

    Args:
      found: the fields.
      kinds: `FIELDS`, or another table.
      where: what a message begins with.

    Raises:
      UserError: naming the first field of another kind.
    """
    for name, kind in kinds.items():
        if name in found and not kind.holds(found[name]):
            raise UserError(
                f"{where}: {name} must be {kind.wanted} (got {show(found[name])}). Correct it, or "
                "download the file again."
            )


def check_config(hf: Mapping[str, Any], where: str) -> None:
    """`check_fields` of a config.json with its section on rotary positions."""
    check_fields(hf, FIELDS, where)
    for section in ("rope_parameters", "rope_scaling"):
        check_fields(hf.get(section) or {}, ROPE, f"{where}: {section}")


def check_sizes(config: ModelConfig, where: str) -> None:
    """Requires that the sizes of a model fit together.

    Raises:
      UserError: naming those that do not.
    """
    turned = config.head_size if config.rotary_size is None else config.rotary_size
    width, heads, groups = config.hidden_size, config.num_heads, config.num_kv_heads
    scaling = config.rope_scaling
    for fits, problem in (
        (
            config.head_size != width // heads or width % heads == 0,
            f"hidden_size must be a multiple of num_attention_heads, {heads} (got {width})",
        ),
        (
            heads % groups == 0,
            f"num_key_value_heads must divide num_attention_heads, {heads} (got {groups})",
        ),
        (config.max_positions >= 1, "no position is left behind the padding id"),
        (
            config.positions != "rotary" or (turned >= 2 and turned % 2 == 0),
            f"head_dim must have an even number of rotary elements (got {turned})",
        ),
        (
            scaling is None or scaling.kind == "linear" or scaling.slow < scaling.fast,
            "the slow bound of the rotary scaling must be below the fast one",
        ),
    ):
        if not fits:
            raise UserError(f"{where}: {problem}. Correct it, or download the file again.")

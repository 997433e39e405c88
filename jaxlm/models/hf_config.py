"""The parts of a model folder besides tensors: config.json, checked by field, and file names.

A field of config.json has the same meaning in every family that has it, so one table says what each
may hold. Fields that no family reads are ignored.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from jaxlm.artifacts import files
from jaxlm.artifacts.files import inside
from jaxlm.core.checks import MOST, show
from jaxlm.core.errors import UserError
from jaxlm.models.config import ModelConfig
from jaxlm.models.families import MODULES, family, require

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
GENERATION = "generation_config.json"
_PICKLES = (".bin", ".pt", ".pth")
_OF_A_MODEL = re.compile(
    r"(config|(generation|adapter|preprocessor|processor|tokenizer)_config|tokenizer|vocab"
    r"|special_tokens_map|added_tokens|chat_template)\.json"
    r"|(vocab|merges)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model"
    r"|chat_template\.jinja|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)


class Kind(NamedTuple):
    """A kind of value: its description for messages, and whether a value is of it."""

    wanted: str
    holds: Callable[[Any], bool]


def whole(least: int = 1, most: int = MOST) -> Kind:
    """Return the kind of whole numbers; `2.0` and `true` are not."""
    return Kind(
        f"a whole number from {least} to {most}", lambda x: type(x) is int and least <= x <= most
    )


def number(above: float = 0.0, most: float = 1e30) -> Kind:
    """Return the kind of finite numbers, whole or not."""
    return Kind(
        f"a number above {above:g} and at most {most:g}",
        lambda x: type(x) in (int, float) and above < x <= most,
    )


def optional(kind: Kind) -> Kind:
    """Return a kind that also accepts null."""
    return Kind(f"{kind.wanted}, or null", lambda x: x is None or kind.holds(x))


def texts(*known: str) -> Kind:
    """Return the kind of lists of strings, from `known` if there are any."""
    wanted = f"a list of {', '.join(known)}" if known else "a list of strings"
    return Kind(
        wanted,
        lambda x: _all(x, lambda item: isinstance(item, str) and (not known or item in known)),
    )


def _all(x: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(x, list) and all(map(holds, x))


FLAG = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a string", lambda x: isinstance(x, str))
SECTION = Kind("a section", lambda x: isinstance(x, dict))
WIDTH, DEPTH = whole(1, 2**24), whole(1, 2**16)
TOKEN = whole(-1)  # -1 means none in some configurations
TOKENS = Kind(
    "a token id, a list of at least one, or null",
    lambda x: x is None or TOKEN.holds(x) or (_all(x, TOKEN.holds) and len(x) > 0),
)
SWITCHES = Kind(
    "a list of 0 and 1",
    lambda x: _all(x, lambda item: type(item) is int and item in (0, 1)),
)
LABELS = Kind(
    "a string for each of the classes 0, 1, ...",
    lambda x: (
        isinstance(x, dict)
        and {*x} == {str(i) for i in range(len(x))}
        and all(isinstance(name, str) for name in x.values())
    ),
)

# Each kind with the fields that are of it.
_KINDS: list[tuple[Kind, str]] = [
    (whole(), "vocab_size max_position_embeddings n_positions query_pre_attn_scalar"),
    (whole(), "local_attention sliding_window_pattern global_attn_every_n_layers"),
    (whole(), "no_rope_layer_interval"),
    (whole(0), "max_window_layers"),
    (whole(0, 2**16), "type_vocab_size"),
    (optional(whole()), "sliding_window"),
    (WIDTH, "hidden_size n_embd intermediate_size ffn_dim dim hidden_dim"),
    (optional(WIDTH), "n_inner word_embed_proj_dim head_dim"),
    (DEPTH, "num_hidden_layers n_layer n_layers num_attention_heads n_head n_heads"),
    (optional(DEPTH), "num_key_value_heads"),
    (number(most=1.0), "layer_norm_eps layer_norm_epsilon rms_norm_eps norm_eps"),
    (number(most=1.0), "rotary_pct partial_rotary_factor"),
    (number(above=1.0), "rope_theta rotary_emb_base rope_local_base_freq"),
    (number(above=1.0), "global_rope_theta local_rope_theta"),
    (number(), "embedding_multiplier residual_multiplier attention_multiplier logits_scaling"),
    (optional(number()), "clip_qkv attn_logit_softcapping final_logit_softcapping"),
    (optional(TEXT), "hidden_act hidden_activation activation_function"),
    (TEXT, "activation classifier_activation classifier_pooling"),
    (FLAG, "attention_bias mlp_bias enable_bias norm_bias classifier_bias tie_word_embeddings"),
    (FLAG, "use_parallel_residual use_sliding_window do_layer_norm_before"),
    (FLAG, "_remove_final_layer_norm layer_norm_elementwise_affine"),
    (optional(SECTION), "rope_parameters rope_scaling"),
    (optional(SWITCHES), "no_rope_layers"),
    (optional(texts("full_attention", "sliding_attention")), "layer_types"),
    (TOKENS, "bos_token_id eos_token_id pad_token_id"),
    (optional(LABELS), "id2label"),
    (optional(texts()), "architectures"),
]
_ROPE_KINDS: list[tuple[Kind, str]] = [
    (TEXT, "rope_type type"),
    (optional(number(above=1.0)), "rope_theta"),
    (optional(whole()), "original_max_position_embeddings"),
    (number(), "factor low_freq_factor high_freq_factor"),
    (optional(number()), "beta_slow beta_fast attention_factor mscale mscale_all_dim"),
    (number(most=1.0), "partial_rotary_factor"),
    (FLAG, "truncate"),
    (optional(SECTION), "full_attention sliding_attention"),
]
FIELDS = {name: kind for kind, names in _KINDS for name in names.split()}
ROPE = {name: kind for kind, names in _ROPE_KINDS for name in names.split()}


def damaged(where: object, problem: str) -> UserError:
    """Return the error for a file or folder that was not received as it was published."""
    return UserError(f"{where}: {problem}. Download it again.")


def check_fields(config: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Raise UserError for the first field of a file that is not of its kind."""
    for name, kind in kinds.items():
        if name in config and not kind.holds(config[name]):
            raise UserError(
                f"{where}: {name} must be {kind.wanted} (got {show(config[name])}). Correct it, or "
                "download the file again."
            )


def check_config(hf: Mapping[str, Any], where: str) -> None:
    """Check the fields of a config.json, including those of its rotary sections."""
    check_fields(hf, FIELDS, where)
    for section in ("rope_parameters", "rope_scaling"):
        rope = hf.get(section) or {}
        check_fields(rope, ROPE, f"{where}: {section}")
        for kind in ("full_attention", "sliding_attention"):
            check_fields(rope.get(kind) or {}, ROPE, f"{where}: {section}: {kind}")


def check_sizes(config: ModelConfig, where: str) -> None:
    """Raise UserError if the sizes of a model contradict each other."""
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
        (config.max_positions >= 1, "no position is left after the padding id"),
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


def is_of_a_model(path: Path) -> bool:
    """Return whether a file belongs to the model in its folder, judged by its name.

    Pickles and adapter weights do not, so that saving a model does not delete them.
    """
    if path.is_dir():
        return path.name == "additional_chat_templates"
    return _OF_A_MODEL.fullmatch(path.name) is not None


def check_regular(folder: Path) -> None:
    """Raise UserError if a pipe, a device or a folder has the name of a file of a model."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _OF_A_MODEL.fullmatch(path.name) and path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file. Give the file that was written.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise UserError if the file is missing or holds something else."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file. Give a model folder in the HF layout."
        ) from None


def read_config(folder: Path) -> tuple[ModelConfig, ModuleType]:
    """Return the configuration and the family's module; raise UserError for a bad config.json."""
    check_regular(folder)
    config, module = parse_config(read_json(folder / CONFIG), str(folder / CONFIG))
    stop_ids = _stop_ids(folder) or config.stop_ids
    return config.replace(stop_ids=() if stop_ids == (config.eos_id,) else stop_ids), module


def parse_config(hf: dict[str, Any], where: str) -> tuple[ModelConfig, ModuleType]:
    """Return the configuration and the family's module for the fields of a config.json."""
    try:
        module = family(hf.get("model_type", ""))
    except KeyError as error:
        known = ", ".join(MODULES)
        raise UserError(
            f"{where}: model_type is not supported (got {error}). Choose one of {known}."
        ) from None
    check_config(hf, where)
    try:
        require(hf, "quantization_config", None)
        config = module.read_config(hf)
    except KeyError as error:
        raise UserError(
            f"{where}: the key {error} is missing. Add it, or download the file again."
        ) from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    check_sizes(config, where)
    if any(name.endswith("ForTokenClassification") for name in hf.get("architectures") or ()):
        count = len(hf.get("id2label") or {}) or 2  # transformers leaves out the names of two
        config = config.replace(head="token_classifier", num_labels=count)
    return config.replace(label_names=_label_names(hf)), module


def _label_names(hf: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of a classifier's classes; none if they are LABEL_0, LABEL_1, ..."""
    labels = hf.get("id2label") or {}
    names = tuple(labels[str(i)] for i in range(len(labels)))
    return () if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """Return the stop tokens of generation_config.json, where chat models list them."""
    path = folder / GENERATION
    config = read_json(path) if path.is_file() else {}
    check_fields(config, {"eos_token_id": TOKENS}, str(path))
    ids = config.get("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model; raise UserError if one is missing or outside."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise damaged(folder / INDEX, "has no weight_map")
        paths = {inside(folder, name, str(folder / INDEX)) for name in places.values()}
        for path in sorted(paths):
            if not path.is_file():
                raise damaged(folder / INDEX, f"names {path.name}, which is missing")
        return sorted(paths)
    if pickles := sorted(path for path in folder.iterdir() if path.suffix in _PICKLES):
        raise UserError(
            f"{pickles[0]}: is a pickle, which is never read, and there is no {WEIGHTS}. Convert "
            "it to safetensors."
        )
    raise damaged(folder / WEIGHTS, "there is no such file")


def modern_name(name: str) -> str:
    """Return the current name of a tensor; the oldest checkpoints have gamma and beta in norms."""
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))

"""Build a tokenizer from the metadata of a GGUF file."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm.core.checks import show
from jaxlm.core.errors import UserError
from jaxlm.models.config import ModelConfig
from jaxlm.models.hf_config import FLAG, TEXT, Kind, damaged, texts, whole

MOST_CHARACTERS = 1024
"""Longest token: the time to find the merges grows with the square of its length."""
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens that are never split
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_GGML = "tokenizer.ggml."
_NUMBERS = Kind(
    "a list of numbers", lambda x: isinstance(x, list) and {*map(type, x)} <= {int, float}
)
TOKENIZER = {
    **dict.fromkeys((_GGML + "model", _GGML + "pre", "tokenizer.chat_template"), TEXT),
    **dict.fromkeys((_GGML + "tokens", _GGML + "merges"), texts()),
    **dict.fromkeys((_GGML + "scores", _GGML + "token_type"), _NUMBERS),
    **{f"{_GGML}{name}_token_id": whole(0) for name in (*_SPECIAL.values(), "eot")},
    **{f"{_GGML}add_{name}": FLAG for name in ("bos_token", "eos_token", "space_prefix")},
}
"""Keys of the metadata, and the kind of each value."""

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> regular expressions that split a text, one after the other.
_SPLITS = {
    "default": (_GPT2_SPLIT,),
    "gpt-2": (_GPT2_SPLIT,),
    "smollm": (r"\p{N}", _GPT2_SPLIT),
    "llama-bpe": (_MODERN_SPLIT % "{1,3}",),
    "qwen2": (_MODERN_SPLIT % "",),
    "dbrx": (_MODERN_SPLIT % "{1,3}",),  # OLMo 2
}


def read_tokenizer(path: Path, metadata: Mapping[str, Any], config: ModelConfig) -> Any:
    """Return the tokenizer of the metadata as a tokenizer of transformers, or None without one."""
    from transformers import PreTrainedTokenizerFast

    ggml = {key.removeprefix(_GGML): x for key, x in metadata.items() if key.startswith(_GGML)}
    gemma = config.family.startswith("gemma")
    kinds: dict[str, Callable[[Mapping[str, Any], list[str]], Any]]
    kinds = {"gpt2": _byte_level, "llama": partial(_sentencepiece, gemma=gemma)}
    kind, tokens = ggml.get("model"), ggml.get("tokens")
    if kind in (None, "none", "no_vocab"):
        return None
    wanted: list[tuple[str, str, Mapping[str, Any]]] = [("model", kind, kinds)]
    if kind == "gpt2":
        wanted.append(("pre", ggml.get("pre", "default"), _SPLITS))
    for key, value, known in wanted:
        if value not in known:
            raise UserError(
                f"{path}: tokenizer.ggml.{key} is not supported (got {show(value)}). Use a model "
                f"with one of {', '.join(known)}."
            )
    if not tokens or len(tokens) > config.vocab_size or max(map(len, tokens)) > MOST_CHARACTERS:
        wanted_tokens = f"1 to {config.vocab_size} tokens of at most {MOST_CHARACTERS} characters"
        got = f"(got {len(tokens or ())} tokens)"
        raise damaged(path, f"tokenizer.ggml.tokens must hold {wanted_tokens} {got}")
    try:
        backend = kinds[kind](ggml, tokens)
        _add_special(backend, ggml, tokens)
        ids = special_ids(metadata)
        special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            model_max_length=config.max_positions,
            clean_up_tokenization_spaces=False,
            **special,
        )
    except Exception as error:  # tokenizers raises many kinds of errors
        raise UserError(
            f"{path}: the tokenizer cannot be built ({type(error).__name__}: {show(str(error))}). "
            "Download the file again."
        ) from error
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the ids of the special tokens: bos, eos, pad, unk."""
    return {name: metadata.get(f"{_GGML}{key}_token_id") for name, key in _SPECIAL.items()}


def _byte_level(ggml: Mapping[str, Any], tokens: list[str]) -> Any:
    """Return the tokenizer of GPT-2 and its successors, which differ in how they split a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind = ggml.get("pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in ggml.get("merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind == "llama-bpe"))
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[kind]]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(ggml: Mapping[str, Any], tokens: list[str], *, gemma: bool) -> Any:
    """Return the tokenizer of Llama 1 and 2, Mistral and Gemma."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # Tokens of several spaces are spelled with spaces in files of Gemma.
    tokens = [token if token.strip(" ") else "▁" * len(token) for token in tokens]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Higher scores merge first. In Gemma the ids, not the scores, give the order of the merges.
    scores = [-i for i in range(len(tokens))] if gemma else ggml["scores"]
    merges = [
        (-score, -cut, cut - len(token), token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: merge[:3])
    unknown = ggml.get("unknown_token_id")
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            [merge[3:] for merge in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = ggml.get("add_space_prefix", not gemma)
    scheme = "first" if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *[decoders.Strip(" ", 1, 0)][: int(prefix)]])
    return backend


def _add_special(backend: Any, ggml: Mapping[str, Any], tokens: list[str]) -> None:
    """Add the tokens that are never split, and those put around a text."""
    from tokenizers import AddedToken, processors

    kinds = ggml.get("token_type", ())
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (_CONTROL, _USER_DEFINED) and token.strip(" ")
        ]
    )
    around = {}
    for name, default in (("bos", ggml["model"] == "llama"), ("eos", False)):
        token = ggml.get(f"{name}_token_id")
        if ggml.get(f"add_{name}_token", default) and token is not None:
            around[name] = (tokens[token], token)
    if around:
        before, after = ([around[name][0]] if name in around else [] for name in ("bos", "eos"))
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[*around.values()],
        )

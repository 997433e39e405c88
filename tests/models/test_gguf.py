"""GGUF files that package `gguf` writes: the same model as the Hugging Face folder, or refused."""

import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.core.paths import flatten
from jaxlm.core.precision import Packed, dequantize, quantize
from jaxlm.models import shapes_from_pretrained
from tests.helpers.models import GOLDEN
from tests.helpers.sentences import FORM, refused

gguf = pytest.importorskip("gguf", reason="needs pip install 'jaxlm[gguf]'")
Type = gguf.GGMLQuantizationType

# How llama.cpp's convert_hf_to_gguf.py names the fields of config.json.
FIELDS = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "rope.dimension_count": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "vocab_size": ("vocab_size",),
}
SIZES = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 1, "vocab_size": 32}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
SIZES |= {"max_position_embeddings": 32, "rms_norm_eps": 1e-5}


def swap(rows: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of convert_hf_to_gguf.py."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def converted(hf: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a folder, as convert_hf_to_gguf.py writes them."""
    arch = "llama" if hf["model_type"] == "mistral" else hf["model_type"]
    kind = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, 8)
    result = {}
    for name, value in tensors.items():
        if arch == "llama" and (part := re.search(r"self_attn\.([qk])_proj", name)):
            heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}[part[1]]
            value = swap(value, hf[heads])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if re.search(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight", name):
            value = np.ascontiguousarray(value.T)
        result[names.get_name(name, (".weight", ".bias"))] = value
    assert None not in result
    return result


def write(path: Path, hf: dict, tensors: dict, **metadata) -> Path:
    """Write a file; a tensor is an array, or bytes with their type."""
    arch = "llama" if hf["model_type"] == "mistral" else hf["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    fields = {f"{arch}.{key}": hf[x] for key, of in FIELDS.items() for x in of if x in hf}
    if arch != "gemma2":
        fields[f"{arch}.attention.sliding_window"] = None
    if arch == "gpt2":
        fields["gpt2.feed_forward_length"] = hf["n_inner"] or 4 * hf["n_embd"]
    fields[f"{arch}.rope.freq_base"] = (hf.get("rope_parameters") or {}).get("rope_theta")
    for key in ("bos", "eos", "pad"):
        fields[f"tokenizer.ggml.{'padding' if key == 'pad' else key}_token_id"] = hf.get(
            f"{key}_token_id"
        )
    for key, value in (fields | metadata).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for key, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(key, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def random_tensors(hf: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a llama of these sizes, by their Hugging Face names."""
    rng = np.random.default_rng(seed)
    width, inner, heads = hf["hidden_size"], hf["intermediate_size"], hf["num_attention_heads"]
    keys = width // heads * hf["num_key_value_heads"]
    shapes = {"model.embed_tokens": (hf["vocab_size"], width), "model.norm": (width,)}
    for layer in range(hf["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        shapes |= {block + "input_layernorm": (width,)}
        shapes |= {block + "post_attention_layernorm": (width,)}
        shapes |= {block + f"self_attn.{part}_proj": (width, width) for part in "qo"}
        shapes |= {block + f"self_attn.{part}_proj": (keys, width) for part in "kv"}
        shapes |= {block + f"mlp.{part}_proj": (inner, width) for part in ("gate", "up")}
        shapes |= {block + "mlp.down_proj": (width, inner)}
    return {
        name + ".weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A small llama."""
    hf = SIZES | {"hidden_size": 16, "intermediate_size": 24}
    tensors = converted(hf, random_tensors(hf))
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", hf, tensors)


FAMILIES = [
    "gemma",
    "gemma2",
    "gpt2",
    "llama",
    "llama-biases",
    "mistral",
    "olmo2",
    "qwen2",
    "qwen3",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_gives_the_model_of_the_folder(name: str, tmp_path: Path):
    hf, tensors = opened(GOLDEN / name)
    found = jaxlm.from_pretrained(write(tmp_path / "it.gguf", hf, converted(hf, tensors)))
    wanted = jaxlm.from_pretrained(GOLDEN / name)
    config = wanted.config
    if name == "mistral":  # llama.cpp has no window of Mistral
        config = config.replace(family="llama", window=None, windowed=())
    if name == "gemma2":  # its scale is not stored but follows from the sizes
        config = config.replace(attention_scale=config.head_size**-0.5)
    assert found.config == config
    for leaf, other in zip(flatten(found.params)[0], flatten(wanted.params)[0], strict=True):
        # Norms of Gemma were rounded when 1 was added.
        slack = 1e-7 if name.startswith("gemma") and leaf.path.endswith("scale") else 0
        np.testing.assert_allclose(leaf.value, other.value, rtol=0, atol=slack, err_msg=leaf.path)
    assert shapes_from_pretrained(tmp_path / "it.gguf").config == found.config


def test_a_tied_table_and_one_of_its_own(small: Path, tmp_path: Path):
    hf, tensors = opened(GOLDEN / "llama")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert jaxlm.from_pretrained(small).config.tie_embeddings
    copied = write(tmp_path / "copied.gguf", hf, converted(hf, tensors))
    assert jaxlm.from_pretrained(copied).config.tie_embeddings


def blocks(kind: Type, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random bytes that stand for finite numbers."""
    rng = np.random.default_rng(seed)
    size, length = gguf.GGML_QUANT_SIZES[kind]
    drawn = rng.integers(0, 256, (16 * rows * columns // size, length), np.uint8)
    with np.errstate(all="ignore"):
        values = gguf.dequantize(drawn, kind)
    # The sum of a few numbers of this size is finite, too.
    drawn = drawn[(np.abs(values) < 1e4).all(-1)][: rows * columns // size]
    return drawn.reshape(rows, -1)


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
    + [f"Q{bits}_K" for bits in range(2, 7)]
)  # fmt: skip
def test_every_type_is_dequantised_bit_by_bit(kind: str, tmp_path: Path):
    kind, tensors, wanted = Type[kind], converted(SIZES, random_tensors(SIZES)), {}
    for seed, (name, value) in enumerate(tensors.items()):
        if value.ndim == 2:
            data = blocks(kind, *value.shape, seed)
            tensors[name] = (data, kind)
            wanted[name] = gguf.dequantize(data, kind)
    lm = jaxlm.from_pretrained(write(tmp_path / "it.gguf", SIZES, tensors))
    layers = lm.params["layers"]
    np.testing.assert_array_equal(
        lm.params["embed"]["tokens"]["embedding"], wanted["token_embd.weight"]
    )
    for part, name in (("gate", "ffn_gate"), ("up", "ffn_up"), ("down", "ffn_down")):
        kernel = layers["mlp"][f"{part}_proj"]["kernel"][0]
        np.testing.assert_array_equal(kernel, wanted[f"blk.0.{name}.weight"].T)
    for part, heads in (("q", 4), ("k", 2)):
        kernel = np.asarray(layers["attention"][f"{part}_proj"]["kernel"][0])
        np.testing.assert_array_equal(swap(kernel.T, heads), wanted[f"blk.0.attn_{part}.weight"])


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2}], ids=["one device", "two"])
@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
def test_blocks_stay_packed_without_a_second_rounding(kind, bits, mesh, tmp_path: Path):
    hf = SIZES | {"num_hidden_layers": 2}
    tensors = converted(hf, random_tensors(hf))
    for name, value in tensors.items():
        if value.ndim == 2:
            tensors[name] = (gguf.quantize(value, Type[kind]), Type[kind])
    path = write(tmp_path / "it.gguf", hf, tensors)
    mesh = mesh and jaxlm.sharding.make_mesh(**mesh, devices=jax.devices()[:2])
    dense, packed = jaxlm.from_pretrained(path), jaxlm.from_pretrained(path, bits=bits, mesh=mesh)
    assert isinstance(packed.params["layers"]["mlp"]["up_proj"]["kernel"], Packed)
    assert isinstance(packed.params["embed"]["tokens"]["embedding"], Packed)
    jax.tree.map(np.testing.assert_array_equal, dequantize(packed.params), dense.params)
    shapes = shapes_from_pretrained(path, bits=bits).params
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), packed.params
    )
    ids = np.arange(24).reshape(2, 12)
    logits = packed.apply(packed.params, ids)
    np.testing.assert_allclose(logits, dense.apply(dense.params, ids), atol=1e-4, rtol=0)


def test_a_matrix_that_is_stored_in_other_types_is_packed_from_floats(tmp_path: Path):
    hf = SIZES | {"num_hidden_layers": 2}
    tensors = converted(hf, random_tensors(hf))
    name = "blk.1.ffn_up.weight"  # one of two layers
    tensors[name] = (gguf.quantize(tensors[name], Type.Q8_0), Type.Q8_0)
    path = write(tmp_path / "it.gguf", hf, tensors)
    lm = jaxlm.from_pretrained(path, bits=8)
    jax.tree.map(
        np.testing.assert_array_equal,
        lm.params,
        quantize(jaxlm.from_pretrained(path).params, bits=8),
    )


def test_a_scale_that_a_dtype_cannot_hold_is_refused(tmp_path: Path):
    tensors = converted(SIZES, random_tensors(SIZES))
    blocks = gguf.quantize(tensors["blk.0.ffn_up.weight"], Type.Q8_0)
    blocks[0, :2] = np.frombuffer(np.float16(600.0).tobytes(), np.uint8)  # s = 128 d = 76,800
    tensors["blk.0.ffn_up.weight"] = (blocks, Type.Q8_0)
    path = write(tmp_path / "it.gguf", SIZES, tensors)
    with refused(str(path), "76800.0", "mlp.up_proj.weight", "param_dtype"):
        jaxlm.from_pretrained(path, bits=8, param_dtype="float16")


def test_the_factors_of_llama_3_give_its_settings(tmp_path: Path):
    hf = SIZES | {"rope_parameters": {"rope_theta": 500000.0}}
    tensors = converted(hf, random_tensors(hf))
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = []
    for length in 2 * np.pi / plain:  # as in generate_extra_tensors of convert_hf_to_gguf.py
        smooth = (8192 / length - 1) / (4 - 1)
        blend = 1 / ((1 - smooth) / 32 + smooth)
        factors.append(1.0 if length < 8192 / 4 else 32.0 if length > 8192 else blend)
    tensors["rope_freqs.weight"] = np.array(factors, np.float32)
    scaling = jaxlm.from_pretrained(write(tmp_path / "it.gguf", hf, tensors)).config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_positions) == ("llama3", 32.0, 8192)
    assert (scaling.slow, scaling.fast) == (1.0, 4.0)
    tensors["rope_freqs.weight"] *= np.float32(1.01)
    path = write(tmp_path / "other.gguf", hf, tensors)
    with refused(str(path), "rope_freqs.weight"):
        jaxlm.from_pretrained(path)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rotary_scaling(kind: str, tmp_path: Path):
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 8}
    keys = {"type": kind, "factor": 4.0, "original_context_length": 8}
    metadata = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    path = write(tmp_path / "it.gguf", SIZES, converted(SIZES, random_tensors(SIZES)), **metadata)
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"rope_scaling": scaling}))
    found = shapes_from_pretrained(path).config.rope_scaling
    assert found == shapes_from_pretrained(tmp_path).config.rope_scaling


# --- tokenizers


TEXTS = [
    "It was 2,345 films  in 1999; isn't it?\n\n  Süß, naïve — 漢字 <|im_start|>x",
    "a",
    " a b  ",
    "",
]


def byte_level(kind: str):
    """A tokenizer as transformers has it, with the name that llama.cpp gives it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")],
    }[kind]
    if kind == "qwen2":
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    return backend


def listed(backend) -> dict[str, object]:
    """The metadata of a byte-level tokenizer."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
    }


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2"])
def test_a_byte_level_tokenizer(kind: str, tmp_path: Path):
    wanted = byte_level(kind)
    hf = SIZES | {"vocab_size": 320, "eos_token_id": 1, "hidden_size": 16, "intermediate_size": 8}
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    metadata = listed(wanted) | {"tokenizer.chat_template": template, "tokenizer.ggml.pre": kind}
    tensors = converted(hf, random_tensors(hf))
    lm = jaxlm.from_pretrained(write(tmp_path / "it.gguf", hf, tensors, **metadata))
    jaxlm.save_pretrained(lm, tmp_path / "folder")
    for found in (lm.tokenizer, jaxlm.from_pretrained(tmp_path / "folder").tokenizer):
        assert [found(text)["input_ids"] for text in TEXTS] == [wanted.encode(t).ids for t in TEXTS]
        assert found.decode(found(TEXTS[0])["input_ids"]) == TEXTS[0]
        assert (len(found), found.eos_token, found.chat_template) == (300, "<|im_end|>", template)


def merged(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: merge the best neighbours until no two make a token."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        tokens = ["".join(pair) for pair in itertools.pairwise(parts)]
        pairs = [(scores.get(token, -np.inf), -i) for i, token in enumerate(tokens)]
        score, place = max(pairs, default=(-np.inf, 0))
        if score == -np.inf:
            return parts
        parts[-place : 2 - place] = ["".join(parts[-place : 2 - place])]


def test_a_sentencepiece_tokenizer(tmp_path: Path):
    rng = np.random.default_rng(0)
    pieces = ["▁", *"abcd", "ab", "bc", "abc", "▁a", "▁ab", "cd", "bcd", "▁d", "da", "abcd"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces]
    scores = [0.0] * 259 + [-float(i) for i in rng.permutation(len(pieces))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.unknown_token_id": 0,
    }
    hf = SIZES | {"vocab_size": len(tokens), "bos_token_id": 1, "eos_token_id": 2}
    path = write(tmp_path / "it.gguf", hf, converted(hf, random_tensors(hf)), **metadata)
    tokenizer = jaxlm.from_pretrained(path).tokenizer
    by_token = dict(zip(tokens, scores, strict=True))
    for text in ("abcd abc  dab", "d", "bcdabcab cdda bcd"):
        wanted = [1, *[tokens.index(part) for part in merged(text, by_token)]]
        assert tokenizer(text)["input_ids"] == wanted
        assert tokenizer.decode(wanted, skip_special_tokens=True) == text
    assert tokenizer("é</s>", add_special_tokens=False)["input_ids"][-3:] == [0xC3 + 3, 0xA9 + 3, 2]


def test_convert_writes_a_folder(small: Path, tmp_path: Path, capsys):
    from jaxlm.cli.main import main

    assert main(["convert", str(small), str(tmp_path / "folder")]) == 0
    found, wanted = jaxlm.from_pretrained(tmp_path / "folder"), jaxlm.from_pretrained(small)
    assert found.config == wanted.config
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


# --- damaged and unknown files


def head(keys: int = 0, tensors: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    counts = np.array([tensors, keys], "<u8").tobytes()
    return b"GGUF" + np.uint32(version).tobytes() + counts + rest


def entry(key: str, kind: int, value: bytes) -> bytes:
    return np.uint64(len(key)).tobytes() + key.encode() + np.uint32(kind).tobytes() + value


BIG = np.uint64(2**61).tobytes()
BYTES = {
    "empty": (b"", "is empty"),
    "text": (b"hello, world", "neither a GGUF file nor a folder", "b'hell'"),
    "version": (head(version=1), "version 2 or 3", "(got 1)"),
    "big-endian": (head(version=3 << 24), "little-endian"),
    "keys": (head(keys=2**61), "is truncated"),
    "tensors": (head(tensors=2**61), "is truncated"),
    "length of a string": (head(1, rest=entry("a", 8, BIG)), "is truncated"),
    "length of an array": (head(1, rest=entry("a", 9, np.uint32(0).tobytes() + BIG)), "truncated"),
    "type": (head(1, rest=entry("a.b", 13, b"")), "a.b has a type", "(got 13)"),
    "nested": (head(1, rest=entry("a.b", 9, np.uint32(9).tobytes() + BIG)), "a.b has a type"),
    "not UTF-8": (head(1, rest=entry("a", 8, np.uint64(1).tobytes() + b"\xff")), "UTF-8"),
    "twice": (head(2, rest=2 * entry("a", 7, b"\1")), "'a' twice"),
    "architecture": (head(), "general.architecture is not supported (got None)"),
}


@pytest.mark.parametrize("case", BYTES)
def test_damaged_bytes_are_refused(case: str, tmp_path: Path):
    content, *parts = BYTES[case]
    path = tmp_path / "it.gguf"
    path.write_bytes(content)
    with refused(str(path), *parts):
        jaxlm.from_pretrained(path)


def changed(**changes):
    def edit(hf: dict, tensors: dict, metadata: dict) -> None:
        for key, value in changes.items():
            metadata["llama." + key.replace("__", ".")] = value

    return edit


def named(**changes):
    return lambda hf, tensors, metadata: metadata.update(
        {key.replace("__", "."): value for key, value in changes.items()}
    )


def stored(name: str, value):
    return lambda hf, tensors, metadata: tensors.update({name: value})


def renamed(hf: dict, tensors: dict, metadata: dict) -> None:
    hf["model_type"] = "rwkv"


def poison(hf: dict, tensors: dict, metadata: dict) -> None:
    tensors["blk.0.ffn_up.weight"][0, 0] = np.nan


UP, ROW = "blk.0.ffn_up.weight", np.zeros((8, 16), np.float32)
GPT2 = {"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__tokens": ["a", "b"]}
EDITS = {
    "architecture": (renamed, "general.architecture is not supported", "'rwkv'", "qwen3"),
    "experts": (changed(expert_count=8), "'llama.expert_count' is not supported (got 8)"),
    "no depth": (changed(block_count=None), "has no llama.block_count"),
    "no layers": (changed(block_count=0), "llama.block_count must be a whole number", "(got 0)"),
    "fewer layers": (changed(block_count=3), "model.layers.1"),
    "many layers": (changed(block_count=2**16), "model.layers.1"),
    "heads by layer": (changed(attention__head_count=[4, 4]), "attention.head_count", "[4, 4]"),
    "partly rotary": (changed(rope__dimension_count=2), "rope.dimension_count must be 4", "got 2"),
    "rope": (changed(rope__scaling__type="longrope"), "rope_type is not supported"),
    "width": (changed(feed_forward_length=23), "must have the shape [23, 16]"),
    "alignment": (named(general__alignment=0), "general.alignment must be"),
    "no table": (lambda hf, tensors, metadata: tensors.pop("token_embd.weight"), "token_embd"),
    "missing": (lambda hf, tensors, metadata: tensors.pop(UP), "mlp.up_proj.weight"),
    "unknown": (stored("blk.0.ffn_exps.weight", ROW), "blk.0.ffn_exps.weight is not used"),
    "integers": (stored(UP, ROW.astype(np.int32)), UP + " has a type", "(got I32)"),
    "NaN": (poison, UP + " holds numbers that are not finite"),
    "template": (named(tokenizer__chat_template=3), "tokenizer.chat_template must be a string"),
    "kind": (named(tokenizer__ggml__model="rwkv"), "tokenizer.ggml.model", "'rwkv'", "gpt2, llama"),
    "split": (named(**GPT2, tokenizer__ggml__pre="x"), "tokenizer.ggml.pre", "'x'", "smollm"),
    "tokens": (
        named(tokenizer__ggml__model="gpt2", tokenizer__ggml__tokens=["a"] * 33),
        "tokenizer.ggml.tokens must hold 1 to 32 tokens", "(got 33 tokens)",
    ),
    "merge": (named(**GPT2, tokenizer__ggml__merges=["a c"]), "tokenizer cannot be built"),
    "special": (named(**GPT2, tokenizer__ggml__bos_token_id=2), "tokenizer cannot be built"),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_what_is_not_known_is_refused(case: str, tmp_path: Path):
    edit, *parts = EDITS[case]
    hf, metadata = SIZES | {"hidden_size": 16, "intermediate_size": 24}, {}
    tensors = converted(hf, random_tensors(hf))
    edit(hf, tensors, metadata)
    path = write(tmp_path / "it.gguf", hf, tensors, **metadata)
    with refused(str(path), *parts):
        jaxlm.from_pretrained(path)


def test_a_file_that_is_cut_anywhere_is_refused(small: Path, tmp_path: Path):
    content, path = small.read_bytes(), tmp_path / "cut.gguf"
    for length in [*range(0, 3000, 37), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError) as caught:
            shapes_from_pretrained(path)
        assert FORM.fullmatch(str(caught.value))


def test_a_wrong_byte_is_refused_or_harmless(small: Path, tmp_path: Path):
    content, path = small.read_bytes(), tmp_path / "damaged.gguf"
    rng = np.random.default_rng(0)
    sentences = []
    for _ in range(100):
        damaged = bytearray(content)
        damaged[rng.integers(2000)] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            shapes_from_pretrained(path)
        except UserError as error:
            sentences.append(str(error))
    assert len(sentences) > 25
    assert all(map(FORM.fullmatch, sentences))


def test_a_list_without_an_end_takes_no_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("jaxlm.models.gguf.MOST_METADATA", 2**10)
    path = tmp_path / "it.gguf"
    strings = np.uint32(8).tobytes() + BIG + bytes(2**12)
    path.write_bytes(head(1, rest=entry("a", 9, strings)))
    with refused(str(path), "more metadata than a model needs"):
        jaxlm.from_pretrained(path)


def test_smollm2_is_the_folder_in_the_cache_or_the_command_that_makes_it(
    small: Path, tmp_path: Path, monkeypatch
):
    import huggingface_hub

    def offline(name: str, **_):
        raise OSError(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr("jaxlm.models.hf.CACHE", tmp_path)
    with refused("model", "smollm2", "OSError", "python scripts/get_smollm2.py"):
        jaxlm.from_pretrained("smollm2")
    jaxlm.save_pretrained(jaxlm.from_pretrained(small), tmp_path / "smollm2")
    assert jaxlm.from_pretrained("smollm2").config == jaxlm.from_pretrained(small).config


# --- transformers, from the same file


@pytest.mark.torch
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_logits_and_tokens_of_transformers(name: str, kind: str, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    import transformers

    sizes = SIZES | {"num_hidden_layers": 3, "vocab_size": 64, "head_dim": 32, "model_type": name}
    sizes |= {"sliding_window": 8} if name == "gemma2" else {}
    # transformers takes this for the scale of Gemma 2, whatever the sizes are.
    sizes |= {"head_dim": 256} if name == "gemma2" else {}
    sizes |= {"head_dim": 64} if name == "qwen2" else {}
    sizes |= {"head_dim": 128} if name == "qwen3" else {}
    hf = transformers.AutoConfig.for_model(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(hf)
    tensors = {key: value.numpy() for key, value in theirs.state_dict().items()}
    if hf.tie_word_embeddings:
        del tensors["lm_head.weight"]
    fields = hf.to_dict()
    tensors = converted(fields, tensors)
    if kind != "F32":
        for key, value in tensors.items():
            if value.ndim == 2:
                tensors[key] = (gguf.quantize(value, Type[kind]), Type[kind])
    # transformers takes the size of the vocabulary from the tokens.
    metadata = listed(byte_level("gpt-2"))
    metadata["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"][:64]
    metadata["tokenizer.ggml.token_type"] = [1] * 64
    metadata["tokenizer.ggml.merges"] = []
    path = write(tmp_path / "it.gguf", fields, tensors, **metadata)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="it.gguf", attn_implementation="eager", dtype=torch.float32
    ).eval()
    lm = jaxlm.from_pretrained(path)
    ids = np.random.default_rng(0).integers(3, 64, (2, 12))
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits.numpy()
        tokens = theirs.generate(torch.from_numpy(ids), max_new_tokens=8, do_sample=False)
    np.testing.assert_allclose(lm.apply(lm.params, ids), wanted, rtol=0, atol=3e-4)
    mask = np.ones_like(ids)
    found = lm.replace(config=lm.config.replace(eos_id=None)).generate(
        lm.params, ids, mask, max_new_tokens=8
    )
    np.testing.assert_array_equal(found.tokens, tokens[:, ids.shape[1] :].numpy())

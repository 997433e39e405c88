"""What from_pretrained and save_pretrained say to a user's mistake, and which files they read."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.models.hf_config import parse_config
from tests.helpers import reference
from tests.helpers.models import GOLDEN
from tests.helpers.sentences import refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / "model"))


def edit_config(**changes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        hf = json.loads((folder / "config.json").read_text())
        hf.update(changes)
        hf = {key: value for key, value in hf.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(hf))

    return edit


def edit_weights(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def without_weights(*, left: str = "", text: str = "") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "inputs_and_outputs.safetensors").unlink()
        if left:
            (folder / left).write_text(text)

    return edit


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index(names: object) -> Callable[[Path], None]:
    text = json.dumps({"weight_map": names})
    return without_weights(left="model.safetensors.index.json", text=text)


WTE, BIAS = "transformer.wte.weight", "transformer.h.1.mlp.c_proj.bias"
NEW = "transformer.h.0.attn.c_attn.extra"
CONFIG, WEIGHTS = "/config.json", "/model.safetensors"
INDEX = WEIGHTS + ".index.json"
# What breaks the folder; the file that the message begins with; what else it names.
MISTAKES = {
    "config": (lambda folder: (folder / "config.json").unlink(), CONFIG, "no such file"),
    "json": (lambda folder: (folder / "config.json").write_text("{"), CONFIG, "not valid JSON"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), CONFIG, "not a JSON object"),
    "model type": (edit_config(model_type="mamba"), CONFIG, "model_type", "'mamba'", "gpt_neox"),
    "key": (edit_config(n_embd=...), CONFIG, "the key 'n_embd' is missing"),
    "type": (edit_config(n_embd="24"), CONFIG, "n_embd must be a whole number", "(got '24')"),
    "choice": (edit_config(reorder_and_upcast_attn=True), CONFIG, "reorder_and_upcast_attn"),
    "activation": (edit_config(activation_function="mish"), CONFIG, "activation_function", "mish"),
    "quantized": (edit_config(quantization_config={"bits": 4}), CONFIG, "quantization_config"),
    "no weights": (without_weights(), WEIGHTS, "no such file"),
    "pickle": (without_weights(left="pytorch_model.bin"), "/pytorch_model.bin", "never read"),
    "missing shard": (index({"a": "model-1.safetensors"}), INDEX, "model-1.safetensors", "missing"),
    "truncated": (truncate, WEIGHTS, "truncated"),
    "shape": (
        edit_weights(lambda tensors: tensors.update({WTE: tensors[WTE][:-1]})),
        "", WTE, "[37, 24]", "(got [36, 24])",
    ),
    "fused shape": (edit_config(n_embd=12), "", WTE, "[37, 12]", "(got [37, 24])"),
    "tensor": (
        edit_weights(lambda tensors: tensors.pop("transformer.h.1.ln_1.bias")),
        "", "has no tensor transformer.h.1.ln_1.bias",
    ),
    "layers": (edit_config(n_layer=1), "", "transformer.h.1.ln_1.weight", "1 layers"),
    "head": (edit_config(tie_word_embeddings=False), "", "has no tensor lm_head.weight"),
    "integers": (
        edit_weights(lambda tensors: tensors.update({WTE: tensors[WTE].astype(np.int8)})),
        "", WTE, "(got I8)",
    ),
    "index": (index([]), INDEX, "has no weight_map"),
    "index that leaves": (index({"a": "../model/model.safetensors"}), INDEX, "outside its folder"),
    "index of lists": (index({"a": ["b"]}), INDEX, "outside its folder", "(got ['b'])"),
    "absolute index": (index({"a": "/b"}), INDEX, "outside its folder", "(got '/b')"),
    "unused bias": (
        edit_weights(lambda tensors: tensors.update({NEW: np.zeros(24, np.float32)})),
        "", f"{NEW} is not used by a gpt2 model",
    ),
    "not a number": (
        edit_weights(lambda tensors: tensors[BIAS].__setitem__(3, np.nan)),
        WEIGHTS, BIAS, "(got nan)",
    ),
    "infinite": (
        edit_weights(lambda tensors: tensors[WTE].__setitem__((3, 4), -np.inf)),
        WEIGHTS, WTE, "(got -inf)",
    ),
    "too large": (
        edit_weights(lambda tensors: tensors.update({BIAS: np.full(24, 1e300)})),
        WEIGHTS, BIAS, "float32", "(got 1e+300)", "param_dtype",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_files_ends_in_a_sentence(mistake: str, folder: Path):
    make, place, *words = MISTAKES[mistake]
    make(folder)
    with refused(f"{folder}{place}", *words):
        jaxlm.from_pretrained(folder)


def test_a_folder_that_is_not_there(tmp_path: Path):
    with refused("model", f"(got {tmp_path}/gone)"):
        jaxlm.from_pretrained(tmp_path / "gone")


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
def test_a_configuration_that_would_be_read_for_ever_is_refused(kind: str, folder: Path):
    path = folder / "config.json"
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "sparse": lambda: (path.touch(), os.truncate(path, 2**33)),
    }[kind]()
    with pytest.raises(UserError, match=r"config\.json: not a regular file"):
        jaxlm.from_pretrained(folder)


def test_a_name_that_the_hub_does_not_give():
    with refused("model", "(got nobody/nothing: LocalEntryNotFoundError)"):
        jaxlm.from_pretrained("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"pretraining_tp": 2}),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("bert", {"is_decoder": True}),
        ("roberta", {"add_cross_attention": True}),
        ("roberta", {"hidden_act": "relu"}),
    ],
    ids=str,
)
def test_an_option_that_changes_the_model_is_refused(name: str, changes: dict, tmp_path: Path):
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    edit_config(**changes)(folder)
    with pytest.raises(UserError, match="is not supported"):
        jaxlm.from_pretrained(folder)


def test_home_is_expanded_and_the_whole_file_wins_over_a_stale_index(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    monkeypatch.setenv("HOME", str(folder.parent))
    assert jaxlm.from_pretrained("~/model").config.family == "gpt2"


def test_names_without_the_prefix(folder: Path):
    wanted = jaxlm.from_pretrained(folder).params
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(short, folder / "model.safetensors")
    found = jaxlm.from_pretrained(folder).params
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("option", ["attention", "remat"])
def test_an_unknown_choice_is_refused(option: str, folder: Path):
    known = {"attention": "xla, blockwise, cudnn", "remat": "none, layer, dots"}
    with refused(option, "(got 'best')", known[option]):
        jaxlm.from_pretrained(folder, **{option: "best"})


def test_choices_go_into_the_configuration(folder: Path):
    plain = jaxlm.from_pretrained(folder).config
    lm = jaxlm.from_pretrained(
        folder, compute_dtype=jnp.bfloat16, attention="blockwise", remat="dots"
    )
    assert lm.config == plain.replace(compute_dtype="bfloat16", attention="blockwise", remat="dots")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def save_in_shards(folder: Path) -> list[Path]:
    jaxlm.save_pretrained(jaxlm.from_pretrained(folder), folder, max_shard_size="8KB")
    return shards(folder)


def test_a_truncated_or_missing_shard_is_named(folder: Path):
    *_, shard, _ = save_in_shards(folder)
    shard.write_bytes(shard.read_bytes()[:-1])
    with refused(str(shard), "truncated"):
        jaxlm.from_pretrained(folder)
    shard.unlink()
    with refused(f"{folder}{INDEX}", shard.name, "missing"):
        jaxlm.from_pretrained(folder)


def test_tensors_of_one_checkpoint_may_differ_in_dtype(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    dtypes = [np.float16, jnp.bfloat16, np.float32, np.float64]
    mixed = {name: x.astype(dtypes[i % 4]) for i, (name, x) in enumerate(tensors.items())}
    save_file(mixed, folder / "model.safetensors")
    found = jaxlm.from_pretrained(folder)
    save_file(
        {name: x.astype(np.float32) for name, x in mixed.items()}, folder / "model.safetensors"
    )
    wanted = jaxlm.from_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


@pytest.mark.parametrize("kept", ["both", "head"])
def test_a_tied_table_may_be_stored_twice_or_under_the_name_of_the_head(kept: str, folder: Path):
    wanted = jaxlm.from_pretrained(folder)
    assert wanted.config.tie_embeddings
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors[WTE].copy()
    if kept == "head":
        del tensors[WTE]
    save_file(tensors, folder / "model.safetensors")
    found = jaxlm.from_pretrained(folder)
    assert found.config == wanted.config
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_a_tied_model_with_another_output_table_is_untied(
    rows: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Wherever the tables differ, and however many of their rows are compared at a time."""
    tensors = load_file(folder / "model.safetensors")
    head = tensors[WTE].copy()
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    monkeypatch.setattr("jaxlm.models.hf_tensors.PIECE", rows * head.shape[1])
    lm = jaxlm.from_pretrained(folder)
    assert not lm.config.tie_embeddings
    np.testing.assert_array_equal(lm.params["lm_head"]["embedding"], head)
    np.testing.assert_array_equal(lm.params["embed"]["tokens"]["embedding"], tensors[WTE])
    assert jaxlm.models.shapes_from_pretrained(folder).config == lm.config
    jaxlm.save_pretrained(lm, tmp_path / "again")
    assert jaxlm.from_pretrained(tmp_path / "again").config == lm.config


@pytest.mark.parametrize("name", sorted(folder.name for folder in GOLDEN.iterdir()))
def test_a_round_trip_through_shards(name: str, tmp_path: Path):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    jaxlm.save_pretrained(lm, tmp_path, max_shard_size="8KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {path.name: load_file(path) for path in shards(tmp_path)}
    assert len(stored) > 2
    assert index["weight_map"] == {name: file for file in stored for name in stored[file]}
    sizes = {file: sum(x.nbytes for x in stored[file].values()) for file in stored}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(sizes[file] <= 8000 or len(stored[file]) == 1 for file in stored)
    found = jaxlm.from_pretrained(tmp_path)
    assert found.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, found.params, lm.params)


FAMILIES = sorted({case.partition("-")[0] for case in reference.CASES})


@pytest.mark.torch
@pytest.mark.parametrize("case", [*FAMILIES, "bert-classifier", "roberta-base", "modernbert-mean"])
def test_shards_of_theirs_and_of_ours_opened_by_them(case: str, tmp_path: Path):
    import transformers

    theirs = reference.make_model(case)
    inputs = reference.make_inputs(theirs)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert len(shards(tmp_path / "theirs")) > 2
    lm = jaxlm.from_pretrained(tmp_path / "theirs")
    found = jax.jit(lm.hidden if lm.config.head == "none" else lm.apply)(lm.params, **inputs)
    jaxlm.save_pretrained(lm, tmp_path / "ours", max_shard_size="8KB")
    architecture = reference.CASES[case][0]
    saved, loading = getattr(transformers, architecture).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    wanted = reference.outputs(theirs, inputs)
    np.testing.assert_array_equal(reference.outputs(saved, inputs), wanted)
    real = inputs["attention_mask"].astype(bool)
    real = real if wanted.ndim == 3 else real[:, 0]
    assert np.abs(found - wanted)[real].max() <= 1e-4


def test_a_save_removes_the_weights_of_the_one_before(folder: Path):
    lm = jaxlm.from_pretrained(folder)
    many = save_in_shards(folder)
    assert not (folder / "model.safetensors").exists()
    jaxlm.save_pretrained(lm, folder, max_shard_size=20_000)
    few = shards(folder)
    assert 1 < len(few) < len(many)
    jax.tree.map(np.testing.assert_array_equal, jaxlm.from_pretrained(folder).params, lm.params)
    jaxlm.save_pretrained(lm, folder)
    names = {path.name for path in folder.iterdir()}
    inputs = "inputs_and_outputs.safetensors"
    assert names == {"README.md", "config.json", "model.safetensors", inputs}
    jax.tree.map(np.testing.assert_array_equal, jaxlm.from_pretrained(folder).params, lm.params)


def test_a_size_that_is_none(folder: Path, tmp_path: Path):
    lm = jaxlm.from_pretrained(folder)
    with refused("max_shard_size", "(got 'large')"):
        jaxlm.save_pretrained(lm, tmp_path / "out", max_shard_size="large")


def test_a_model_card_is_written_once(folder: Path, tmp_path: Path):
    lm = jaxlm.from_pretrained(folder)
    jaxlm.save_pretrained(lm, tmp_path / "tuned")
    card = (tmp_path / "tuned" / "README.md").read_text()
    count = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    assert card.startswith("---\nlibrary_name: jaxlm\n---\n\n# tuned\n")
    for part in (f"A gpt2 decoder of {count:,} parameters in float32", "jaxlm.from_pretrained",
                 "AutoModelForCausalLM.from_pretrained"):  # fmt: skip
        assert part in card
    (tmp_path / "tuned" / "README.md").write_text("mine")
    jaxlm.save_pretrained(lm, tmp_path / "tuned")
    assert (tmp_path / "tuned" / "README.md").read_text() == "mine"


def test_the_tokenizer_is_carried_along(tmp_path: Path):
    lm = jaxlm.from_pretrained()
    jaxlm.save_pretrained(lm, tmp_path, max_shard_size="1MB")
    found = jaxlm.from_pretrained(tmp_path)
    text = "A film that is worth seeing twice."
    assert found.tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]


def test_a_head_is_found_by_what_the_checkpoint_holds():
    heads = {
        folder.name: (config.kind, config.head, config.pooled, config.num_labels)
        for folder in GOLDEN.iterdir()
        for config in [jaxlm.models.shapes_from_pretrained(folder).config]
        if config.kind == "encoder" or folder.name == "opt"
    }
    assert heads == {
        "opt": ("decoder", "lm", False, 0),
        "bert": ("encoder", "mlm", False, 0),
        "bert-untied": ("encoder", "mlm", False, 0),
        "bert-base": ("encoder", "none", True, 0),
        "bert-classifier": ("encoder", "classifier", True, 3),
        "roberta": ("encoder", "mlm", False, 0),
        "roberta-classifier": ("encoder", "classifier", True, 4),
        "distilbert": ("encoder", "mlm", False, 0),
        "modernbert": ("encoder", "mlm", False, 0),
    }


@pytest.mark.parametrize(
    "name", ["bert-classifier", "roberta", "distilbert", "modernbert", "llama"]
)
def test_the_configuration_says_whether_a_classifier_is_of_every_token(name: str, tmp_path: Path):
    """The tensors of ModernBERT are the same for both; old files of BERT hold a pooler, too."""
    lm = jaxlm.from_pretrained(GOLDEN / name)
    names = ("O", "B-X", "I-X")
    new = jaxlm.models.add_classifier(lm, 3, jax.random.key(0), names, head="token_classifier")
    jaxlm.save_pretrained(new, tmp_path)
    assert jaxlm.from_pretrained(tmp_path).config == new.config
    assert jaxlm.models.shapes_from_pretrained(tmp_path).config == new.config
    (tmp_path / "model.safetensors").rename(tmp_path / "weights")
    assert jaxlm.models.shapes_from_pretrained(tmp_path).config.head == "token_classifier"
    tensors = load_file(tmp_path / "weights")
    if name == "bert-classifier":
        pooler = load_file(GOLDEN / name / "model.safetensors")["bert.pooler.dense.weight"]
        save_file({**tensors, "bert.pooler.dense.weight": pooler}, tmp_path / "model.safetensors")
        assert jaxlm.from_pretrained(tmp_path).config == new.config
    # Without a classifier the name in config.json means nothing.
    head = ("classifier", "score", "head.")
    rest = {key: x for key, x in tensors.items() if not key.startswith(head)}
    save_file(rest, tmp_path / "model.safetensors")
    if name == "llama":
        embedding = tensors["model.embed_tokens.weight"]
        save_file(rest | {"lm_head.weight": embedding}, tmp_path / "model.safetensors")
    assert jaxlm.from_pretrained(tmp_path).config.head == ("lm" if name == "llama" else "none")


def test_saving_where_nothing_can_be_written(folder: Path, tmp_path: Path):
    lm = jaxlm.from_pretrained(folder)
    (tmp_path / "file").touch()
    with refused(f"{tmp_path}/file/model", "(Not a directory)"):
        jaxlm.save_pretrained(lm, tmp_path / "file" / "model")
    (tmp_path / "taken" / "model.safetensors").mkdir(parents=True)
    with refused(f"{tmp_path}/taken", "cannot be written"):
        jaxlm.save_pretrained(lm, tmp_path / "taken")
    assert not list((tmp_path / "taken").glob("saving-*"))


def test_saving_the_parameters_of_another_model(folder: Path, tmp_path: Path):
    lm = jaxlm.from_pretrained(folder)
    other = jaxlm.from_pretrained(GOLDEN / "llama")
    with refused("params", "embed.positions.embedding of shape [16, 24]"):
        jaxlm.save_pretrained(lm, tmp_path / "out", other.params)
    assert not (tmp_path / "out").exists()


def test_a_save_leaves_no_temporary_file_and_replaces_what_was_there(folder: Path):
    lm = jaxlm.from_pretrained(folder)
    doubled = jax.tree.map(lambda x: 2 * x, lm.params)
    jaxlm.save_pretrained(lm, folder, doubled)
    assert not list(folder.glob("saving-*"))
    jax.tree.map(np.testing.assert_array_equal, jaxlm.from_pretrained(folder).params, doubled)


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    path, really = folder / "model.safetensors", Path.open

    def refuse(self: Path, *args, **options):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return really(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with refused(str(path), "cannot be read (Permission denied)"):
        jaxlm.from_pretrained(folder)


def test_links_of_the_hub_cache_are_followed(folder: Path, tmp_path: Path):
    """There a model folder holds links to files of another one."""
    wanted = jaxlm.from_pretrained(folder)
    many = save_in_shards(folder)
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate([*many, folder / "config.json"]):
        blob = path.rename(tmp_path / "blobs" / str(i))
        path.symlink_to(Path("../blobs") / blob.name)
    found = jaxlm.from_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


# As on the hub, before transformers 5 gave each kind of layer its own rotation.
FLAT = {
    "gemma3_text": {"rope_theta": 900.0, "rope_local_base_freq": 90.0, "sliding_window_pattern": 2,
                    "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "olmo3": {"rope_theta": 500000.0, "rope_scaling": reference.YARN},
    "modernbert": {"global_rope_theta": 900.0, "local_rope_theta": 90.0,
                   "global_attn_every_n_layers": 2, "rope_parameters": None},
    "smollm3": {"rope_theta": 900.0, "no_rope_layers": [0, 1]},
    "phi3": {"rope_theta": 900.0, "rope_scaling": None, "partial_rotary_factor": 0.5,
             "hidden_size": 32},
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("case", FLAT)
def test_an_old_configuration_means_what_it_means_to_transformers(case: str):
    import transformers

    architecture, options = reference.CASES[case]
    options = options | FLAT[case]
    theirs = getattr(transformers, architecture).config_class(**copy.deepcopy(options))
    wanted, _ = parse_config(json.loads(theirs.to_json_string()), "theirs")
    assert parse_config(options | {"model_type": case}, "ours")[0] == wanted


DIGITS = 10**400
HOSTILE = [
    *(("llama", {"hidden_size": value})
      for value in (0, -1, 2.5, 24.0, True, "24", None, [], [24], {}, DIGITS, 2**40)),
    *(("llama", {key: value}) for key in ("num_attention_heads", "num_hidden_layers", "vocab_size",
      "intermediate_size", "max_position_embeddings") for value in (0, None)),
    *(("llama", {"rms_norm_eps": value}) for value in (0, -1, "a", None, [1e-6], True, 1e400)),
    *(("llama", {"rope_theta": value}) for value in (0, -1, "a", [1.0], DIGITS)),
    *(("llama", {key: "yes"}) for key in ("attention_bias", "mlp_bias", "tie_word_embeddings",
      "rope_scaling", "rope_parameters")),
    *(("llama", {"eos_token_id": value}) for value in ([], "a", [None], 1.5, [[1]], DIGITS, -7)),
    *(("llama", {"architectures": value}) for value in (3, "LlamaForCausalLM", [3])),
    *(("llama", {"hidden_act": value}) for value in (3, ["silu"], {})),
    ("llama", {"head_dim": 0}), ("llama", {"num_key_value_heads": 3}), ("llama", {"head_dim": 7}),
    *(("llama", {"rope_parameters": {"rope_type": "linear", "factor": factor}})
      for factor in (0, -2, "a", None, 1e400, [2])),
    ("llama", {"rope_parameters": {"rope_type": ["linear"], "factor": 2.0}}),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0,
      "high_freq_factor": 4.0, "original_max_position_embeddings": 8}}),
    ("gemma2", {"layer_types": ["full_attention"]}), ("gemma2", {"layer_types": "full_attention"}),
    ("gemma2", {"layer_types": ["chunked_attention"] * 3}), ("gemma2", {"sliding_window": 0}),
    ("gemma2", {"query_pre_attn_scalar": 0}), ("gemma2", {"attn_logit_softcapping": -1.0}),
    ("gpt2", {"n_head": 5}), ("gpt2", {"n_head": 48}), ("gpt2", {"n_inner": "a"}),
    ("gpt2", {"activation_function": ["gelu"]}), ("gpt2", {"layer_norm_epsilon": "a"}),
    ("roberta", {"max_position_embeddings": 2}), ("roberta", {"type_vocab_size": -1}),
    ("bert-classifier", {"id2label": {"0": "a", "1": "a", "2": "b"}}),
    ("bert-classifier", {"id2label": {"0": "a", "1": "b"}}), ("bert-classifier", {"id2label": [1]}),
    ("gemma3_text", {"attn_logit_softcapping": 1.0}), ("gemma3_text", {"rope_parameters": {
      "sliding_attention": {"rope_type": "linear", "factor": 2.0}}}),
    *(("gemma3_text", {"rope_parameters": {"full_attention": value}}) for value in (3, [],
      {"rope_type": "linear", "factor": 0}, {"rope_type": "longrope"})),
    *(("gemma3_text", {key: 0, "layer_types": None}) for key in ("sliding_window_pattern",
      "rope_local_base_freq")),
    *(("granite", {key: value}) for value in (0, "a", None, DIGITS) for key in (
      "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")),
    *(("smollm3", {"no_rope_layers": value}) for value in ([1], [1, 2], [True, True], 4)),
    *(("phi3", {"rope_parameters": {"rope_type": kind, "factor": 2.0}}) for kind in ("longrope",
      "yarn", "linear")),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 0}}),
    *(("distilbert", {key: 0}) for key in ("dim", "n_layers", "n_heads", "hidden_dim")),
    *(("modernbert", {key: "a"}) for key in ("norm_bias", "classifier_bias", "classifier_pooling",
      "classifier_activation", "local_attention", "norm_eps", "decoder_bias")),
    ("gpt_neox", {"rotary_pct": 0, "rope_parameters": None}), ("gpt_neox", {"rotary_pct": "a"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), HOSTILE, ids=lambda x: str(x)[:60])
def test_a_value_that_cannot_be_is_refused_by_its_name(
    name: str, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By either reader, before any weights, and it is config.json that is blamed."""
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    edit_config(**changes)(folder)
    for read in (jaxlm.from_pretrained, jaxlm.models.shapes_from_pretrained):
        with pytest.raises(UserError, match=re.escape(f"{folder}/config.json")):
            read(folder)


def test_end_tokens_of_the_wrong_kind_are_blamed_on_their_own_file(folder: Path):
    for value in ("a", [], [1.5], {"a": 1}):
        text = json.dumps({"eos_token_id": value})
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id must be"):
            jaxlm.from_pretrained(folder)


def test_a_token_id_of_minus_one_is_none(tmp_path: Path):
    folder = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))
    edit_config(pad_token_id=-1)(folder)
    assert jaxlm.from_pretrained(folder).config.pad_id is None


@pytest.mark.torch
@pytest.mark.parametrize("case", ["gpt2", "llama-tied", "gemma", "bert", "roberta", "modernbert"])
def test_a_tied_model_with_another_output_table_keeps_it_as_theirs_does(case: str, tmp_path: Path):
    import transformers

    architecture, _ = reference.CASES[case]
    model = reference.make_model(case)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (table,) = (
        x for name, x in tensors.items() if re.search("wte|embed_tokens|word_emb|tok_emb", name)
    )
    heads = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder"}
    head = (heads | {"modernbert": "decoder"}).get(case, "lm_head")
    tensors[head + ".weight"] = table + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = getattr(transformers, architecture).from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    lm = jaxlm.from_pretrained(tmp_path)
    assert not lm.config.tie_embeddings
    assert not jaxlm.models.shapes_from_pretrained(tmp_path).config.tie_embeddings
    inputs = reference.make_inputs(theirs)
    real = inputs["attention_mask"].astype(bool)
    wanted = reference.outputs(theirs, inputs)[real]
    np.testing.assert_allclose(jax.jit(lm.apply)(lm.params, **inputs)[real], wanted, atol=1e-4)
    jaxlm.save_pretrained(lm, tmp_path / "ours")
    again = jaxlm.from_pretrained(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)


UNUSED = {
    "llama": ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight",
              "lm_head.bias", "model.layers.0.mlp.router.weight", "model.norm.bias"],
    "bert": ["bert.encoder.layer.0.attention.self.distance_embedding.weight"],
    "opt": ["model.decoder.layer_norm.weight"],
    "modernbert": ["model.layers.0.attn_norm.weight", "head.norm.bias"],
}  # fmt: skip


@pytest.mark.parametrize("case", [(name, extra) for name in UNUSED for extra in UNUSED[name]])
def test_a_weight_that_belongs_to_the_model_and_is_not_used_is_refused(case, tmp_path: Path):
    name, extra = case
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    edit_weights(lambda tensors: tensors.update({extra: np.zeros(24, np.float32)}))(folder)
    with pytest.raises(UserError, match=rf"{re.escape(extra)} is not used by a {name} model"):
        jaxlm.from_pretrained(folder)


HARMLESS = {
    "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
    "gpt2": ["h.0.attn.bias", "transformer.h.1.attn.masked_bias", "lm_head.weight"],
    "gpt_neox": ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias",
                 "gpt_neox.layers.1.attention.rotary_emb.inv_freq"],
    "bert": ["bert.embeddings.position_ids", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
             "cls.seq_relationship.weight", "cls.seq_relationship.bias"],
    "roberta": ["roberta.embeddings.position_ids", "roberta.pooler.dense.weight"],
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.filterwarnings("error")
def test_buffers_of_old_checkpoints_are_left_out_without_a_word(name: str, tmp_path: Path):
    """The tensors that transformers, too, expects to find and ignores."""
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    wanted = jaxlm.from_pretrained(folder)

    def add(tensors):
        extra = {
            key: np.zeros((2, 2), np.float32) for key in HARMLESS[name] if "lm_head" not in key
        }
        tied = {key: tensors[WTE] for key in HARMLESS[name] if "lm_head" in key}
        tensors.update(extra | tied)

    edit_weights(add)(folder)
    found = jaxlm.from_pretrained(folder)
    assert found.config == wanted.config
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


def test_another_head_is_left_out_and_named(tmp_path: Path):
    folder = Path(shutil.copytree(GOLDEN / "bert-base", tmp_path / "bert"))
    head = {"qa_outputs.weight": np.zeros((2, 24), np.float32)}
    edit_weights(lambda tensors: tensors.update(head))(folder)
    with pytest.warns(UserWarning, match=r"qa_outputs\.weight belong to another head than 'none'"):
        jaxlm.from_pretrained(folder)


def test_files_are_utf_8_whatever_the_locale(tmp_path: Path):
    folder = Path(shutil.copytree(GOLDEN / "bert-classifier", tmp_path / "modèle"))
    edit_config(id2label={"0": "naïve", "1": "很好", "2": "c"})(folder)
    path = folder / "config.json"
    text = json.dumps(json.loads(path.read_text()), ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    script = """import sys, jaxlm
jaxlm.save_pretrained(jaxlm.from_pretrained(sys.argv[1]), sys.argv[2])"""
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", script, folder, tmp_path / "été"]
    subprocess.run(command, env=os.environ | c_locale, check=True)
    lm = jaxlm.from_pretrained(tmp_path / "été")
    assert lm.config.label_names == ("naïve", "很好", "c")
    assert "# été" in (tmp_path / "été" / "README.md").read_text(encoding="utf-8")


def test_names_of_classes_are_read_and_written(tmp_path: Path):
    folder = Path(shutil.copytree(GOLDEN / "bert-classifier", tmp_path / "bert"))
    assert jaxlm.from_pretrained(folder).config.label_names == ()
    names = ("schlecht", "naïve", "很好")
    named = {str(i): name for i, name in enumerate(names)}
    edit_config(id2label=named)(folder)
    lm = jaxlm.from_pretrained(folder)
    assert lm.config.label_names == names
    jaxlm.save_pretrained(lm, tmp_path / "again")
    stored = json.loads((tmp_path / "again/config.json").read_text(encoding="utf-8"))
    assert stored["id2label"] == named
    assert stored["label2id"] == {name: i for i, name in enumerate(names)}
    encoder = jaxlm.from_pretrained(GOLDEN / "bert")
    assert encoder.config.label_names == ()
    new = jaxlm.models.add_classifier(encoder, 2, jax.random.key(0), ["bad", "good"])
    assert new.config.label_names == ("bad", "good")
    with pytest.raises(ValueError, match=r"^label_names: must be 2 names"):
        jaxlm.models.add_classifier(encoder, 2, jax.random.key(0), ["bad"])


def test_a_save_leaves_nothing_of_the_model_before(folder: Path, tmp_path: Path):
    """What would be read with it; other weights are the user's."""
    stale = ("generation_config.json", "adapter_config.json", "tokenizer.json",
             "tokenizer_config.json", "special_tokens_map.json", "merges.txt",
             "chat_template.jinja", "model-00001-of-00002.safetensors",
             "model.safetensors.index.json")  # fmt: skip
    kept = ("README.md", "notes.txt", "train.jsonl", "pytorch_model.bin",
            "pytorch_model-00001-of-00002.bin", "adapter_model.safetensors")  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    for name in (*stale, *kept):
        (out / name).write_text("old")
    (out / "additional_chat_templates").mkdir()
    jaxlm.save_pretrained(jaxlm.from_pretrained(folder), out)
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "model.safetensors", *kept}
    assert all((out / name).read_text() == "old" for name in kept)


def test_too_little_memory_says_what_was_asked_for_and_what_takes_less(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    from jaxlm.models.hf_tensors import Checkpoint

    count = sum(leaf.size for leaf in jax.tree.leaves(jaxlm.from_pretrained(folder).params))

    def full(*args, **options):
        raise MemoryError

    monkeypatch.setattr(Checkpoint, "read", full)
    with pytest.raises(UserError) as caught:
        jaxlm.from_pretrained(folder)
    sizes = [f"{count * size / 1e9:.3g} GB" for size in (4, 2, 1, 0.5)]
    assert str(caught.value).startswith(f"{folder}: the parameters do not fit into memory (got ")
    assert re.findall(r"[\d.e-]+ GB", str(caught.value)) == sizes


@pytest.mark.parametrize("value", ["int8", "floaty", None, 3])
def test_a_dtype_that_no_parameter_can_have_is_refused(value, folder: Path):
    with pytest.raises(UserError, match=r"^param_dtype: "):
        jaxlm.from_pretrained(folder, value)


@pytest.mark.parametrize(
    ("name", "key", "given", "meant", "written"),
    [
        ("gemma2", "hidden_activation", "gelu", "gelu", "gelu"),
        ("gemma2", "hidden_activation", "relu", "relu", "relu"),
        ("gemma2", "hidden_activation", None, "gelu_tanh", "gelu_pytorch_tanh"),
        ("gemma", "hidden_act", "gelu", "gelu_tanh", "gelu_pytorch_tanh"),
    ],
)
def test_the_activation_is_the_one_that_is_named(name, key, given, meant, written, tmp_path: Path):
    """But for the first Gemma, which named the exact GELU and meant the approximation."""
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    edit_config(**{key: given})(folder)
    lm = jaxlm.from_pretrained(folder)
    assert lm.config.activation == meant
    jaxlm.save_pretrained(lm, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())[key] == written


def test_layers_without_a_window_are_saved_as_transformers_needs_them(tmp_path: Path):
    folder = Path(shutil.copytree(GOLDEN / "gemma2", tmp_path / "gemma2"))
    kinds = ["full_attention"] * jaxlm.from_pretrained(folder).config.num_layers
    edit_config(layer_types=kinds)(folder)
    lm = jaxlm.from_pretrained(folder)
    assert not any(lm.config.windowed)
    jaxlm.save_pretrained(lm, tmp_path / "again")
    stored = json.loads((tmp_path / "again/config.json").read_text())
    assert (stored["layer_types"], type(stored["sliding_window"])) == (kinds, int)


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_activation": "gelu"},
        {"hidden_activation": "relu"},
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ],
    ids=str,
)
def test_choices_of_gemma_2_there_and_back(changes: dict, tmp_path: Path):
    """The numbers are those of transformers, and what is saved gives it the same again."""
    import transformers

    torch_model = reference.make_model("gemma2", **changes)
    torch_model.save_pretrained(tmp_path / "theirs")
    inputs = reference.make_inputs(torch_model)
    real = inputs["attention_mask"].astype(bool)
    wanted = reference.outputs(torch_model, inputs)[real]
    lm = jaxlm.from_pretrained(tmp_path / "theirs")
    found = jax.jit(lm.apply)(lm.params, **inputs)[real]
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-5)
    jaxlm.save_pretrained(lm, tmp_path / "ours")
    again = transformers.Gemma2ForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    np.testing.assert_array_equal(reference.outputs(again.eval(), inputs)[real], wanted)

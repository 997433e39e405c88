"""Load a model or a run and save it in the Hugging Face layout.

usage: jaxlm convert SOURCE TARGET [--dtype=float32|bfloat16] [--adapter] [--base=FOLDER]

SOURCE is a folder with config.json and safetensors, a GGUF file, a hub id, or the folder of a run,
whose tested parameters are saved, or of a PEFT adapter. TARGET is a new folder. `--adapter` saves
only the low-rank adapters of a run, as a folder of Hugging Face PEFT; without it they are merged
into the model. `--base` is where the model is that a run or an adapter began with, if it has moved.
The README.md of a run says what it was trained on, how, and with which results.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.artifacts.files import absolute, file_path, write_atomic
from jaxlm.cli.config import split_args
from jaxlm.core.checks import dtype_name
from jaxlm.core.errors import UserError

ADAPTER = "--adapter"
_ADAPTERS = """---
library_name: peft
---

# {}

Low-rank adapters. `peft.PeftModel.from_pretrained(base_model, "path/to/this/folder")` opens
them, and `jaxlm.from_pretrained("path/to/this/folder")`.
"""


def run(args: Sequence[str]) -> None:
    """Run the command `jaxlm convert`."""
    words, flags = split_args([word for word in args if word != ADAPTER])
    dtype = dtype_name(flags.pop("dtype", "float32"), "dtype")
    base = absolute(flags.pop("base", None), "base")
    if len(words) != 2 or flags:
        given = " ".join([*words, *(f"--{name}" for name in flags)]) or "nothing"
        raise UserError(
            f"TARGET: convert takes SOURCE, TARGET, --dtype, --adapter and --base (got {given}). "
            "See jaxlm convert --help."
        )
    source, target = words[0], file_path(words[1], "TARGET")
    there = UserError(f"TARGET: exists already (got {target}). Give a new folder.")
    if target.exists():
        raise there

    from jaxlm.models import save_pretrained
    from jaxlm.peft import save_adapter
    from jaxlm.peft.adapters import adapter_base, is_adapter
    from jaxlm.train.load import load_model
    from jaxlm.train.run_folder import RunFolder

    lm = load_model(source, param_dtype=dtype, base=base)
    folder = RunFolder(source, "SOURCE")
    stored = folder.config()
    if ADAPTER in args and lm.config.head == "token_classifier":
        raise UserError(
            f"--adapter: would leave out the head, which is trained, too (got {source}). Convert "
            "the whole model."
        )
    if base is None and is_adapter(folder.path):
        base = adapter_base(folder.path)
    elif base is None and stored is not None and isinstance(stored["model"], str):
        base = stored["model"]
    try:
        target.mkdir(parents=True)
    except FileExistsError:  # another command was faster
        raise there from None
    try:
        if ADAPTER in args:
            save_adapter(lm, target, base)
        else:
            save_pretrained(lm, target)
        if stored is not None:
            _write_card(target / "README.md", folder, stored, base)
    except BaseException:
        with contextlib.suppress(OSError):
            target.rmdir()
        raise
    print(f"{source} -> {target} ({dtype})")


def _write_card(path: Path, folder: Any, stored: dict[str, Any], base: str | None) -> None:
    """Add to a model card what the model was trained on, how, and with which results."""
    import yaml

    text, summary = _ADAPTERS.format(path.absolute().parent.name), folder.summary() or {}
    if path.exists():
        text = path.read_text(encoding="utf-8")
    if base is not None and not os.path.isabs(base):  # the hub links to a model on it
        text = text.replace("---\n", f"---\nbase_model: {base}\n", 1)
    step, steps = folder.tested_step() or (0, stored["steps"])
    rows = {"base model": _public(base) or "none, or that of jaxlm", "step": f"{step} of {steps}"}
    rows |= {f"SHA-256 of `{key}`": digest for key, digest in folder.digests().items()}
    for section in ("zero_shot", "validation", "test"):
        rows |= {f"{section} {key}": value for key, value in (summary.get(section) or {}).items()}
    rows |= summary.get("versions") or {}
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items() if value is not None)
    config = yaml.safe_dump(_public(stored), sort_keys=False, allow_unicode=True)
    command = "pretrain" if "corpus" in stored else "finetune"
    text += f"\n## Training\n\n| | |\n|---|---|\n{table}"
    text += f"\n`jaxlm {command} config.yaml`, where config.yaml is\n\n```yaml\n{config}```\n"
    write_atomic(path, text)


def _public(value: Any) -> Any:
    """Return a configuration with the last part alone of paths on this machine."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value

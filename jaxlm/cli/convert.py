"""Load a model or a run and save it in the Hugging Face layout.

usage: jaxlm convert SOURCE TARGET [--dtype=float32|bfloat16] [--adapter]

SOURCE is a folder with config.json and safetensors, a GGUF file, a hub id, or the folder of a run,
whose tested parameters are saved. TARGET is a new folder. `--adapter` saves only the low-rank
adapters of a run, as a folder of Hugging Face PEFT; without it they are merged into the model.
"""

import contextlib
from collections.abc import Sequence

from jaxlm.artifacts.files import file_path
from jaxlm.cli.config import split_args
from jaxlm.core.checks import dtype_name
from jaxlm.core.errors import UserError

ADAPTER = "--adapter"


def run(args: Sequence[str]) -> None:
    """Run the command `jaxlm convert`."""
    words, flags = split_args([word for word in args if word != ADAPTER])
    dtype = dtype_name(flags.pop("dtype", "float32"), "dtype")
    if len(words) != 2 or flags:
        given = " ".join([*words, *(f"--{name}" for name in flags)]) or "nothing"
        raise UserError(
            f"TARGET: convert takes SOURCE, TARGET, --dtype and --adapter (got {given}). See "
            "jaxlm convert --help."
        )
    source, target = words[0], file_path(words[1], "TARGET")
    there = UserError(f"TARGET: exists already (got {target}). Give a new folder.")
    if target.exists():
        raise there

    from jaxlm.models import save_pretrained
    from jaxlm.peft import save_adapter
    from jaxlm.train.load import load_model
    from jaxlm.train.run_folder import RunFolder

    lm = load_model(source, param_dtype=dtype)
    try:
        target.mkdir(parents=True)
    except FileExistsError:  # another command was faster
        raise there from None
    try:
        if ADAPTER in args:
            save_adapter(lm, target, (RunFolder(source, "SOURCE").config() or {}).get("model"))
        else:
            save_pretrained(lm, target)
    except BaseException:
        with contextlib.suppress(OSError):
            target.rmdir()
        raise
    print(f"{source} -> {target} ({dtype})")

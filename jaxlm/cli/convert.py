"""Load a model or a run and save it in the Hugging Face layout.

usage: jaxlm convert SOURCE TARGET [--dtype=float32|bfloat16]

SOURCE is a folder with config.json and safetensors, a hub id, or the folder of a run of
`jaxlm finetune`, whose tested parameters are saved. TARGET is a new folder.
"""

import contextlib
from collections.abc import Sequence

from jaxlm.artifacts.files import file_path
from jaxlm.cli.config import split_args
from jaxlm.core.checks import dtype_name
from jaxlm.core.errors import UserError


def run(args: Sequence[str]) -> None:
    """Run the command `jaxlm convert`."""
    words, flags = split_args(args)
    dtype = dtype_name(flags.pop("dtype", "float32"), "dtype")
    if len(words) != 2 or flags:
        given = " ".join([*words, *(f"--{name}" for name in flags)]) or "nothing"
        raise UserError(
            f"TARGET: convert takes SOURCE, TARGET and --dtype (got {given}). See jaxlm convert "
            "--help."
        )
    source, target = words[0], file_path(words[1], "TARGET")
    there = UserError(f"TARGET: exists already (got {target}). Give a new folder.")
    if target.exists():
        raise there

    from jaxlm.models import save_pretrained
    from jaxlm.train.load import load_model

    lm = load_model(source, param_dtype=dtype)
    try:
        target.mkdir(parents=True)
    except FileExistsError:  # another command was faster
        raise there from None
    try:
        save_pretrained(lm, target)
    except BaseException:
        with contextlib.suppress(OSError):
            target.rmdir()
        raise
    print(f"{source} -> {target} ({dtype})")

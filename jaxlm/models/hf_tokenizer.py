"""The one place where something is opened with transformers: a tokenizer, and never its code."""

from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.models.hf_folder import check_regular

FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in FILES)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, by the classes of transformers alone.

    A folder may name a class of its own in `auto_map`, with the Python file beside it. Such code
    is never run and nobody is asked whether to.

    Raises:
      UserError: it cannot be opened, or not without such code.
    """
    from transformers import AutoTokenizer

    check_regular(folder)
    try:
        found = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        if not isinstance(found.model_max_length, int | float):
            raise TypeError(f"model_max_length is no number, but {found.model_max_length!r}")
        return found
    except Exception as error:  # transformers raises whatever a wrong value leads to
        reason = str(error).strip().splitlines()
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: the tokenizer is a Python class of the folder's own, and code from a "
                "model folder is never run. Give a folder with a tokenizer.json that transformers "
                "reads without it."
            ) from None
        raise UserError(
            f"{folder}: the tokenizer cannot be read ({type(error).__name__}: "
            f"{reason[0][:200] if reason else 'no reason given'}). Download its files again."
        ) from error

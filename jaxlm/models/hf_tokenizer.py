"""Open tokenizers: the only use of transformers' loaders. Code in a folder is never run."""

from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.models.hf_config import check_regular

FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in FILES)


def read_tokenizer(folder: Path) -> Any:
    """Open the tokenizer in a folder with a class of transformers.

    A folder may name its own class in `auto_map`, with a Python file beside it. Such code is never
    run, and the user is not asked to allow it.
    """
    from transformers import AutoTokenizer

    check_regular(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"model_max_length is not a number, but {tokenizer.model_max_length!r}")
        return tokenizer
    except Exception as error:  # transformers raises whatever a wrong value leads to
        reason = str(error).strip().splitlines()
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: the tokenizer is a Python class in the folder, and code from a "
                "model folder is never run. Give a folder with a tokenizer.json that transformers "
                "reads without it."
            ) from None
        raise UserError(
            f"{folder}: the tokenizer cannot be read ({type(error).__name__}: "
            f"{reason[0][:200] if reason else 'no reason given'}). Download its files again."
        ) from error

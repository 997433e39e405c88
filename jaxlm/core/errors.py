"""The exception for mistakes that the user can fix, and errors that others raise."""

import re


class UserError(ValueError):
    """A mistake in what the user gave: a file, a configuration, an argument, a checkpoint.

    The message has the form `KEY: what is wrong (got VALUE). What to do.` The command line prints
    it without a traceback and exits with code 2; library callers catch it as a `ValueError`.
    """


def out_of_memory(error: BaseException) -> str | None:
    """Return how much memory an error says was asked for; None if it is about something else."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return None
    asked = re.search(r"\d[\d.]*\s?(?:[KMGTPE]i?B|bytes)", str(error))
    return f"asked for {asked[0]} at once" if asked else "the size is not known"

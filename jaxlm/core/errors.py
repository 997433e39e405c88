"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """A mistake in what the user gave: files, configuration, or a checkpoint.

    The message is one sentence that says what is wrong, where, and what to do. The command line
    prints it without a traceback and exits with code 2; library callers catch it as a `ValueError`.
    """

"""The exception for mistakes that the user can fix."""


class UserError(ValueError):
    """A mistake in what the user gave: a file, a configuration, an argument, a checkpoint.

    The message has the form `KEY: what is wrong (got VALUE). What to do.` The command line prints
    it without a traceback and exits with code 2; library callers catch it as a `ValueError`.
    """

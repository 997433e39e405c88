"""Arguments that are one of a few names."""

from jaxlm.core.errors import UserError


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UserError, with the names that are known, for any other."""
    if value not in known:
        raise UserError(f"{name}={value!r} is not known; give one of {', '.join(known)}")

"""The form of every sentence that is written for a user's mistake."""

import contextlib
import re
from collections.abc import Iterator

import pytest

from jaxlm.core.errors import UserError

FORM = re.compile(
    r"(?:(?P<where>command line|[^:]+\.yaml(?:: (?:method|variant) [^:]+)?): )?"
    r"(?P<key>[^:]+): (?P<what>\S.+?)\. (?P<todo>[-`'\"]*[A-Za-z].*[.?])",
    re.DOTALL,
)
"""`KEY: what is wrong (got VALUE). What to do.`, perhaps after the file or `command line`."""


def check_sentence(sentence: str, key: str) -> re.Match[str]:
    """Assert that a sentence has the form and names the key; return its parts."""
    found = FORM.fullmatch(sentence)
    assert found is not None, sentence
    assert found["key"] == key, sentence
    return found


@contextlib.contextmanager
def refused(key: str, *parts: str) -> Iterator[None]:
    """Require a UserError of that form, with the key and these parts."""
    with pytest.raises(UserError) as caught:
        yield
    sentence = str(caught.value)
    check_sentence(sentence, key)
    for part in parts:
        assert part in sentence, sentence

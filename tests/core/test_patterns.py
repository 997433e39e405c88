"""Regular expressions of users: the meaning of `re`, and an end."""

import re

import pytest

from jaxlm.core import patterns
from jaxlm.core.errors import UserError
from jaxlm.core.patterns import searcher

PATHS = ["layers.attention.q_proj.kernel", "layers.mlp.up_proj.bias", "lm_head.embedding", "a" * 40]


@pytest.mark.parametrize(
    "pattern",
    [r"attention\.(q|v)_proj", r"\.bias$", r"^layers\..*\.kernel$|^lm_head", r"^(?!lm_head)",
     "(?i)MLP", r"a{40}$", r"[^.]+\.[^.]+$", "", r"(?P<x>a)(?P=x)"],
)  # fmt: skip
def test_the_same_paths_are_found_as_by_re(pattern: str):
    assert list(map(searcher(pattern, "select"), PATHS)) == [
        re.search(pattern, path) is not None for path in PATHS
    ]


@pytest.mark.parametrize("pattern", [r"(a|aa)+$", r"^(a|a|ab|b)*(a|aa)+c$"])
def test_a_search_without_end_is_stopped(pattern: str, monkeypatch: pytest.MonkeyPatch):
    """Of both, the number of ways to match grows exponentially with the length of the text."""
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    search = searcher(pattern, "optimizer.select")
    with pytest.raises(UserError, match=r"^optimizer\.select: takes more than 0\.2 s"):
        search("a" * 200 + ".kernel")


@pytest.mark.parametrize(
    "pattern", ["(", "[", "*a", "(?P<x>a)(?P<x>b)", "(a" * 900, "a" * 3000, "((a{999}){999}){999}"]
)
def test_what_is_no_expression_or_a_large_one_is_refused(pattern: str):
    with pytest.raises(UserError, match=r"^peft\.targets: is (no regular|too long)"):
        searcher(pattern, "peft.targets")

"""Shared checks of values: the bounds themselves pass, what lies beyond is refused by name."""

import math
import re
from types import SimpleNamespace

import pytest

from jaxlm.core import checks
from jaxlm.core.errors import UserError


def config(**values):
    return SimpleNamespace(**values)


def test_values_at_the_bounds_pass():
    checks.whole(config(n=1, m=checks.MOST, none=None), "n", "m", "none")
    checks.number(config(x=0.0, y=1), "x", "y", least=0, most=1)
    checks.seeds(config(a=0, b=(0, 2**32 - 1)), "a", "b")
    checks.one_of("k", 2, (1, 2))
    checks.distinct("k", ["a", "b"])


@pytest.mark.parametrize("value", [0, -1, checks.MOST + 1, 10**40, 1.0, True, "1", math.inf, []])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(UserError, match=r"^n: must be .* \(got .*\)\. "):
        checks.whole(config(n=value), "n")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1.0001, False, "x", None])
def test_what_is_no_fraction_is_refused(value):
    if value is None:
        checks.number(config(x=value), "x", above=0, most=1)
        return
    with pytest.raises(UserError, match=r"^x: must be .* \(got .*\)\. "):
        checks.number(config(x=value), "x", above=0, most=1)


@pytest.mark.parametrize("value", [-1, 2**32, 0.5, True, (1, -1)])
def test_what_is_no_seed_is_refused(value):
    with pytest.raises(UserError, match=r"^seeds: "):
        checks.seeds(config(seeds=value), "seeds")


def test_bounds_are_named_once():
    for bounds, wanted in (
        ({"least": 0, "above": 0}, "above 0"),
        ({"least": 0, "below": 1}, "at least 0 and below 1"),
        ({"above": 0, "most": 1}, "above 0 and at most 1"),
        ({}, "finite"),
    ):
        with pytest.raises(UserError, match=rf"^x: must be {wanted} \(got nan\)\. Correct it\.$"):
            checks.real("x", math.nan, **bounds)


def test_choices_are_listed_and_repetition_is_named():
    with pytest.raises(UserError, match=r"^k: not known \(got 'z'\)\. Choose one of a, b\.$"):
        checks.one_of("k", "z", ("a", "b"))
    with pytest.raises(UserError, match=r"twice \(got 1\)"):
        checks.distinct("seeds", (1, 2, 1))
    with pytest.raises(UserError, match="empty"):
        checks.distinct("seeds", ())


PATHS = ["layers.attention.q_proj.kernel", "layers.mlp.up_proj.bias", "lm_head.embedding", "a" * 40]


@pytest.mark.parametrize(
    "pattern",
    [r"attention\.(q|v)_proj", r"\.bias$", r"^layers\..*\.kernel$|^lm_head", r"^(?!lm_head)",
     "(?i)MLP", r"a{40}$", r"[^.]+\.[^.]+$", "", r"(?P<x>a)(?P=x)"],
)  # fmt: skip
def test_the_same_paths_are_found_as_by_re(pattern: str):
    assert list(map(checks.regex("select", pattern), PATHS)) == [
        re.search(pattern, path) is not None for path in PATHS
    ]


@pytest.mark.parametrize("pattern", [r"(a|aa)+$", r"^(a|a|ab|b)*(a|aa)+c$"])
def test_a_search_without_end_is_stopped(pattern: str, monkeypatch: pytest.MonkeyPatch):
    """Of both, the number of ways to match grows exponentially with the length of the text."""
    monkeypatch.setattr(checks, "SEARCH_SECONDS", 0.2)
    search = checks.regex("optimizer.select", pattern)
    with pytest.raises(UserError, match=r"^optimizer\.select: takes more than 0\.2 s"):
        search("a" * 200 + ".kernel")


@pytest.mark.parametrize(
    "pattern", ["(", "[", "*a", "(?P<x>a)(?P<x>b)", "(a" * 900, "a" * 3000, "((a{999}){999}){999}"]
)
def test_what_is_no_expression_or_a_large_one_is_refused(pattern: str):
    with pytest.raises(UserError, match=r"^peft\.targets: (not a regular|is too long)"):
        checks.regex("peft.targets", pattern)

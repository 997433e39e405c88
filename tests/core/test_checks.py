"""Shared checks of values: the bounds themselves pass, what lies beyond is refused by name."""

import math
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

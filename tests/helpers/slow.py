"""Rows of a parametrized test that only the full run has."""

import pytest


def slow(*values):
    """Return a row that is left out unless asked for with `-m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)

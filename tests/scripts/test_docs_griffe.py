"""Names that share a line of a docstring become an item each on the site."""

import pytest


def test_names_that_share_a_line_are_items_of_their_own():
    griffe = pytest.importorskip("griffe", reason="needs PyTorch, and the docs extra beside it")
    from scripts.docs_griffe import separated

    text = separated(
        "Low, high: prose stays.\n\nArgs:\n  low, high: where to look,\n    ends included.\n"
        "  x: one.\n\nRaises:\n  A, B: kept.\n"
    )
    assert text.startswith("Low, high: prose stays.")
    assert "  A, B: kept." in text
    docstring = griffe.Docstring(text, parser="google")
    (arguments,) = (part for part in docstring.parsed if part.kind.value == "parameters")
    found = [(each.name, each.description) for each in arguments.value]
    assert found[:2] == [(name, "where to look,\nends included.") for name in ("low", "high")]
    assert found[2] == ("x", "one.")

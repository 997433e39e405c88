"""The documentation names what there is."""

import re
from pathlib import Path

import jax
import pytest

from jaxlm.models.families import MODULES

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_models_has_every_family():
    rows = (DOCS / "models.md").read_text().splitlines()
    types = [row.split("|")[2].strip(" `") for row in rows if row.startswith("| ") and "`" in row]
    assert sorted(set(types) & set(MODULES)) == sorted(MODULES)


@pytest.mark.parametrize("page", ["mezo.md"])
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    assert blocks
    with jax.numpy_rank_promotion("allow"):
        exec("\n".join(blocks), {})


def test_every_name_of_zo_that_a_page_mentions_is_there():
    from jaxlm import zo

    text = (DOCS / "mezo.md").read_text()
    known = {"Trajectory", "replay"}
    names = set(re.findall(r"`(?:.*?\()?zo\.(\w+)", text)) - {"rules"} - known
    assert names <= set(zo.__all__)
    rules = set(re.findall(r"rules\.(\w+)", text))
    assert all(hasattr(zo.rules, name) for name in rules)

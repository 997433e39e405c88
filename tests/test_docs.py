"""The documentation names what there is."""

from pathlib import Path

from jaxlm.models.families import MODULES

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_models_has_every_family():
    rows = (DOCS / "models.md").read_text().splitlines()
    types = [row.split("|")[2].strip(" `") for row in rows if row.startswith("| ") and "`" in row]
    assert sorted(set(types) & set(MODULES)) == sorted(MODULES)

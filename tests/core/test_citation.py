"""`cite` finds the papers of what it is asked about, and says what it knows when it cannot."""

import re

import pytest

import jaxlm
from jaxlm.core import citation
from jaxlm.core.errors import UserError


def test_a_method_cites_its_paper_first():
    text = jaxlm.cite("mezo")
    assert text.startswith("@inproceedings{malladi2023mezo,")
    assert "2305.17333" in text
    assert text.count("\n\n@") == 1


def test_path_and_function_name_the_same_papers():
    def mezo() -> None: ...

    assert jaxlm.cite("zo.mezo") == jaxlm.cite(mezo) == jaxlm.cite("mezo")


def test_every_entry_is_whole():
    for name, keys in citation._CITED_BY.items():
        for key, entry in zip(keys, jaxlm.cite(name).split("\n\n"), strict=True):
            assert re.match(rf"@\w+{{{key},\n", entry)
            assert entry.count("{") == entry.count("}")
            assert entry.endswith("\n}")
            assert all(f" {field} " in entry for field in ("title", "author", "year"))


def test_an_unknown_name_is_the_users_mistake():
    with pytest.raises(UserError, match=r"recorded for 'zo.meso': did you mean 'mezo'\?"):
        jaxlm.cite("zo.meso")
    with pytest.raises(UserError, match="known are mezo, mr"):
        jaxlm.cite("transformer")

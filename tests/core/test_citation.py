"""`cite` finds the papers of what it is asked about, and says what it knows when it cannot."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import jaxlm
from jaxlm.core import citation
from jaxlm.core.errors import UserError
from jaxlm.peft import TUNINGS
from jaxlm.train.zeroth_order import ZEROTH_ORDER


def test_a_method_cites_its_paper_first():
    text = jaxlm.cite("mezo")
    assert text.startswith("@inproceedings{malladi2023mezo,")
    assert "2305.17333" in text
    assert text.count("\n\n@") == 1


def test_path_and_function_name_the_same_papers():
    def mezo() -> None: ...

    assert jaxlm.cite("zo.mezo") == jaxlm.cite(mezo) == jaxlm.cite("mezo")


def test_every_entry_is_whole():
    text = (Path(jaxlm.__file__).parent / "assets" / "papers.bib").read_text()
    entries = [entry for name in citation._entries() for entry in jaxlm.cite(name).split("\n\n")]
    for entry in entries:
        assert re.match(r"@\w+{\w+,\n", entry)
        assert entry.count("{") == entry.count("}")
        assert entry.endswith("\n}")
        assert all(f" {field} " in entry for field in ("title", "author", "year"))
    assert len(set(entries)) == text.count("\n@") + 1


ROOMS = (
    *("zo", "zo.rules", "zo.factored", "kernels", "kernels.behaviour", "kernels.solve.lssvm"),
    *("kernels.solve.ridge", "influence", "dynamics", "peft", "topics", "unlearning"),
)


@pytest.mark.parametrize("room", ROOMS)
def test_what_names_a_paper_in_its_docstring_cites_it(room: str):
    module = importlib.import_module(f"jaxlm.{room}")
    for name in getattr(module, "__all__", dir(module)):
        value = getattr(module, name)
        if inspect.isfunction(value) and not name.startswith("_"):
            papers = re.findall(r"arXiv:(\d{4}\.\d{5})", inspect.getdoc(value) or "")
            assert not papers or papers[0] in jaxlm.cite(f"{room}.{name}"), name


OPEN = {"zeroth_order", "LORA", "PREFIX"}
"""Names without a paper: what they are called with has one."""


def test_every_method_of_the_pages_cites_the_paper_beside_it():
    """Rows of tables with a paper and a function."""
    found = set()
    for page in ("README.md", "docs/mezo.md", "docs/peft.md"):
        for line in (Path(__file__).parents[2] / page).read_text().splitlines():
            cells = line.split("|")
            if len(cells) < 4 or not (named := re.findall(r"arxiv.org/abs/([\d.]+)", line)):
                continue
            for span in re.findall(r"`((?:zo|peft)\.[^`]*)`", line):
                names = set(re.findall(r"\b(?:zo|peft)\.(\w+)", span)) - OPEN
                cited = [jaxlm.cite(name) for name in names]
                assert not cited or any(n in text for n in named for text in cited), (page, span)
                found |= names
    assert {"mezo", "fzoo", "meazo", "lozo", "zo_muon", "mezo_adam", "magnitude"} <= found
    assert "2106.09685" in jaxlm.cite("peft.lora")
    assert "2101.00190" in jaxlm.cite("prefix")


@pytest.mark.parametrize("name", [*ZEROTH_ORDER, *TUNINGS])
def test_every_name_of_a_configuration_is_cited_or_has_no_paper(name: str):
    """Those of optax and the head are no method of this library."""
    if name == "head":
        return
    assert jaxlm.cite(name).startswith("@")


def test_an_unknown_name_is_the_users_mistake():
    with pytest.raises(UserError, match=r"^cite: .*\(got 'zo.meso'\)\. Did you mean 'mezo'\?"):
        jaxlm.cite("zo.meso")
    with pytest.raises(UserError, match="Choose one of mezo, mezo_momentum"):
        jaxlm.cite("transformer")

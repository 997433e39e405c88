"""The documentation names what there is."""

import re
from pathlib import Path

import jax
import pytest

from jaxlm.cli import config as configs
from jaxlm.models.families import MODULES
from jaxlm.train.run import FinetuneConfig

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_models_has_every_family():
    rows = (DOCS / "models.md").read_text().splitlines()
    types = [row.split("|")[2].strip(" `") for row in rows if row.startswith("| ") and "`" in row]
    assert sorted(set(types) & set(MODULES)) == sorted(MODULES)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


@pytest.mark.parametrize("page", ["kernels.md", "mezo.md", "peft.md"])
def test_the_examples_of_a_page_run_in_order(page: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with jax.numpy_rank_promotion("allow"):
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", ["peft.md"])
def test_the_runs_of_a_page_can_be_configured(page: str):
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    assert lines
    for line in lines:
        assert line.startswith("jaxlm finetune "), line
        configs.load(FinetuneConfig, *configs.parse_args(line.split()[2:]))


def test_every_name_of_zo_that_a_page_mentions_is_there():
    from jaxlm import zo

    text = (DOCS / "mezo.md").read_text()
    assert set(re.findall(r"`(?:.*?\()?zo\.(\w+)", text)) <= set(zo.__all__)
    for module in (zo.rules, zo.factored):
        name = module.__name__.rpartition(".")[2]
        assert all(hasattr(module, each) for each in re.findall(rf"\b{name}\.(\w+)", text))

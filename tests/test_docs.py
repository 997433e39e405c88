"""The documentation names what there is."""

import re
from pathlib import Path

import jax
import pytest
import yaml

from jaxlm.cli import config as configs
from jaxlm.cli.compare import CompareConfig, plan
from jaxlm.models.families import MODULES
from jaxlm.train.run import FinetuneConfig

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_models_has_every_family():
    rows = (DOCS / "models.md").read_text().splitlines()
    types = [row.split("|")[2].strip(" `") for row in rows if row.startswith("| ") and "`" in row]
    assert sorted(set(types) & set(MODULES)) == sorted(MODULES)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


@pytest.mark.parametrize(
    "page", ["dynamics.md", "kernels.md", "mezo.md", "peft.md", "selection.md"]
)
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


def test_every_name_of_influence_that_a_page_mentions_is_there():
    from jaxlm import influence

    text = (DOCS / "selection.md").read_text()
    named = set(re.findall(r"influence\.(\w+)", text))
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text.partition("| function |")[2], re.M)
    named |= {name for row in rows for name in re.findall(r"\w+", row)}
    assert {"score", "bm25", "lds"} <= named <= set(influence.__all__)


def test_every_name_of_dynamics_that_a_page_mentions_is_there():
    from jaxlm import dynamics
    from jaxlm.train.dynamics import DYNAMICS

    text = (DOCS / "dynamics.md").read_text()
    named = set(re.findall(r"dynamics\.(\w+)", text)) - {"md", "yaml"}
    assert {"svag", "simulate", "scale_rule", "local_update"} <= named <= set(dynamics.__all__)
    keys = [yaml.safe_load(key) for key in re.findall(r"`(\{name: .*?\})`", text)]
    assert {key["name"] for key in keys} == set(DYNAMICS)
    for key in keys:
        DYNAMICS[key["name"]](**key)


def test_the_commands_of_the_page_of_dynamics_can_be_configured(monkeypatch):
    monkeypatch.chdir(DOCS.parent)
    for line in "".join(blocks("dynamics.md", "bash")).splitlines():
        words = line.partition("#")[0].split()
        assert words[:2] == ["jaxlm", "compare"], line
        assert plan(configs.load(CompareConfig, *configs.parse_args(words[2:])), words[2])


def test_the_commands_of_the_page_of_selections_can_be_configured(monkeypatch):
    from jaxlm.studies.selection import SelectionConfig

    monkeypatch.chdir(DOCS.parent)
    for line in "".join(blocks("selection.md", "bash")).splitlines():
        words = line.partition("#")[0].split()
        assert words[:2] == ["jaxlm", "select"], line
        path, overrides = configs.parse_args([word for word in words[2:] if word != "--dry-run"])
        if path is not None:
            configs.load(SelectionConfig, path, overrides)

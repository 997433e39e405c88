"""The documentation names what there is, and all that it shows runs."""

import dataclasses
import importlib
import inspect
import io
import re
import tomllib
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import yaml
from packaging.requirements import Requirement

import jaxlm
from jaxlm.models.families import MODULES
from jaxlm.preference import LOSSES
from jaxlm.studies.grid import per_seed
from jaxlm.train.optimizers import OPTIMIZERS, ZerothOrder
from tests import pages
from tests.helpers import reference

DOCS = pages.ROOT / "docs"
PAGES = [pytest.param(path, id=str(path.relative_to(pages.ROOT))) for path in pages.pages()]
RUN = ("README.md", "index.md", "add_a_task.md")
"""Pages whose commands of jaxlm run up to the first step, because they print what these read.

Those of the other pages stop where their work begins: `tests/cli` and `tests/peft` do that work.
"""
ENDS = (*RUN, "add_a_method.md", "your_model_your_data.md")
"""Pages of which a slow test runs all to the end."""


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A working directory like a clone's; what pages add to registries is taken back."""
    monkeypatch.chdir(tmp_path)
    pages.link_into(tmp_path)
    registries = (OPTIMIZERS, reference.CASES)
    patches = [mock.patch.dict(registry) for registry in registries]
    for each in patches:
        each.start()
    with jax.numpy_rank_promotion("allow"):
        yield {"__name__": "page"}
    for each in patches:
        each.stop()


def readme(names: dict) -> None:
    """What the README leaves to its reader: a model, a loss."""
    lm = jaxlm.from_pretrained()
    layers = jax.tree.map(lambda leaf: leaf[:1], lm.params["layers"])  # the fewest to compile
    lm = lm.replace(config=lm.config.replace(num_layers=1), params={**lm.params, "layers": layers})
    jaxlm.save_pretrained(lm, "path-or-hub-id")
    names.update(
        jaxlm=jaxlm,
        loss_fn=lambda params, batch: jnp.sum((params["w"] - batch) ** 2),
        params={"w": jnp.ones((4, 3))},
        batches=[jnp.zeros((4, 3))] * 2,
        input_ids=jnp.ones((8, 4), jnp.int32),
        attention_mask=jnp.ones((8, 4), jnp.int32),
    )


@pytest.mark.parametrize("path", PAGES)
def test_the_blocks_of_a_page_run_in_order(path: Path, names: dict, monkeypatch):
    run_blocks(path, names, monkeypatch, "training" if path.name in RUN else "work")


@pytest.mark.slow
@pytest.mark.parametrize("path", [page for page in PAGES if page.values[0].name in ENDS])
def test_the_commands_of_a_page_run_to_their_end(path: Path, names: dict, monkeypatch):
    run_blocks(path, names, monkeypatch, "end")


def run_blocks(path: Path, names: dict, monkeypatch, until: pages.Until) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Is it good?\n"))  # of a chat
    if path.name == "README.md":
        readme(names)
    if path.name == "add_a_method.md" and until != "end":
        monkeypatch.setattr("jaxlm.studies.grid.per_seed", without_steps)
    for block in pages.blocks(path):
        pages.execute(block, names, monkeypatch, until)


def without_steps(run, folder, seeds):
    """The runs of a page's study, which only test the model."""
    return per_seed(dataclasses.replace(run, steps=0), folder, seeds)


@pytest.mark.parametrize("path", PAGES)
def test_the_commands_within_the_text_of_a_page_are_known(path: Path, names: dict):
    for span in pages.spans(path):
        if pages.is_command(span):
            pages.command(span)


@pytest.mark.parametrize("path", PAGES)
def test_the_names_within_the_text_of_a_page_are_there(path: Path):
    rooms = "|".join(room for room in jaxlm.__all__ if room not in ("__version__", "data"))
    for span in pages.spans(path):
        for name in re.findall(rf"(?<![\w./-])(?:jaxlm|{rooms})(?:\.\w+)+(?![\w/])", span):
            if not name.endswith((".md", ".yaml", ".jsonl")):
                whole = name if name.startswith("jaxlm.") else f"jaxlm.{name}"
                assert pages.known(whole) or pages.is_key(name), f"{path.name}: no {whole}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("jaxlm finetun", "no command finetun"),
        ("jaxlm info --mesh=data=2", "info runs on one device"),
        ("srun --nodes=4 jaxlm finetune --stepz=2 --distributed=auto", "Did you mean steps"),
        ("kubectl apply -f launch/none.yaml", "launch/none.yaml"),
        ("jaxlm sweep configs/mezo/none.yaml", "no such file"),
        ("python -m benchmarks.scoring --rows=3", "SystemExit"),
    ],
)
def test_a_command_that_is_wrong_is_found(line: str, reason: str, names: dict):
    with pytest.raises((AssertionError, SystemExit)) as caught:
        pages.command(line)
    assert reason in repr(caught.value)


INNER = {"artifacts", "cli", "core", "cost", "gradients", "studies", "train"}
"""Rooms of which modules are shown, or that the commands alone use."""


def test_every_room_has_a_page_of_reference():
    shown = [
        name
        for page in DOCS.glob("api/*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert len(shown) == len(set(shown))
    assert all(pages.known(name) for name in shown)
    rooms = {path.parent.name for path in (DOCS.parent / "jaxlm").glob("*/__init__.py")}
    assert rooms <= {name.removeprefix("jaxlm.") for name in shown} | INNER


@pytest.mark.parametrize("path", PAGES)
def test_every_figure_says_what_it_shows(path: Path):
    """The paragraph below it, in italics; a drawing needs none."""
    for name, below in re.findall(r"!\[[^\]]+\]\((\S+)\)\n\n(.{20})", path.read_text(), re.S):
        assert name.endswith(".svg") or below.startswith("*"), name


@pytest.mark.parametrize("room", sorted({path.stem for path in DOCS.glob("api/*.md")} - INNER))
def test_the_reference_of_a_room_has_all_names_functions_first(room: str):
    listed = re.search(r"members: \[([^\]]*)\]", (DOCS / "api" / f"{room}.md").read_text())
    if listed is None:
        return
    names = re.findall(r"\w+", listed[1])
    module = importlib.import_module(f"jaxlm.{room}")
    modules = {name for name in module.__all__ if inspect.ismodule(getattr(module, name))}
    assert len(names) == len(set(names))
    assert set(names) == set(module.__all__) - modules
    kinds = [name[0].isupper() for name in names if name != "GradientStore"]
    assert kinds == sorted(kinds)


@pytest.mark.torch
def test_the_family_of_a_page_has_the_logits_of_transformers(
    names: dict, tmp_path: Path, monkeypatch
):
    from tests.models import test_parity

    for block in pages.blocks(DOCS / "howto" / "add_a_model.md"):
        if block.language == "python":
            pages.execute(block, names, monkeypatch)
    for case in ("stablelm", "stablelm-biases"):
        test_parity.test_logits_of_theirs_and_of_ours_opened_by_them(case, tmp_path / case)


def test_the_table_of_models_has_every_family():
    rows = (DOCS / "models.md").read_text().splitlines()
    types = [row.split("|")[2].strip(" `") for row in rows if row.startswith("| ") and "`" in row]
    assert sorted(set(types) & set(MODULES)) == sorted(MODULES)


def test_the_pieces_of_optimizers_that_a_page_mentions_are_there():
    from jaxlm import zo

    text = (DOCS / "mezo.md").read_text()
    for module in (zo.rules, zo.factored):
        name = module.__name__.rpartition(".")[2]
        named = re.findall(rf"\b{name}\.(\w+)", text)
        assert named
        assert all(hasattr(module, each) for each in named)
    names = (name for name, kind in OPTIMIZERS.items() if issubclass(kind, ZerothOrder))
    assert all(f"`{name}`" in text for name in names)


def test_the_scores_that_a_page_lists_are_there():
    from jaxlm import influence

    text = (DOCS / "selection.md").read_text().partition("| function |")[2]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, re.M)
    named = {name for row in rows for name in re.findall(r"\w+", row)}
    assert {"score", "bm25"} <= named <= set(influence.__all__)


def test_the_dynamics_of_a_run_that_a_page_lists_are_those_there_are():
    from jaxlm.train.dynamics import DYNAMICS

    text = (DOCS / "dynamics.md").read_text()
    keys = [yaml.safe_load(key) for key in re.findall(r"`(\{name: .*?\})`", text)]
    assert {key["name"] for key in keys} == set(DYNAMICS)
    for key in keys:
        DYNAMICS[key["name"]](**key)


def test_no_figure_is_of_a_version_that_is_refused():
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
    wanted = map(Requirement, project["dependencies"])
    (jax_versions,) = (each.specifier for each in wanted if each.name == "jax")
    for path in pages.pages():
        for version in re.findall(r"\bjax (\d+\.\d+\.\d+)", path.read_text()):
            assert version in jax_versions, f"{path.name}: figures of jax {version}"


def test_the_page_of_pairs_lists_every_loss_by_what_it_needs():
    text = (DOCS / "preference.md").read_text()
    rows = re.findall(r"^\| ([^|]*) \| (`[a-z0-9_]+`(?:, `[a-z0-9_]+`)*) \|$", text, re.M)
    found = {what: re.findall(r"`([a-z0-9_]+)`", losses) for what, losses in rows}
    assert sorted(name for names in found.values() for name in names) == sorted(LOSSES)
    for what, losses in found.items():
        for name in losses:
            assert LOSSES[name].needs_reference == (what != "no reference")
            assert LOSSES[name].needs_whole_batch == what.startswith("the batch in one part")
    first = found["c, l, rc, rl"]
    diverging = [name for name in LOSSES if hasattr(LOSSES[name], "f_divergence")]
    assert sorted([*first[:7], "ipo", "dpo_norm"]) == sorted(diverging)

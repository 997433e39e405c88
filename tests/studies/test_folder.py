"""A study writes into its own folder, alone, and nowhere else."""

import json
from dataclasses import dataclass

import pytest

from jaxlm.artifacts.folder import hold
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.studies.grid import STUDY, folder_name, study_folder
from jaxlm.studies.tables import aligned, write_tables


@dataclass(frozen=True)
class Config:
    output: str


FILES = {
    "sweep": "run: {task: {name: subj}, steps: 1}\noutput: OUT\n",
    "kernel": "study: kernel\ntask: {name: subj}\noutput: OUT\n",
    "less": (
        "study: less\nsources: {a: {task: {name: subj}}}\n"
        "target: {task: {name: subj}}\noutput: OUT\n"
    ),
    "curves": (
        "study: curves\n"
        "run: {model: {hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 16},\n"
        "  tokenizer: t, corpus: {path: c, domains: [{name: a, weight: 1}]},\n"
        "  optimizer: adamw, steps: 2, seq_len: 8,\n"
        "  log_every: 1, eval_every: 1, checkpoint_every: 1}\n"
        "y: loss\nvariants: {a: {}}\noutput: OUT\n"
    ),
}


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def study(tmp_path):
    (tmp_path / "out").mkdir()
    path = tmp_path / "study.yaml"

    def write(kind):
        path.write_text(FILES[kind].replace("OUT", str(tmp_path / "out")))
        return ["sweep" if kind == "sweep" else "study", str(path)]

    return write


@pytest.mark.parametrize("kind", FILES)
def test_a_folder_with_other_files_is_left_alone(kind, study, tmp_path, capsys):
    (tmp_path / "out" / "table.md").write_text("of somebody else")
    assert main(study(kind)) == 2
    assert capsys.readouterr().err.endswith(
        f"error: output: the folder has files but no study (got {tmp_path / 'out'}). Choose "
        "another output.\n"
    )
    assert contents(tmp_path / "out") == {"table.md": "of somebody else"}


@pytest.mark.parametrize("kind", FILES)
def test_a_study_of_another_kind_is_left_alone(kind, study, tmp_path, capsys):
    there = {"study": "other"}
    (tmp_path / "out" / STUDY).write_text(json.dumps(there))
    assert main(study(kind)) == 2
    assert f"has the study other, not {kind} (got" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {STUDY: json.dumps(there)}


@pytest.mark.parametrize("kind", FILES)
def test_one_process_at_a_time_writes(kind, study, tmp_path, capsys):
    with hold(tmp_path / "out"):
        assert main(study(kind)) == 2
    assert "another process writes into" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {}


def test_a_study_that_fails_before_it_wrote_leaves_no_folder(tmp_path):
    config = Config(str(tmp_path / "runs" / "out"))
    with pytest.raises(UserError, match="mistake"), study_folder("sweep", config):
        raise UserError("mistake")
    assert not list(tmp_path.iterdir())


def test_a_study_that_fails_later_keeps_what_it_wrote(tmp_path):
    config = Config(str(tmp_path / "out"))
    folder = tmp_path / "out"

    def stopped():
        with study_folder("sweep", config):
            write_tables(folder, {}, "text")
            raise UserError("mistake")

    with pytest.raises(UserError, match="mistake"):
        stopped()
    assert sorted(contents(folder)) == [STUDY, "table.json", "table.md"]
    with study_folder("sweep", config):
        pass


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    place = Config(str(tmp_path / "file" / "out"))
    with (
        pytest.raises(UserError, match=r"file is not a folder \(got"),
        study_folder("sweep", place),
    ):
        pytest.fail("a folder below a file")


@pytest.mark.parametrize("name", ["..", ".", "", "table.md", STUDY, ".lock"])
@pytest.mark.parametrize("kind", ["sweep", "curves"])
def test_no_name_leaves_the_folder_or_takes_that_of_a_file(name, kind, study, tmp_path, capsys):
    command = study(kind)
    text = (tmp_path / "study.yaml").read_text()
    key = "methods" if kind == "sweep" else "variants"
    lines = [line for line in text.splitlines() if not line.startswith("variants")]
    (tmp_path / "study.yaml").write_text("\n".join([*lines, f'{key}: {{"{name}": {{}}}}']))
    before = sorted(tmp_path.rglob("*"))
    assert main([*command, "--dry-run"]) == (0 if kind == "sweep" and not name else 2)
    if name:
        assert f"error: {key}: " in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a/b", "/etc", "../a", "a\\b", "é" * 200, "a\nb", "a b"])
def test_every_other_name_becomes_one_folder(name):
    found = folder_name(name, "methods")
    assert len(found.encode()) < 120
    assert not set(found) & set("/\\\n ")
    assert found not in ("", ".", "..")


def test_the_home_folder_is_where_it_is_said(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    command = study("sweep")
    assert main([*command, "--output=~/x", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/x/")
    assert main([*command, "--output=~nosuchuser/x", "--dry-run"]) == 2
    assert "command line: output: there is no such user" in capsys.readouterr().err


@pytest.mark.parametrize("kind", FILES)
def test_seeds_are_seeds(kind, study, capsys):
    for seeds in ("[-1]", "[4294967296]", "[1e30]"):
        assert main([*study(kind), f"--seeds={seeds}", "--dry-run"]) == 2
        assert "error: command line: seeds: must be from 0 to 2**32 - 1" in capsys.readouterr().err


def test_the_size_of_an_evaluation_is_checked(study, capsys):
    for size in ("0", "-1", "1e12"):
        assert main([*study("less"), f"--eval_batch_size={size}"]) == 2
        assert "command line: eval_batch_size: must be from 1 to" in capsys.readouterr().err


def test_a_name_ends_no_cell_of_a_table():
    rows = aligned(("a", "b"), [("x|y", "1\n2")]).splitlines()
    assert [row.replace("\\|", "").count("|") for row in rows] == [3, 3, 3]


def test_a_held_out_loss_needs_held_out_text(study, capsys):
    command = study("curves")
    assert main([*command, "--y=held_out_loss"]) == 2
    assert "y: there is no held-out text" in capsys.readouterr().err

"""The command `jaxlm study` (less): a study from a file, what it will cost, and its mistakes."""

import json
from pathlib import Path

import pytest

from jaxlm.cli.main import main
from tests.helpers.tiny import read_lines, sentences, write_jsonl

STUDY = """\
study: less
model: MODEL
sources:
  right: {task: {name: tiny, train: train.jsonl, template: "{text} it was {label}",
                 labels: [good, bad]}, rows: 8}
target:
  task: {name: tiny, validation: test.jsonl, test: test.jsonl, template: "{text} it was {label}",
         labels: [good, bad]}
  rows: 4
recipe: {peft: {rank: 2}, optimizer: {learning_rate: 1e-2}, epochs: 1, batch_size: 2}
features: {dim: 16, dtype: int8, block_size: 4}
warmup_fraction: 0.5
fraction: 0.5
methods: [less]
output: OUTPUT
"""


@pytest.fixture
def study(tmp_path: Path, tiny_model: Path) -> Path:
    write_jsonl(tmp_path / "train.jsonl", sentences(16))
    write_jsonl(tmp_path / "test.jsonl", sentences(8))
    path = tmp_path / "study.yaml"
    text = STUDY.replace("MODEL", str(tiny_model)).replace("OUTPUT", str(tmp_path / "out"))
    path.write_text(text)
    return path


@pytest.mark.slow
def test_a_study_makes_a_table_and_a_file_of_what_is_chosen(study, capsys) -> None:
    assert main(["study", str(study)]) == 0
    printed = capsys.readouterr()
    out = study.parent / "out"
    assert printed.out.strip() == (out / "table.md").read_text().strip()
    assert "select-less: starts" in printed.err
    (chosen,) = out.glob("seed-0/select-less-*/selected.jsonl")
    lines = read_lines(chosen)
    assert len(lines) == 4
    assert {line["source"] for line in lines} == {"right"}
    assert all(line["completion"] in (" good", " bad") for line in lines)
    table = json.loads((out / "table.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["no training", "less"]
    assert main(["study", str(study)]) == 0
    assert "begins" not in capsys.readouterr().err


def test_a_warm_up_of_one_step_is_refused(study, capsys) -> None:
    """The first step of a rising learning rate is 0."""
    assert main(["study", str(study), "--recipe.batch_size=4"]) == 2
    assert capsys.readouterr().err.endswith(
        "error: recipe.warmup_share: all steps have the learning rate 0 (got 1 steps on 4 rows). "
        "Give more rows or epochs, a smaller recipe.batch_size, or 0.\n"
    )


def hours(text: str) -> dict[str, float]:
    """The column of hours by stage."""
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "|" in line]
    return {row[1]: float(row[4]) for row in rows[2:]}


def test_a_dry_run_without_a_file_is_of_the_paper(capsys) -> None:
    flags = ["--sizes.examples=270000", "--device.peak_flops=1e15"]
    assert main(["study", "less", "--dry-run", *flags, "--device.utilisation=0.5"]) == 0
    fast = capsys.readouterr().out
    assert main(["study", "less", "--dry-run", *flags, "--device.utilisation=0.05"]) == 0
    slow = capsys.readouterr().out
    assert "270,000 rows of 300 tokens" in fast
    assert "LoRA of rank 128 with 134,217,728; A100 of 1000 TFLOP/s at 50 %" in fast
    assert "48 h, 17.7 GB" in fast
    assert "| 6 h " in fast
    # about 4 FLOPs a token for each of 6.6e9 weights, 300 tokens, 4 epochs, at 5e14 a second
    assert hours(fast)["features of the rows"] == pytest.approx(5.0, rel=0.1)
    for stage, value in hours(fast).items():
        assert hours(slow)[stage] == pytest.approx(10 * value, rel=0.1)


def test_a_dry_run_of_a_study_reads_its_rows_and_does_nothing(study, capsys) -> None:
    assert main(["study", str(study), "--dry-run", "--sizes.tokens=100"]) == 0
    assert "8 rows of 100 tokens and 4 target examples" in capsys.readouterr().out
    assert not (study.parent / "out").exists()


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--fraction=0", "fraction: must be above 0 and at most 1 (got 0.0)."),
        (
            "--methods=[less, best]",
            "methods: not known (got 'best'). Choose one of less, random, matched, full, bm25, ",
        ),
        ("--seeds=[]", "seeds: is empty (got nothing)."),
        ("--sources.right.rows=17", "sources.right.rows: 0 + 17 are asked for (got 16)."),
        (
            "--sources.other.rows=1",
            "sources.other.task: a source has a task or messages. Give one of them.",
        ),
        (
            "--sources.right.row=1",
            "sources.right.row: is not a key (got '1'). Did you mean sources.right.rows?",
        ),
        ("--sources.chat.messages=no.jsonl", "there is no such file (got 'no.jsonl')"),
        ("--features.dim=0", "features.dim: must be from 1 to"),
        ("--target.rows=9", "target.rows: 0 + 9 are asked for (got 8). Lower rows or skip."),
    ],
)
def test_mistakes_end_in_a_sentence_and_leave_nothing(study, flag, sentence, capsys) -> None:
    assert main(["study", str(study), flag]) == 2
    assert sentence in capsys.readouterr().err
    assert not (study.parent / "out").exists()


def test_a_word_that_is_no_file_is_the_name_of_a_study(capsys) -> None:
    assert main(["study", "lesss"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: study: not known (got 'lesss')")
    assert "less" in message.partition("Choose one of")[2]

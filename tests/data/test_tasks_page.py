"""The tables of docs/tasks.md are those of the registries."""

from pathlib import Path

import pytest

from jaxlm.data import OPT_TASKS, ROBERTA_TASKS

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


def cell(text: str) -> str:
    shown = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`{shown}`"


def words(labels: tuple[str, ...]) -> str:
    return ", ".join(labels) or "the example's own"


def opt_rows() -> list[str]:
    rows = []
    for name, task in OPT_TASKS.items():
        options = "the answer" if task.metric == "f1" else words(task.labels)
        counts = f"1,000 + {task.num_validation}"
        cells = (f"`opt/{name}`", f"`{task.train.partition(':')[0]}`", cell(task.template), options)
        rows.append("| " + " | ".join((*cells, task.objective, task.metric, counts)) + " |")
    return rows


def roberta_rows() -> list[str]:
    rows = []
    for name, task in ROBERTA_TASKS.items():
        source = f"`{task['train'].partition(':')[0]}`" if task["train"] else "your own files"
        limits = f"{task['max_length']}"
        if "first_field_limit" in task:
            limits += f", first {task['first_field_limit']}"
        cells = (f"`roberta/{name}`", source, cell(task["template"]), words(task["labels"]), limits)
        rows.append("| " + " | ".join(cells) + " |")
    return rows


@pytest.mark.parametrize("row", opt_rows() + roberta_rows())
def test_the_page_has_the_row(row: str) -> None:
    assert row in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_no_other_row() -> None:
    shown = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith(("| `opt/", "| `rob"))
    ]
    assert shown == opt_rows() + roberta_rows()

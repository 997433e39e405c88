"""The examples in the docstrings run, and print what they say."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def examples() -> list:
    found = []
    for path in sorted((ROOT / "jaxlm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if ">>>" in text:
                    name = f"{path.relative_to(ROOT)}:{getattr(node, 'name', 'module')}"
                    found.append(pytest.param(path, text, id=name))
    return found


@pytest.mark.parametrize(("path", "text"), examples())
def test_docstring_example(path: Path, text: str):
    # Read from the source: the type-checking hook wraps functions, and doctest's own finder passes
    # over what is wrapped.
    module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    module = module.removesuffix(".__init__")
    names = dict(vars(importlib.import_module(module)))
    test = doctest.DocTestParser().get_doctest(text, names, module, str(path), 0)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert not report, "".join(report)

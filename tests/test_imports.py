"""What may import what, what `import jaxlm` costs, and that every public name can be read."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

import jaxlm

PACKAGE = Path(__file__).parents[1] / "jaxlm"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first: a room imports only from the floors below its own, and from itself.
FLOORS = (
    {"typing"},
    {"core"},
    {"artifacts", "gradients"},
    {"sharding"},
    {"models"},
    {"peft"},
    {"zo", "kernels", "influence", "dynamics", "preference", "topics", "unlearning"},
    {"data"},
    {"evaluation"},
    {"train"},
    {"cost"},
    {"studies"},
    {"cli"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

TEXT_LIBRARIES = {"datasets", "huggingface_hub", "pyarrow"}
TEXT_LIBRARIES |= {"safetensors", "tokenizers", "transformers"}
HEAVY = [*sorted(TEXT_LIBRARIES), "torch", "flax", "optax", "orbax"]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, *, top_level: bool = False) -> Iterator[tuple[str, int]]:
    """Absolute name and line of what a module imports; with `top_level`, of what runs at import."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    todo: list[ast.AST] = [parsed(path)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((".".join([*base, alias.name]), node.lineno) for alias in node.names)
        elif top_level and runs_later(node):
            continue
        todo.extend(ast.iter_child_nodes(node))


def runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.dump(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def place(path: Path, name: str, line: int) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{line} imports {name}"


def python(code: str, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_room_imports_only_from_the_floors_below():
    wrong = []
    for path in MODULES:
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__":
            continue
        assert room in FLOOR_OF, f"say in FLOORS on which floor jaxlm/{room} stands"
        for name, line in imports(path):
            root, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if root == "jaxlm" and other != room and FLOOR_OF.get(other, -1) >= FLOOR_OF[room]:
                wrong.append(place(path, name, line))
    assert not wrong


def test_a_library_is_imported_only_where_it_belongs():
    files = ("models/gguf_tokenizer", "models/hf", "models/hf_tokenizer", "peft/adapters")
    files += ("kernels/saved", "influence/store")
    handling_files = {PACKAGE / f"{name}.py" for name in files}
    wrong = []
    for path in MODULES:
        room = path.relative_to(PACKAGE).parts[0]
        handles_files = room in {"artifacts", "data", "cli"} or path in handling_files
        wrong += [
            place(path, name, line)
            for name, line in imports(path)
            if (root := name.partition(".")[0]) == "torch"
            or (root == "flax" and room != "models")
            or (root in TEXT_LIBRARIES and not handles_files)
        ]
    assert not wrong


def test_text_libraries_are_imported_inside_functions():
    wrong = [
        place(path, name, line)
        for path in MODULES
        for name, line in imports(path, top_level=True)
        if name.partition(".")[0] in TEXT_LIBRARIES
    ]
    assert not wrong


def test_every_imported_library_is_a_declared_dependency():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared, optional = (
        {re.split(r"[^\w-]", line)[0] for line in lines}
        for lines in (project["dependencies"], extras["gguf"] + extras["plots"] + extras["sde"])
    )
    provided_by = packages_distributions()
    for path in MODULES:
        at_once = {name.partition(".")[0] for name, _ in imports(path, top_level=True)}
        assert not at_once & optional, (
            f"{path} imports what only an extra brings: do so in a function"
        )
        roots = {name.partition(".")[0]: line for name, line in imports(path)}
        roots = {root: line for root, line in roots.items() if root not in optional}
        for root in roots.keys() - sys.stdlib_module_names - {"jaxlm"}:
            names = {name.lower().replace("_", "-") for name in provided_by.get(root, [root])}
            assert names & declared, place(path, root, roots[root])


def test_import_is_light():
    code = (
        "import json, sys, time, jax; start = time.perf_counter(); import jaxlm;"
        "print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))"
    )
    for _ in range(3):  # other processes may have slowed one
        seconds, modules = json.loads(python(code))
        assert not {name.partition(".")[0] for name in modules} & set(HEAVY)
        if seconds < 0.3:
            break
    assert seconds < 0.3


READ_EVERY_NAME = """
import importlib, json, pkgutil, sys
import jaxlm

found = {}

def read(package):
    for name in package.__all__:
        value = getattr(package, name)
        kind = [type(value).__name__, *(getattr(value, a, "") for a in ("__module__", "__name__"))]
        assert found.setdefault(f"{package.__name__}.{name}", kind) == kind, (name, found, kind)

def read_all(names):
    for module in map(importlib.import_module, names):
        if hasattr(module, "__all__"):
            read(module)

rooms = [m.name for m in pkgutil.iter_modules(jaxlm.__path__, "jaxlm.") if m.ispkg]
if sys.argv[1] == "names first":
    read_all(["jaxlm", *rooms])
modules = [m.name for m in pkgutil.walk_packages(jaxlm.__path__, "jaxlm.")]
read_all([*modules, "jaxlm"])
read_all(["jaxlm", *modules])
print(json.dumps(found))
"""


def test_every_public_name_reads_the_same_in_both_import_orders():
    names_first = json.loads(python(READ_EVERY_NAME, "names first"))
    modules_first = json.loads(python(READ_EVERY_NAME, "modules first"))
    assert names_first == modules_first
    assert "jaxlm.from_pretrained" in names_first
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {room for room in rooms if f"jaxlm.{room}" in names_first} == rooms - {"cli"}


def test_an_unknown_attribute_says_so():
    with pytest.raises(AttributeError, match="module 'jaxlm' has no attribute 'nothing'"):
        _ = jaxlm.nothing


def test_the_tests_check_annotations():
    with pytest.raises(BeartypeCallHintViolation):
        jaxlm.cite(3)
    with pytest.raises(TypeCheckError):
        jaxlm.dynamics.laws.bootstrap_power_law(3, [1.0], [1.0])

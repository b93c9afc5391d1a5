"""Imports point down: pipeline < data < model, planner < strategies < commands, cli."""

import ast
from pathlib import Path

import pytest

import lightning_ipu_bert

PACKAGE = Path(lightning_ipu_bert.__file__).parent
FLOORS = {
    "_compat": 0,
    "errors": 0,
    "files": 0,
    "pipeline": 1,
    "data": 2,
    "model": 3,
    "planner": 3,
    "strategies": 4,
    "commands": 5,
    "cli": 6,
    "__init__": 7,
    "__main__": 7,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path, everywhere):
    """Names that a file imports: at its top, or everywhere in it."""
    tree = ast.parse(path.read_text("utf8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(dotted):
    return FLOORS[dotted.split(".")[1]] if "." in dotted else FLOORS["__init__"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    name = path.relative_to(PACKAGE).parts[0].replace(".py", "")
    for imported in imports(path, everywhere=True):
        if imported.split(".")[0] == "lightning_ipu_bert":
            assert floor_of(imported) <= FLOORS[name], f"{path} imports {imported}"
            # Neighbours on one floor do not know each other.
            if floor_of(imported) == FLOORS[name] and FLOORS[name]:
                assert imported.split(".")[1] == name or name.startswith("__")


def test_strategies_know_a_model_only_by_the_protocol():
    for path in [*(PACKAGE / "pipeline").rglob("*.py"), *(PACKAGE / "strategies").rglob("*.py")]:
        for imported in imports(path, everywhere=True):
            assert not imported.startswith(
                ("transformers", "lightning_ipu_bert.model", "lightning_ipu_bert.data")
            ), f"{path} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_strategies_know_poptorch_and_only_lazily(path):
    inside = path.relative_to(PACKAGE).parts[0] == "strategies"
    assert "poptorch" not in {i.split(".")[0] for i in imports(path, everywhere=not inside)}


def test_every_file_stands_on_a_floor():
    tops = {p.relative_to(PACKAGE).parts[0].replace(".py", "") for p in MODULES}
    assert tops <= set(FLOORS)

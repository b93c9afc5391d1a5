"""Imports point down: see FLOORS. Rooms on one floor do not know each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_ipu_bert

PACKAGE = Path(lightning_ipu_bert.__file__).parent
FLOORS = [
    {"errors", "registration"},
    {"_compat", "files", "checkpoint_file", "batch_trees"},
    {"global_loss", "examples", "ops"},
    {"pipeline"},
    {"planner", "training", "data"},
    {"strategies", "models"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
MODULES = sorted(PACKAGE.rglob("*.py"))
FILES = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


NAMES = {name_of(path) for path in MODULES}


def imports(path, lazy=True):
    """Dotted names that a file imports; a module of ours by its own name."""
    tree = ast.parse(path.read_text("utf8"))
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                yield dotted if dotted in NAMES or node.module not in NAMES else node.module


def ours(path):
    return {name for name in imports(path) if name.split(".")[0] == "lightning_ipu_bert"}


def floor_of(dotted):
    room = dotted.split(".")[1] if "." in dotted else "__init__"
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms), room


@FILES
def test_imports_point_down_and_not_to_neighbors(path):
    floor, room = floor_of(name_of(path))
    for imported in ours(path):
        below, other = floor_of(imported)
        assert below < floor or other == room, f"{path} imports {imported}"


def test_there_is_no_circle():
    graph = {name_of(path): ours(path) - {name_of(path)} for path in MODULES}
    while graph:
        free = {name for name, needed in graph.items() if not needed & set(graph)}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in free}


@FILES
def test_models_are_known_by_their_protocol_only(path):
    if path.relative_to(PACKAGE).parts[0] in ("pipeline", "planner", "strategies"):
        assert "transformers" not in {name.split(".")[0] for name in imports(path)}


@FILES
def test_only_strategies_know_poptorch_and_only_lazily(path):
    inside = path.relative_to(PACKAGE).parts[0] == "strategies"
    assert "poptorch" not in {name.split(".")[0] for name in imports(path, lazy=not inside)}


PURE = ["pipeline", "planner", "data.settings", "training.settings", "models.bert_settings"]
WITHOUT = ["torch", "numpy", "lightning", "transformers", "datasets", "poptorch"]
SCRIPT = f"""
import importlib, pkgutil, sys
for name in {WITHOUT}:
    sys.modules[name] = None  # an import of it fails
for name in {PURE}:
    module = importlib.import_module(f"lightning_ipu_bert.{{name}}")
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        importlib.import_module(found.name)

from lightning_ipu_bert.data.settings import settings_of
from lightning_ipu_bert.models import bert_settings
from lightning_ipu_bert.pipeline.config import PipelineConfig

data = settings_of({{"micro_batch_size": 2, "max_length": 128, "num_workers": 4}})
bert = bert_settings.settings_of(None, {{"num_hidden_layers": 4, "vocab_size": 99}})
config = PipelineConfig(layers_per_stage=[2, 3], gradient_accumulation_steps=8)
print(config.batches.global_batch_size(data.batches.micro_batch_size))
print(data.windowing.max_length, data.batches.eval_micro_batch_size)
print(bert.vocab_size, len(bert_settings.bert_blocks(bert.num_hidden_layers)))
"""


def test_plans_and_settings_need_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, check=True, text=True
    )
    assert done.stdout.split() == ["16", "128", "32", "99", "6"]

"""Rules of the house that hold for every file of the package."""

import ast
import importlib
import inspect
import re
import types
from collections import Counter

from lightning.pytorch.strategies import Strategy
from test_floors import FILES, MODULES, PACKAGE, name_of

import lightning_ipu_bert
from lightning_ipu_bert import pipeline
from lightning_ipu_bert.pipeline.schedules import SCHEDULES

DYNAMIC = {
    "pipeline/facts.py": 1,  # the facts of a strategy, which foreign ones do not have
    "batch_trees.py": 1,  # named tuples, by the sign that Python itself goes by
    "strategies/ipu/loaders.py": 1,  # batch samplers of users
    "strategies/ipu/loader_class.py": 4,  # arguments of custom loader classes
    "strategies/ipu/program/losses.py": 1,  # leaves among autograd's nodes
    "strategies/ipu/run.py": 1,  # the batch size of a PopTorch loader
}
"""Files that ask an object for something that it may not have, with the number of places."""

PUBLIC = {"_fields", "_replace", "_asdict", "_make"}
"""Documented names of named tuples."""


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


def test_nobody_asks_an_object_for_what_it_may_not_have():
    found = Counter()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found[relative(path)] += node.func.id in ("getattr", "hasattr")
    in_use = {name: count for name, count in found.items() if count}
    assert {k: v for k, v in in_use.items() if not k.startswith("_compat/")} == DYNAMIC


@FILES
def test_private_names_of_libraries_are_in_compat(path):
    if relative(path).startswith("_compat/"):
        return
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] != "lightning_ipu_bert":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not [n for n in names if re.match("_[^_]", n)], f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            whose = ast.unparse(node.value) if hasattr(ast, "unparse") else ast.dump(node.value)
            own = whose in ("self", "cls") or "id='self'" in whose or "id='cls'" in whose
            known = node.attr in PUBLIC or (whose, node.attr) == ("os", "_exit")
            assert own or known or "id='os'" in whose, f"{path}:{node.lineno}: {whose}.{node.attr}"


def classes():
    for path in MODULES:
        if path.name != "__main__.py":
            module = importlib.import_module(name_of(path).replace(".__init__", ""))
            for value in vars(module).values():
                if inspect.isclass(value) and value.__module__ == module.__name__:
                    yield value


def functions(kind):
    """Methods that are written in the body of a class."""
    for name, value in vars(kind).items():
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if isinstance(function, types.FunctionType) and function.__code__.co_filename in {
            inspect.getfile(kind)
        }:
            yield name, inspect.unwrap(function)


def test_overridden_methods_say_so():
    checked = 0
    for kind in classes():
        for name, function in functions(kind):
            above = [base for base in kind.__mro__[1:] if name in vars(base)]
            if not above or name == "__init__" or name != function.__name__:
                continue
            checked += 1
            assert getattr(function, "__override__", False), f"{kind}.{name} overrides {above[0]}"
    assert checked > 100


def test_private_methods_of_libraries_are_not_overridden_elsewhere():
    for kind in classes():
        if kind.__module__.startswith("lightning_ipu_bert._compat"):
            continue
        for name, _ in functions(kind):
            foreign = [b for b in kind.__mro__[1:] if not b.__module__.startswith("lightning_ipu")]
            above = [base for base in foreign if name in vars(base)]
            assert not (above and re.match("_[^_]", name)), f"{kind}.{name} overrides {above}"


def test_there_are_two_strategies_and_nothing_derives_from_them():
    strategies = {kind for kind in classes() if issubclass(kind, Strategy)}
    expected = {lightning_ipu_bert.PipelineParallelStrategy, lightning_ipu_bert.IPUStrategy}
    assert strategies == expected
    for kind in strategies:
        assert kind.__final__
        assert kind.__mro__[1].__module__.startswith("lightning.")


def test_fields_are_created_in_init():
    """No method of a strategy or a run creates a field that `__init__` does not show."""
    for name in ("strategy", "run", "executor"):
        for backend in ("distributed", "ipu"):
            tree = ast.parse((PACKAGE / "strategies" / backend / f"{name}.py").read_text("utf8"))
            for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
                methods = [node for node in kind.body if isinstance(node, ast.FunctionDef)]
                created = {m.name: set(fields_set(m)) for m in methods}
                allowed = created.get("__init__", set()) | INHERITED
                for method, names in created.items():
                    assert names <= allowed, f"{kind.name}.{method}: {names - allowed}"


INHERITED = {
    *("accelerator", "parallel_devices", "precision_plugin", "cluster_environment"),
    *("optimizers", "lr_scheduler_configs"),
}
"""Fields that Lightning's `Strategy.__init__` creates."""


def fields_set(method):
    for node in ast.walk(method):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        for target in targets:
            for part in ast.walk(target):
                stored = isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
                if stored and isinstance(part.value, ast.Name) and part.value.id == "self":
                    yield part.attr


def test_the_two_walks_are_short():
    walks = re.findall(r"(?:YAML -> .*\n)(?: +-> .*\n)*", pipeline.__doc__)
    assert len(walks) == 2
    for walk in walks:
        files = re.findall(r"-> (\S+\.py)", walk)
        assert len(files) == len(set(files)) == 5
        for file in files:
            text = (PACKAGE / file).read_text("utf8")
            assert len(text.splitlines()) <= 250
            assert re.search(r"layers_per_stage|\.stages|stages_on", text), file


def test_partition_is_called_in_one_place():
    calls = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "partition":
                calls.append(relative(path))
    assert calls == ["pipeline/plan.py"]


@FILES
def test_files_are_of_a_size_to_read(path):
    assert len(path.read_text("utf8").splitlines()) <= 250


def test_private_names_are_listed_with_their_reasons():
    for path in (PACKAGE / "_compat").glob("*.py"):
        tree = ast.parse(path.read_text("utf8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                used |= {alias.name for alias in node.names}
            if isinstance(node, ast.ClassDef):
                used |= {m.name for m in node.body if isinstance(m, ast.FunctionDef)}
        for name in used:
            assert not re.match("_[^_]", name) or name in ast.get_docstring(tree), (path, name)


def test_schedules_are_told_apart_by_their_table_only():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.Compare):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not words & set(SCHEDULES), f"{relative(path)}:{node.lineno}"

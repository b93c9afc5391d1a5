"""The stand-in has PopTorch's names and parameters, as its manifest lists them."""

import inspect
import json
import os
from pathlib import Path

import poptorch
import pytest
from poptorch import optim


@pytest.fixture(scope="module")
def manifest():
    path = os.environ.get("POPTORCH_API_MANIFEST")
    if not path:
        pytest.skip("POPTORCH_API_MANIFEST is not set")
    return json.loads(Path(path).read_text())["modules"]


OPTIMIZERS = ("SGD", "Adam", "AdamW", "LAMB")
OPTIONS_CLASSES = {
    "Options": poptorch.Options,
    "TensorLocationSettings": poptorch.TensorLocationSettings,
    "_TrainingOptions": type(poptorch.Options().Training),
    "_PrecisionOptions": type(poptorch.Options().Precision),
    "_PopartOptions": type(poptorch.Options()._Popart),
    "_DistributedOptions": type(poptorch.Options().Distributed),
    "_TensorLocationOptions": type(poptorch.Options().TensorLocations),
}
CLASSES = {
    "poptorch": {
        "DataLoader": poptorch.DataLoader,
        "AsynchronousDataAccessor": poptorch.AsynchronousDataAccessor,
    },
    "poptorch.options": OPTIONS_CLASSES,
    "poptorch.optim": {name: getattr(optim, name) for name in OPTIMIZERS},
    "poptorch._poplar_executor": {"PoplarExecutor": poptorch.PoplarExecutor},
}
FUNCTIONS = (
    "trainingModel",
    "inferenceModel",
    "BeginBlock",
    "removeBlocks",
    "identity_loss",
    "recomputationCheckpoint",
    "ipuHardwareIsAvailable",
    "ipuHardwareVersion",
)
ENUMERATIONS = (
    "OutputMode",
    "ReductionType",
    "MeanReductionStrategy",
    "ConnectionType",
    "DataLoaderMode",
)
OWN = {"set", "createOrSet", "check", "exists", "toDict", "num_ipus"}
"""Names of the stand-in's that the manifest has in a base class, or that are none of PopTorch's."""


def parameters(function):
    found = list(inspect.signature(function).parameters.values())
    return [p for p in found if p.name != "self"]


def assert_same(name, ours, theirs):
    """Same names in the same order; same defaults where they are plain."""
    assert [p.name for p in ours] == [p["name"] for p in theirs], name
    for mine, listed in zip(ours, theirs):
        has_default = mine.default is not inspect.Parameter.empty
        assert has_default == ("default" in listed), f"{name}({mine.name})"
        plain = isinstance(mine.default, (int, float, bool, type(None)))
        if has_default and plain and "." not in listed["default"]:
            assert repr(mine.default) == listed["default"], f"{name}({mine.name})"


@pytest.mark.parametrize("module", CLASSES)
def test_methods_have_the_parameters_of_the_manifest(module, manifest):
    listed = {c["name"]: c for c in manifest[module]["classes"]}
    for name, kind in CLASSES[module].items():
        methods = {m["name"]: m for m in listed[name]["methods"] if m["kind"] == "method"}
        for method, function in vars(kind).items():
            public = not method.startswith("_") and method not in OWN
            if public and inspect.isfunction(function) and module != "poptorch.optim":
                theirs = methods[method]["params"]
                assert_same(f"{name}.{method}", parameters(function), theirs)
        if listed[name].get("init"):
            assert_same(name, parameters(kind.__init__), listed[name]["init"])


def test_functions_have_the_parameters_of_the_manifest(manifest):
    listed = {f["name"]: f for module in manifest.values() for f in module.get("functions", [])}
    for name in FUNCTIONS:
        assert_same(name, parameters(getattr(poptorch, name)), listed[name]["params"])


def test_enumerations_have_the_members_of_the_manifest(manifest):
    listed = {c["name"]: c for c in manifest["poptorch.enums"]["classes"]}
    for name in ENUMERATIONS:
        members = {k: str(v.value) for k, v in getattr(poptorch, name).__members__.items()}
        assert members == listed[name]["members"]

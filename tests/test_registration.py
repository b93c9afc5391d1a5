"""Names of strategies are known whichever is imported first, and importing the package is cheap."""

import os
import subprocess
import sys

import pytest
from test_house import MODULES, name_of

import lightning_ipu_bert

USES = """
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
trainer = Trainer(strategy="pipeline", accelerator="cpu", devices=2, logger=False)
print(type(trainer.strategy).__name__, type(AcceleratorRegistry.get("ipu")).__name__)
assert {"pipeline", "pipeline_notebook", "ipu_pipeline"} <= set(StrategyRegistry)
assert AcceleratorRegistry["ipu"]["accelerator"].is_available()
Trainer(accelerator="auto", logger=False)
"""


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first",
    [
        "import lightning_ipu_bert, lightning",
        "import lightning_ipu_bert\nfrom lightning.pytorch.callbacks import Callback",
        "import lightning.pytorch, lightning_ipu_bert",
        "from lightning_ipu_bert import PipelineParallelStrategy",
        "import lightning_ipu_bert.strategies.distributed.strategy",
        "import lightning_ipu_bert.strategies.ipu.accelerator",
    ],
)
def test_strategies_are_registered(first):
    assert run(first + USES) == "PipelineParallelStrategy IPUAccelerator\n"


def test_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'lightning', 'transformers', 'datasets', 'numpy'}"
    assert run(f"import sys, lightning_ipu_bert; print({heavy} & set(sys.modules))") == "set()\n"


def test_public_names_are_found():
    assert set(lightning_ipu_bert.MODULES) == set(lightning_ipu_bert.__all__) - {"__version__"}
    assert set(lightning_ipu_bert.__all__) <= set(dir(lightning_ipu_bert))
    for name in lightning_ipu_bert.MODULES:
        value = getattr(lightning_ipu_bert, name)
        assert value.__module__ == f"lightning_ipu_bert.{lightning_ipu_bert.MODULES[name]}"
    with pytest.raises(AttributeError, match="has no attribute 'Dropouts'"):
        lightning_ipu_bert.Dropouts  # noqa: B018


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_any_module_can_be_imported_first(path):
    """In a fork from which the package is taken away: other packages are imported once."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for name in [n for n in sys.modules if n.split(".")[0] == "lightning_ipu_bert"]:
                del sys.modules[name]
            __import__(name_of(path).replace(".__main__", ".cli"))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0

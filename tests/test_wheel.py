"""The wheel works from an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from model_helpers import QUICKSTART_OPTIONS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy: a build leaves files beside what it builds.
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(source)], **quiet)
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(folder / "site"), str(wheel)], **quiet)
    return folder / "site"


def python(installed, folder, *words):
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_the_installed_package_is_the_one_that_runs(installed, tmp_path):
    where = python(installed, tmp_path, "-c", "import lightning_ipu_bert as p; print(p.__file__)")
    assert where.startswith(str(installed))


def test_a_shipped_config_is_found_by_its_name(installed, tmp_path):
    words = ["-m", "lightning_ipu_bert", "fit", "--config", "quickstart.yaml", "--print_config"]
    assert "dataset_name: quickstart" in python(installed, tmp_path, *words)


def test_it_trains_from_an_empty_folder(installed, tmp_path):
    python(
        installed,
        tmp_path,
        *("-m", "lightning_ipu_bert", "fit", "--config", "configs/quickstart.yaml"),
        *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"),
        *("--trainer.limit_train_batches", "2", "--trainer.enable_progress_bar", "false"),
        *QUICKSTART_OPTIONS,
    )
    assert (tmp_path / "runs/quickstart/best.ckpt").exists()


def test_it_is_typed_and_licensed(installed):
    assert (installed / "lightning_ipu_bert" / "py.typed").exists()
    (metadata,) = installed.glob("lightning_ipu_bert-*.dist-info")
    assert list(metadata.rglob("LICENSE"))
    assert "Apache-2.0" in (metadata / "METADATA").read_text("utf8").split("\n\n")[0]


def test_documentation_is_not_in_it(installed):
    assert (ROOT / "lightning_ipu_bert" / "docs" / "glossary.md").exists()
    assert not (installed / "lightning_ipu_bert" / "docs").exists()

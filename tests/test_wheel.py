"""The wheel works from an empty folder."""

import json
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


@pytest.fixture(scope="module")
def ran(installed, tmp_path_factory):
    """An empty folder in which the installed package has trained, and what it printed before."""
    folder = tmp_path_factory.mktemp("empty")
    script = (
        "import contextlib, json, sys\n"
        "import lightning_ipu_bert as package\n"
        "from lightning_ipu_bert.cli import main\n"
        "print(package.__file__)\n"
        "print('poptorch' in sys.modules)\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['fit', '--config', 'quickstart.yaml', '--print_config'])\n"
        "print('---', flush=True)\n"
        "main(json.loads(sys.argv[1]))\n"
    )
    words = ["fit", "--config", "configs/quickstart.yaml", *QUICKSTART_OPTIONS]
    words += ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
    words += ["--trainer.limit_train_batches", "2", "--trainer.enable_progress_bar", "false"]
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py", json.dumps(words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return folder, done.stdout.split("---")[0].splitlines()


def test_the_wheel_has_every_file_of_the_package(installed):
    """What is missing would be imported from an editable installation, if there is one."""
    package = ROOT / "lightning_ipu_bert"
    sources = {
        file.relative_to(ROOT)
        for file in package.rglob("*")
        if file.is_file() and not {"__pycache__", "docs"} & set(file.parts)
    }
    assert sources <= {file.relative_to(installed) for file in installed.rglob("*")}


def test_the_installed_package_is_the_one_that_runs(installed, ran):
    assert ran[1][0].startswith(str(installed))


def test_the_package_needs_no_sdk(ran):
    """In a process whose path has no stand-in."""
    assert ran[1][1] == "False"


def test_a_shipped_config_is_found_by_its_name(ran):
    assert "  dataset_name: quickstart" in ran[1]


def test_it_trains_from_an_empty_folder(ran):
    assert (ran[0] / "runs/quickstart/best.ckpt").exists()


def test_it_is_typed_and_licensed(installed):
    assert (installed / "lightning_ipu_bert" / "py.typed").exists()
    (metadata,) = installed.glob("lightning_ipu_bert-*.dist-info")
    assert list(metadata.rglob("LICENSE"))
    assert "Apache-2.0" in (metadata / "METADATA").read_text("utf8").split("\n\n")[0]


def test_documentation_is_not_in_it(installed):
    assert (ROOT / "lightning_ipu_bert" / "docs" / "glossary.md").exists()
    assert not (installed / "lightning_ipu_bert" / "docs").exists()

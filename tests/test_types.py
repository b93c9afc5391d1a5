"""A typed project of a user's passes `mypy --strict`, and mistakes in it are found."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "tests/typed_project.py"


@pytest.mark.slow
def test_a_typed_project_is_accepted_and_a_mistake_in_it_is_not(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed on old stacks")
    right = PROJECT.read_text("utf8")
    wrong = right.replace("layers_per_stage=[3, 3]", "layers_per_stage='3, 3'", 1)
    wrong = wrong.replace("-> List[str]:", "-> int:", 1)
    for name, text in (("right", right), ("wrong", wrong)):
        (tmp_path / f"{name}.py").write_text(text, "utf8")
    # As for an installed package, only the project's own errors are reported.
    strict = ["--strict", "--config-file=", "--follow-imports=silent", "--no-error-summary"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *strict, f"--cache-dir={tmp_path}", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    errors = done.stdout.splitlines()
    assert not [line for line in errors if "right.py" in line], done.stdout + done.stderr
    assert sum("[override]" in line for line in errors) == 1, done.stdout + done.stderr
    assert sum("[arg-type]" in line for line in errors) == 1, done.stdout + done.stderr

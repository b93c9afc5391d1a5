"""`scripts/check_gpu`, shortened as on CPUs: every row passes, or says what it would need."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_gpu"

pytest.importorskip("torch.distributed.pipelining", reason="torch has no pipelines")


@pytest.mark.slow
def test_the_checks_pass_on_cpus():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    passed = [row[0] for row in rows if row[3] == "yes"]
    assert passed == [
        "one stage and plain Lightning, 32-true",
        "one stage and plain Lightning, bf16-mixed",
        "optimizer state in host memory",
        "recomputation",
        "gloo, 2 x 1 and plain Lightning",
        "gloo, 1 x 2 and plain Lightning",
    ]
    assert not [row for row in rows if row[3] == "NO"]
    needed = [row[1] for row in rows if row[1].startswith("not here")]
    assert needed == ["not here: needs a GPU"]


@pytest.mark.parametrize(
    ("losses", "passes"), [([2.0, 1.0], True), ([2.0, 1.1], False), ([2.0, 2.5], False)]
)
def test_a_row_passes_with_equal_losses_that_fall(losses, passes, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu_checks import Run, compared

    beside = Run([2.0, losses[-1] if losses[-1] > 2 else 1.0], 0.0, None)
    assert compared("", Run(losses, 0.0, None), beside).passed == passes

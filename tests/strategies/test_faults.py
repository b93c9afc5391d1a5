"""A rank comes to harm: the job ends soon, says why, leaves nothing behind, and can go on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port

SCRIPT = Path(__file__).with_name("fault_script.py")


def start(folder, harm, rank, *ckpt_path):
    """Run the script; return exit code, seconds, what it printed, and the ranks that are left."""
    begin = time.monotonic()
    command = [sys.executable, str(SCRIPT), str(folder), harm, str(rank), *map(str, ckpt_path)]
    environment = {**os.environ, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        output, _ = process.communicate(timeout=120)
    return process.returncode, time.monotonic() - begin, output, left_over(process.pid)


def left_over(session):
    """Processes of a session that still live 5 s later at most."""
    for _ in range(50):
        pids = subprocess.run(
            ["ps", "-o", "pid=", "--sid", str(session)], capture_output=True, text=True
        ).stdout.split()
        if not pids:
            break
        time.sleep(0.1)
    return pids


def losses(output):
    words = [line.split() for line in output.splitlines() if line.startswith("loss ")]
    return {int(step): float(value) for _, step, value in words}


def lines_naming(rank, output):
    return [line for line in output.splitlines() if line.startswith(f"Rank {rank} ")]


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    code, seconds, output, _ = start(tmp_path_factory.mktemp("unharmed"), "none", 0)
    assert code == 0, output
    assert len(losses(output)) == 8
    return losses(output), seconds


@pytest.mark.parametrize(
    ("harm", "rank", "line"),
    [
        ("kill", 1, "was killed by SIGKILL"),
        ("kill", 0, "is gone"),
        ("memory", 1, "failed in step 4 (stage 1): MemoryError: no memory is left in this stage"),
        ("memory", 0, "failed in step 4 (stage 0): MemoryError: no memory is left in this stage"),
    ],
)
def test_the_job_ends_names_the_rank_and_goes_on(harm, rank, line, unharmed, tmp_path):
    expected, usual_seconds = unharmed
    code, seconds, output, left = start(tmp_path, harm, rank)
    assert code != 0
    assert seconds < usual_seconds + 30
    (told,) = lines_naming(rank, output)
    assert line in told
    assert not left

    code, _, output, _ = start(tmp_path, "none", 0, tmp_path / "last.ckpt")
    assert code == 0, output
    assert losses(output) == {step: expected[step] for step in (5, 6, 7, 8)}


def test_a_kill_while_saving_leaves_the_last_checkpoint_whole(unharmed, tmp_path):
    code, _, output, left = start(tmp_path, "save", 0)
    assert code != 0
    assert not left
    code, _, output, _ = start(tmp_path, "none", 0, tmp_path / "last.ckpt")
    assert code == 0, output
    assert losses(output) == {step: unharmed[0][step] for step in range(3, 9)}

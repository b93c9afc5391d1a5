"""Jobs of two ranks that come to harm: `fault_script.py`, how it ends and what it printed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

from forked_script import ForkedScript
from ranks import free_port

SCRIPT = Path(__file__).parent / "strategies" / "fault_script.py"
WITHIN = 30.0
"""Seconds in which a job must end."""


class Run(NamedTuple):
    """A job that was started in a session of its own."""

    process: ForkedScript
    log: Path

    def output(self) -> str:
        return self.log.read_text("utf8")

    def wait_for_training(self) -> None:
        """Return when the first update is made."""
        deadline = time.monotonic() + 120
        while self.process.poll() is None and not losses_in(self.output()):
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def end(self, timeout: float = 120.0) -> Tuple[int, str, List[int]]:
        """Wait; return the exit code, what it printed, and the processes that are left."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"The job does not end.\n{self.output()}") from None
        deadline = time.monotonic() + 5
        while processes_of(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        return code, self.output(), processes_of(self.process.pid)


def begin_run(folder: Path, *words: str, epochs: int = 4) -> Run:
    """Start the script of the tests."""
    folders = [str(SCRIPT.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "EPOCHS": str(epochs),
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
    }
    command, log = [sys.executable, str(SCRIPT), str(folder), *words], folder / "output.txt"
    with log.open("w", encoding="utf8") as file:
        process = ForkedScript(
            command, env=environment, output=file.fileno(), start_new_session=True
        )
    return Run(process, log)


def processes_of(session: int) -> List[int]:
    """Return the living processes of a session, oldest first."""
    command = ["ps", "-o", "pid=,stat=", "--sid", str(session)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return sorted(int(line.split()[0]) for line in lines if not line.split()[1].startswith("Z"))


def losses_in(output: str) -> Dict[int, float]:
    """Return the losses that the script printed, by step."""
    words = [line.split() for line in output.splitlines() if line.startswith("loss ")]
    return {int(step): float(value) for _, step, value in words}


def lines_naming(rank: int, output: str) -> List[str]:
    """Return the lines that say what happened to a rank."""
    return [line for line in output.splitlines() if line.startswith(f"Rank {rank} ")]


def train_unharmed(epochs: int) -> Tuple[Dict[int, float], float]:
    """Return the losses of a run that nobody kills, and its seconds after the first update."""
    with tempfile.TemporaryDirectory() as folder:
        run = begin_run(Path(folder), "none", "0", epochs=epochs)
        run.wait_for_training()
        begin = time.monotonic()
        code, output, _ = run.end()
    assert code == 0, output
    return losses_in(output), time.monotonic() - begin


def kill_once(chance: random.Random, unharmed: Dict[int, float], seconds: float) -> str:
    """Kill a random rank after some of `seconds` of training; return what happened.

    Raises:
        AssertionError: If the job does not end as it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        last, epochs = Path(folder) / "last.ckpt", len(unharmed) // 2
        run = begin_run(Path(folder), "none", "0", epochs=epochs)
        run.wait_for_training()
        moment, rank = chance.uniform(0, seconds), chance.randrange(2)
        time.sleep(moment)
        ranks = [pid for pid in processes_of(run.process.pid) if is_rank(pid, run)]
        if len(ranks) == 2:  # or the run has ended
            os.kill(ranks[rank], signal.SIGKILL)
        killed = time.monotonic()
        code, output, left = run.end()
        took = time.monotonic() - killed
        if losses_in(output) == unharmed:
            return kill_once(chance, unharmed, 0.8 * seconds)  # too late: training was over
        done = max(losses_in(output))
        story = f"rank {rank} killed after {moment:.2f} s, in step {done + 1}"
        assert code != 0, f"{story}: exit code 0\n{output}"
        assert took < WITHIN, f"{story}: took {took:.1f} s to end\n{output}"
        assert not left, f"{story}: {left} are left\n{output}"
        assert len(lines_naming(rank, output)) == 1, f"{story}: nobody says so\n{output}"
        # Saved after every epoch of two updates; the kill may have come in the middle of a save.
        assert last.exists() or done < 4, f"{story}: nothing was saved\n{output}"
        more = ["none", "0", *([str(last)] if last.exists() else [])]
        code, output, _ = begin_run(Path(folder), *more, epochs=epochs).end()
        assert code == 0, f"{story}: does not resume\n{output}"
        resumed = losses_in(output)
        expected = {step: unharmed[step] for step in range(min(resumed), max(unharmed) + 1)}
        assert resumed == expected, f"{story}: other losses\n{output}"
        assert min(resumed) >= done - 2, f"{story}: resumes from step {min(resumed)}\n{output}"
    return f"{story}: ended in {took:.1f} s, resumed from step {min(resumed)}"


def is_rank(pid: int, run: Run) -> bool:
    """Return whether a process runs the script, and is no helper of Python's or torch's."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return pid == run.process.pid or int(parent) == run.process.pid

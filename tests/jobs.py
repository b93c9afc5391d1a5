"""Jobs of ranks that come to harm: `fault_script.py`, how it ends and what it printed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from forked_script import ForkedScript
from ranks import free_port

SCRIPT = Path(__file__).parent / "strategies" / "fault_script.py"
WITHIN = 30.0
"""Seconds in which a job must end."""


class Run(NamedTuple):
    """A job that was started in a session of its own."""

    process: Any
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
        deadline = time.monotonic() + WITHIN  # ranks that still import end when they are done
        while processes_of(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        return code, self.output(), processes_of(self.process.pid)


def begin_run(
    folder: Path,
    words: Sequence[str],
    epochs: int = 4,
    variables: Optional[Mapping[str, str]] = None,
    fresh: bool = False,
) -> Run:
    """Start the script of the tests.

    Args:
        folder: For its checkpoints and its output.
        words: Arguments of the script.
        epochs: Epochs of two updates.
        variables: Environment variables of the script.
        fresh: Whether to start interpreters, instead of forks.
    """
    folders = [str(SCRIPT.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "EPOCHS": str(epochs),
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        **(variables or {}),
    }
    command, log = [sys.executable, str(SCRIPT), str(folder), *words], folder / "output.txt"
    with log.open("w", encoding="utf8") as file:
        if fresh:
            process: Any = subprocess.Popen(
                command,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        else:
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


class Kill(NamedTuple):
    """What happens to a run."""

    signal: str
    """SIGKILL or SIGTERM of a random rank, or SIGINT of all of them, as by Ctrl-C."""
    layout: str
    """Stages x replicas."""
    phase: str
    """One of `PHASES`."""


PHASES = {"start-up": 2.5, "collective": 0.4, "step": 0.2, "save": 0.02, "validation": 0.05}
"""Where a run is killed: after so many seconds at most."""
EPOCHS = 20


def train_unharmed(layout: str) -> Dict[int, float]:
    """Return the losses of a run that nobody kills."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {"LAYOUT": layout, "PHASES": "1"}
        run = begin_run(Path(folder), ["none", "0"], EPOCHS, variables)
        code, output, _ = run.end()
    assert code == 0, output
    return losses_in(output)


def kill_once(chance: random.Random, kill: Kill, unharmed: Dict[int, float]) -> str:
    """Kill a run at a random moment of a phase; return what happened.

    Raises:
        AssertionError: If the job does not end as it should.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, fresh = Path(name), kill.phase == "start-up"
        variables = {"LAYOUT": kill.layout, "PHASES": "1"}
        run = begin_run(folder, ["none", "0"], EPOCHS, variables, fresh=fresh)
        _wait_for(run, kill.phase, chance)
        time.sleep(chance.uniform(0, PHASES[kill.phase]))
        ranks = [pid for pid in processes_of(run.process.pid) if is_rank(pid, run)]
        rank = chance.randrange(len(ranks)) if ranks else 0
        killed = time.monotonic()
        with suppress(ProcessLookupError):
            if kill.signal == "SIGINT":
                os.killpg(run.process.pid, signal.SIGINT)
            elif ranks:
                os.kill(ranks[rank], signal.Signals[kill.signal])
        code, output, left = run.end()
        took = time.monotonic() - killed
        if max(losses_in(output), default=0) == max(unharmed):
            return kill_once(chance, kill, unharmed)  # too late: training was over
        done = max(losses_in(output), default=0)
        whom = "all ranks" if kill.signal == "SIGINT" else f"rank {rank}"
        story = f"{kill.signal} of {whom}, {kill.layout}, {kill.phase}, after step {done}"
        assert code != 0 or kill.signal == "SIGTERM", f"{story}: exit code 0\n{output}"
        assert took < WITHIN, f"{story}: took {took:.1f} s to end\n{output}"
        assert not left, f"{story}: {left} are left\n{output}"
        lines = lines_about_end(output)
        assert len(lines) == 1, f"{story}: {lines}\n{output}"
        if done:
            story += _resumed(folder, kill, unharmed, done, variables)
    return f"{story}; ended in {took:.1f} s: {lines[0]}"


def _wait_for(run: Run, phase: str, chance: random.Random) -> None:
    """Return when a run begins a phase, the first time or any time later."""
    pattern = {"start-up": "Device Allocation", "step": "\nloss "}.get(phase, f"phase {phase}")
    times = 1 if phase in ("start-up", "collective") else chance.randrange(1, EPOCHS)
    deadline = time.monotonic() + 120
    while run.process.poll() is None and run.output().count(pattern) < times:
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.005)


def lines_about_end(output: str) -> List[str]:
    """Return the lines that say why a job has ended."""
    beginnings = ("Rank ", "Ended by", "Ended immediately", "To resume:")
    lines = [line for line in output.splitlines() if line.startswith(beginnings)]
    if not lines:
        lines = [line for line in output.splitlines() if "KeyboardInterrupt" in line]
    return lines


def _resumed(
    folder: Path, kill: Kill, unharmed: Dict[int, float], done: int, variables: Mapping[str, str]
) -> str:
    """Resume a run, and compare its losses with those of the unharmed one."""
    last = folder / "last.ckpt"
    # Saved after every epoch of two updates; the kill may have come in the middle of a save.
    assert last.exists() or done < 4, f"{kill}: nothing was saved after step {done}"
    words = ["none", "0", *([str(last)] if last.exists() else [])]
    code, output, _ = begin_run(folder, words, EPOCHS, variables).end()
    assert code == 0, f"{kill}: does not resume\n{output}"
    resumed = losses_in(output)
    first = min(resumed, default=max(unharmed) + 1)
    expected = {step: unharmed[step] for step in range(first, max(unharmed) + 1)}
    assert resumed == expected, f"{kill}: other losses\n{output}"
    assert first >= done - (2 if kill.signal == "SIGKILL" else -1), (
        f"{kill}: from step {first}, after step {done}"
    )
    return f", resumed from step {first}"


def is_rank(pid: int, run: Run) -> bool:
    """Return whether a process runs the script, and is no helper of Python's or torch's."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    launcher = int(run.process.pid)
    return pid == launcher or int(parent) == launcher

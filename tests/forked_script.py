"""Scripts in forked processes, as if started by `python script.py`.

A fresh interpreter imports torch and Lightning, which takes longer than most tests; a fork shares
them. Tests of starting processes (quickstart, torchrun, an installed wheel) start real ones.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, NoReturn, Optional

from tqdm import tqdm


class ForkedScript:
    """Takes the place of `subprocess.Popen([sys.executable, script, *arguments])`."""

    def __init__(
        self,
        command: List[str],
        *,
        env: Optional[Mapping[str, str]] = None,
        cwd: Optional[str] = None,
        output: Optional[int] = None,
        start_new_session: bool = False,
    ) -> None:
        self.args = command
        self.returncode: Optional[int] = None
        self._lock = threading.Lock()
        environment = dict(os.environ if env is None else env)
        self.pid = os.fork()
        if not self.pid:
            if start_new_session:
                os.setsid()
            if cwd is not None:
                os.chdir(cwd)
            _run(command, environment, output)

    def poll(self) -> Optional[int]:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    killed = os.WIFSIGNALED(status)
                    self.returncode = -os.WTERMSIG(status) if killed else os.WEXITSTATUS(status)
            return self.returncode

    def wait(self, timeout: Optional[float] = None) -> int:
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            code = self.poll()
            if code is not None:
                return code
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _run(command: List[str], environment: Mapping[str, str], output: Optional[int]) -> NoReturn:
    """Become the script, and end with its exit code."""
    code = 1
    try:
        for stream in (1, 2) if output is not None else ():
            os.dup2(output or 0, stream)
        _forget_pytest()
        os.environ.clear()
        os.environ.update(environment)
        script = command[1]
        sys.argv = command[1:]
        sys.path.insert(0, str(Path(script).parent))
        # What Lightning starts for the other ranks.
        vars(subprocess)["Popen"] = ForkedScript
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forget_pytest() -> None:
    """Let output, signals, logs and warnings be those of a fresh interpreter."""
    stdout = open(1, "w", encoding="utf8", closefd=False)  # noqa: SIM115
    stderr = open(2, "w", buffering=1, encoding="utf8", closefd=False)  # noqa: SIM115
    vars(sys).update(stdout=stdout, stderr=stderr, __stdout__=stdout, __stderr__=stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tqdm.set_lock(threading.RLock())  # forks share one, which a killed process would keep
    warnings.resetwarnings()
    logging.root.handlers.clear()
    loggers: List[Any] = list(logging.root.manager.loggerDict.values())
    logging.getLogger("lightning.pytorch").propagate = False  # conftest.py has turned it on
    for logger in loggers:
        for handler in list(vars(logger).get("handlers", ())):
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr  # not by setStream, which would flush a closed one
            elif type(handler).__module__.startswith("_pytest"):
                logger.removeHandler(handler)


class Done(NamedTuple):
    """A script that has ended."""

    returncode: int
    output: str


def run_script(
    script: Path,
    *arguments: str,
    folder: Path,
    env: Optional[Mapping[str, str]] = None,
    timeout: float = 120.0,
) -> Done:
    """Run a script in a folder and a session of its own; return what it printed."""
    log = folder / "script_output.txt"
    with log.open("w", encoding="utf8") as file:
        process = ForkedScript(
            [sys.executable, str(script), *arguments],
            env=env,
            cwd=str(folder),
            output=file.fileno(),
            start_new_session=True,
        )
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{script.name} does not end.\n{log.read_text('utf8')}") from None
    return Done(code, log.read_text("utf8"))

"""A rank fails: the job exits within seconds, reports why, leaves no process, and can resume."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from jobs import (
    Kill,
    begin_run,
    is_rank,
    kill_once,
    lines_naming,
    losses_in,
    processes_of,
    train_unharmed,
)
from model_helpers import needs_pipelining

from lightning_ipu_bert.strategies.distributed.launch import watch

pytestmark = [pytest.mark.slow, needs_pipelining]


def start(folder, harm, rank, *ckpt_path):
    """Run the script; return exit code, seconds, what it printed, and the ranks that are left."""
    begin = time.monotonic()
    code, output, left = begin_run(folder, [harm, str(rank), *map(str, ckpt_path)]).end()
    return code, time.monotonic() - begin, output, left


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    code, seconds, output, _ = start(tmp_path_factory.mktemp("unharmed"), "none", 0)
    assert code == 0, output
    assert len(losses_in(output)) == 8
    return losses_in(output), seconds


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
    assert losses_in(output) == {step: expected[step] for step in (5, 6, 7, 8)}


def test_a_kill_while_saving_leaves_the_last_checkpoint_whole(unharmed, tmp_path):
    code, _, output, left = start(tmp_path, "save", 0)
    assert code != 0
    assert not left
    code, _, output, _ = start(tmp_path, "none", 0, tmp_path / "last.ckpt")
    assert code == 0, output
    assert losses_in(output) == {step: unharmed[0][step] for step in range(3, 9)}


def test_a_kill_at_a_random_moment():
    """scripts/kill_ranks.py does this as often as one likes."""
    seed = random.randrange(1000)
    plan = Kill("SIGKILL", "2x1", "step")
    print(f"seed {seed}: {kill_once(random.Random(seed), plan, train_unharmed('2x1'))}")


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_on_any_rank_saves_and_ends_all(rank, unharmed, tmp_path):
    """In the middle of a schedule, where the other rank waits for a hidden state."""
    expected, usual_seconds = unharmed
    code, seconds, output, left = start(tmp_path, "term", rank)
    assert code in (0, 143), output
    assert seconds < usual_seconds + 30
    assert not left
    assert not lines_naming(0, output) + lines_naming(1, output)
    done = max(losses_in(output))
    assert 5 <= done <= 6

    code, _, output, _ = start(tmp_path, "none", 0, tmp_path / "last.ckpt")
    assert code == 0, output
    assert losses_in(output) == {step: expected[step] for step in range(done + 1, 9)}


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_in_a_validation_ends_all_at_its_next_batch(rank, tmp_path):
    code, _, output, left = start(tmp_path, "end", rank)
    assert code in (0, 143), output
    assert not left
    assert len(losses_in(output)) == 8
    assert 1 <= output.count("validation ") <= 2  # of four batches
    assert "not reached" not in output


def test_a_rank_that_ended_by_a_second_interrupt_is_reported_by_its_launcher(capfd):
    """The launcher may be in a collective, where no handler of a signal runs."""
    context = multiprocessing.get_context("fork")
    launcher = context.Process(target=_launch_a_rank_that_is_interrupted)
    launcher.start()
    launcher.join(30)
    assert launcher.exitcode == watch.INTERRUPTED
    assert capfd.readouterr().err.count("Ended immediately by Ctrl-C; nothing was saved.") == 1


def _launch_a_rank_that_is_interrupted():
    sys.stderr = sys.__stderr__
    watch.running.set()
    rank = subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({watch.INTERRUPTED})"])
    watch.watch_children([rank], timeout_seconds=60)
    time.sleep(20)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_within_the_timeout(rank, tmp_path):
    run = begin_run(tmp_path, ["none", "0"], epochs=2000, variables={"TIMEOUT": "8"})
    run.wait_for_training()
    ranks = [pid for pid in processes_of(run.process.pid) if is_rank(pid, run)]
    os.kill(ranks[rank], signal.SIGSTOP)
    begin = time.monotonic()
    line = f"Rank {rank} (process {ranks[rank]}) is stopped. The other ranks wait for it, at most 8"
    while line not in run.output():
        assert time.monotonic() < begin + 8, run.output()
        time.sleep(0.1)
    code, output, left = run.end()
    assert code != 0
    assert output.count("is stopped") == 1
    assert not left


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"NODES": "2", "NODE_RANK": "0"}, "Rank 0 waits for the other ranks of 2 at MASTER_ADDR="),
        ({"MASTER_ADDR": "no.such.host"}, "no.such.host MASTER_PORT=.*, whose address is unknown"),
    ],
)
def test_a_job_says_what_it_waits_for(variables, line, tmp_path):
    job = {"TIMEOUT": "8", **variables}
    code, output, left = begin_run(tmp_path, ["none", "0"], variables=job).end()
    assert code != 0
    assert re.search(f"{line}.* at most 8 s. Start the script on all nodes", output), output
    assert not left

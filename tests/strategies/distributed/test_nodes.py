"""Ranks that others start: two torchrun agents as two nodes, and SLURM. The numbers stay."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from forked_script import run_script
from model_helpers import needs_pipelining
from node_script import train_on_nodes
from ranks import free_port, run_ranks

pytestmark = [pytest.mark.slow, needs_pipelining]
SCRIPT = str(Path(__file__).parents[1] / "node_script.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def run_all(commands):
    """Run commands side by side, each with its environment; all must end well."""
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for command, environment in commands
        ]
        for process in processes:
            stack.callback(process.kill)  # where another one fails or does not end
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output


def answers(folder, world):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture
def one_node(tmp_path):
    """The same four ranks on one node."""
    return [answer for answer, _ in run_ranks(4, train_on_nodes, str(tmp_path), 1, 4)]


def agents(folder, prefixes, addresses):
    """Run two agents of torchrun with two ranks each."""
    port = str(free_port())
    run_all(
        (
            [
                *(*prefix, *TORCHRUN, "--nnodes=2", "--nproc-per-node=2", f"--node-rank={node}"),
                *(f"--master-addr={addresses[0]}", f"--master-port={port}"),
                *(f"--local-addr={address}", SCRIPT, str(folder), "2", "2"),
            ],
            {"GLOO_SOCKET_IFNAME": "eth0" if prefix else "lo"},
        )
        for node, (prefix, address) in enumerate(zip(prefixes, addresses))
    )
    return answers(folder, 4)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_nodes():
    """Prefixes of commands that run on either node, and the nodes' addresses.

    Network namespaces joined by a cable where this machine and this user can make them,
    else loopback. Names carry the process: the kernel takes namespaces down at its leisure.
    """
    names = [f"node{node}-{os.getpid()}" for node in range(2)]
    addresses = ["10.213.7.1", "10.213.7.2"]
    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
            ip(
                "-n",
                names[0],
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "eth0",
                "netns",
                names[1],
            )
            for name, address in zip(names, addresses):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError):
            prefixes, addresses = [[], []], ["127.0.0.1", "127.0.0.1"]
        else:
            prefixes = [["ip", "netns", "exec", name] for name in names]
        yield prefixes, addresses


def test_two_agents_of_torchrun_compute_what_one_node_does(one_node, tmp_path):
    with two_nodes() as (prefixes, addresses):
        found = agents(tmp_path, prefixes, addresses)
    assert found == one_node
    assert [answer["share"]["rank"] for answer in found] == [0, 0, 1, 1]


def test_slurm_computes_what_lightnings_own_ranks_do(tmp_path):
    expected = [answer for answer, _ in run_ranks(2, train_on_nodes, str(tmp_path), 1, 2)]
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "pipeline",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(free_port()),
    }
    run_all(
        (
            [sys.executable, SCRIPT, str(tmp_path), "1", "2"],
            {**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    )
    assert answers(tmp_path, 2) == expected


def test_ranks_forked_in_a_notebook_give_the_weights_back(tmp_path):
    script = Path(SCRIPT).with_name("notebook_script.py")
    done = run_script(script, folder=tmp_path)
    assert "the same weights" in done.output, done.output

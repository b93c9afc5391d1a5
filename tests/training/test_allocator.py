"""Freed memory stays with a process where glibc can be told so, and nowhere else."""

import os
import statistics
import subprocess
import sys

import pytest

from lightning_ipu_bert.training import allocator

STEPS = """
import resource
import torch
from lightning_ipu_bert.training.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def faults_of_step():
    before = faults()
    torch.ones(16 * 2**20)  # 64 MiB
    return faults() - before

print(int({call}), *[faults_of_step() for _ in range(13)])
"""


def run(call, **environment):
    code = STEPS.format(call=call)
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    was_set, *faults = map(int, done.stdout.split())
    # The median: malloc may place a small block in the freed one, and one step pays for another.
    return was_set, statistics.median(faults)


@pytest.mark.skipif(allocator.platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_steps_cause_no_page_faults():
    was_set, faults = run("keep_freed_memory()")
    _, faults_without = run("False")
    assert was_set
    assert faults < 100 < 10_000 < faults_without


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_tuned_allocator_is_left_alone(name, monkeypatch):
    for variable in [v for v in os.environ if v.startswith("MALLOC_") or v == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(variable)
    assert not allocator.is_tuned()
    monkeypatch.setenv(name, "")
    assert allocator.is_tuned()
    assert not allocator.keep_freed_memory()


def test_another_allocator_or_c_library_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(allocator, "OTHER_ALLOCATORS", ("libc",))  # is loaded
    assert allocator.has_other_allocator() or not os.path.exists("/proc/self/maps")
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(allocator, "OTHER_ALLOCATORS", ())
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()

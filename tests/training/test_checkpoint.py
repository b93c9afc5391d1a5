import multiprocessing
import os
import signal
import time

import pytest
import torch

from lightning_ipu_bert.training.checkpoint_io import AtomicCheckpointIO


def save_forever(path, ready):
    """Overwrite one checkpoint again and again until killed."""
    io = AtomicCheckpointIO()
    for number in range(10**6):
        io.save_checkpoint({"number": number, "weights": torch.full((10**6,), number)}, path)
        ready.set()


@pytest.mark.parametrize("attempt", range(5))
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, attempt):
    path = tmp_path / "last.ckpt"
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=save_forever, args=(str(path), ready))
    process.start()
    assert ready.wait(timeout=60)
    time.sleep(0.003 * (1 + 7 * attempt))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["weights"].eq(checkpoint["number"]).all()


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"number": 1}, path)
    with pytest.raises(AttributeError):
        io.save_checkpoint({"number": lambda: None}, path)  # cannot be pickled
    assert torch.load(path, weights_only=True) == {"number": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

"""Ctrl-C: the first one ends a run between two steps, and saves; a second one ends it at once."""

from pathlib import Path

import pytest
import torch
from forked_script import run_script
from jobs import losses_in
from model_helpers import needs_pipelining
from test_faults import start

pytestmark = [pytest.mark.slow, needs_pipelining]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    code, _, output, _ = start(tmp_path_factory.mktemp("unharmed"), "none", 0)
    assert code == 0, output
    return losses_in(output)


@pytest.mark.parametrize(
    ("harm", "rank", "step"), [("int", 0, 4), ("int", 1, 5), ("terminal", 1, 5)]
)
def test_the_first_saves_and_says_how_to_resume(harm, rank, step, expected, tmp_path, monkeypatch):
    """In the middle of a schedule, where the other rank waits for a hidden state.

    An epoch has two updates: the run ends after the last one of an epoch, and within one.
    """
    monkeypatch.setenv("HARM_STEP", str(step))
    code, _, output, left = start(tmp_path, harm, rank)
    assert code == 1, output  # as Lightning ends by Ctrl-C
    assert not left
    path = tmp_path / "last.ckpt"
    assert output.count(f"To resume: ckpt_path={path}") == 1
    assert output.count("Press it again to end immediately") == (harm == "terminal" or rank == 0)
    assert "Rank " not in output
    assert "Traceback" not in output
    done = torch.load(path, weights_only=True)["global_step"]
    assert done == step + 2

    code, _, output, _ = start(tmp_path, "none", 0, path)
    assert code == 0, output
    assert losses_in(output) == {step: expected[step] for step in range(done + 1, 9)}


def test_a_second_ends_at_once_and_saves_nothing(tmp_path):
    code, _, output, left = start(tmp_path, "twice", 1)
    assert code == 130, output
    assert not left
    assert output.count("Ended immediately by Ctrl-C; nothing was saved.") == 1
    assert "To resume" not in output
    assert "Traceback" not in output
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_before_the_first_step_it_ends_at_once(rank, tmp_path):
    """Ranks are anywhere then, and there is nothing to save."""
    code, seconds, output, left = start(tmp_path, "early", rank)
    assert code not in (0, None), output
    assert seconds < 60
    assert not left
    assert "Traceback" not in output
    assert not losses_in(output)
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("how", ["once", "terminal", "twice"])
def test_a_notebook_goes_on(how, tmp_path):
    """Ranks are forked: see the script for what must hold afterwards."""
    script = Path(__file__).parents[1] / "interrupted_notebook_script.py"
    done = run_script(script, how, folder=tmp_path)
    assert done.output.splitlines()[-1:] == ["all is well"], done.output

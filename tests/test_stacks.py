"""A run of one stack resumes on the other, by the command line.

The other stack is that of $OTHER_STACK_PYTHON; `scripts/test_sdk_stack` sets it.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked_script import run_script

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("cli_script.py")
CONFIG = """
trainer:
  strategy: auto
  devices: 1
  max_epochs: 2
  limit_train_batches: 4
  limit_val_batches: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        dirpath: checkpoints
        filename: "{{step}}"
        monitor: null
        every_n_train_steps: 1
        save_top_k: -1
data:
  cache_dir: {cache}
"""
QUESTION = ["--question", "Who was the founder?", "--context", "Nedyn was founded by Rona Vosen."]


@pytest.fixture
def other():
    """The Python of the other stack."""
    if not os.environ.get("OTHER_STACK_PYTHON"):
        pytest.skip("OTHER_STACK_PYTHON is not set: it names the Python of the other stack")
    return os.environ["OTHER_STACK_PYTHON"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The features of both stacks, which either builds once."""
    return tmp_path_factory.mktemp("cache")


def run(python, folder, *words):
    """Run a verb of this checkout in a folder; return what it printed."""
    if python == sys.executable:
        done = run_script(SCRIPT, *map(str, words), folder=folder)
        assert done.returncode == 0, done.output
        return done.output
    done = subprocess.run(
        [python, "-m", "lightning_ipu_bert", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fit(python, folder, cache, *words):
    """Train two short epochs; return the loss of every step, by its number in the log."""
    folder.mkdir()
    (folder / "short.yaml").write_text(CONFIG.format(cache=cache))
    run(python, folder, "fit", "--config", "quickstart", "--config", "short.yaml", *words)
    (log,) = (folder / "runs").rglob("metrics.csv")
    with log.open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return {int(row["step"]): float(row["train/loss"]) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("here_first", [True, False], ids=["here to there", "there to here"])
def test_a_run_goes_on_on_the_other_stack(here_first, other, tmp_path, cache):
    first, second = (sys.executable, other) if here_first else (other, sys.executable)
    whole = fit(first, tmp_path / "whole", cache)
    assert list(whole) == list(range(8))
    saved = tmp_path / "whole" / "checkpoints"
    for done in (3, 4):  # in the middle of an epoch, and at its end
        path = saved / f"step={done}.ckpt"
        rest = fit(second, tmp_path / f"from{done}", cache, "--ckpt_path", path)
        assert rest == pytest.approx({s: x for s, x in whole.items() if s >= done}, rel=1e-4)

    last = ["--model", saved / "step=8.ckpt", *QUESTION, "--json"]
    answers = [json.loads(run(python, tmp_path, "ask", *last)) for python in (first, second)]
    assert answers[0].pop("score") == pytest.approx(answers[1].pop("score"), rel=1e-4)
    assert answers[0].pop("probability") == pytest.approx(answers[1].pop("probability"), rel=1e-4)
    assert answers[0] == answers[1]

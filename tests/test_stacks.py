"""A run of one stack resumes on the other, by the command line.

The other stack is that of $OTHER_STACK_PYTHON; `scripts/test_sdk_stack` sets it.
"""

import csv
import json
import os
import subprocess
from functools import partial
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


@pytest.fixture(scope="module")
def other():
    """Run a verb of this checkout in a folder, on the other stack."""
    if not os.environ.get("OTHER_STACK_PYTHON"):
        pytest.skip("OTHER_STACK_PYTHON is not set: it names the Python of the other stack")
    command = [os.environ["OTHER_STACK_PYTHON"], str(SCRIPT.with_name("script_server.py"))]
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as server:

        def run(folder, *words):
            server.stdin.write(json.dumps([str(SCRIPT), str(folder), words]) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield partial(ran, run)
        server.stdin.close()


@pytest.fixture
def own():
    """Run a verb of this checkout in a folder, on this stack."""
    return partial(ran, lambda folder, *words: run_script(SCRIPT, *words, folder=folder))


def ran(run, folder, *words):
    """Return what a verb printed, which must succeed."""
    code, output = run(folder, *map(str, words))
    assert code == 0, output
    return output


def fit(run, folder, cache, *words):
    """Train two short epochs; return the loss of every step, by its number in the log."""
    folder.mkdir()
    (folder / "short.yaml").write_text(CONFIG.format(cache=cache))
    run(folder, "fit", "--config", "quickstart", "--config", "short.yaml", *words)
    (log,) = (folder / "runs").rglob("metrics.csv")
    with log.open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return {int(row["step"]): float(row["train/loss"]) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("here_first", [True, False], ids=["here to there", "there to here"])
def test_a_run_goes_on_on_the_other_stack(here_first, own, other, tmp_path, cache_dir):
    first, second = (own, other) if here_first else (other, own)
    whole = fit(first, tmp_path / "whole", cache_dir)
    assert list(whole) == list(range(8))
    saved = tmp_path / "whole" / "checkpoints"
    for done in (3, 4):  # in the middle of an epoch, and at its end
        path = saved / f"step={done}.ckpt"
        rest = fit(second, tmp_path / f"from{done}", cache_dir, "--ckpt_path", path)
        assert rest == pytest.approx({s: x for s, x in whole.items() if s >= done}, rel=1e-4)

    last = ["--model", saved / "step=8.ckpt", *QUESTION, "--json"]
    answers = [json.loads(run(tmp_path, "ask", *last).splitlines()[-1]) for run in (first, second)]
    assert answers[0].pop("score") == pytest.approx(answers[1].pop("score"), rel=1e-4)
    assert answers[0].pop("probability") == pytest.approx(answers[1].pop("probability"), rel=1e-4)
    assert answers[0] == answers[1]

"""The README's commands are the product's: each one parses, and the first one keeps its promise."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked_script import run_script
from model_helpers import QUICKSTART_OPTIONS

from lightning_ipu_bert.cli import main
from lightning_ipu_bert.commands import trainer_verbs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
PREFIX = "python -m lightning_ipu_bert "
COMMANDS = [
    part.strip()[len(PREFIX) :]
    for line in BLOCKS.splitlines()
    for part in line.split("&&")
    if part.strip().startswith(PREFIX)
]


class ParsedError(Exception):
    """Raised where a command would begin to work."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise ParsedError

    words = shlex.split(command)
    verb = words[0]
    if verb in ("ask", "export"):
        (tmp_path / "passage.txt").write_text("A passage.")
        monkeypatch.setattr(f"lightning_ipu_bert.commands.{verb}.load_trained", stop)
    else:
        monkeypatch.setattr(trainer_verbs, "follow_checkpoint", lambda *_: None)
        monkeypatch.setattr(trainer_verbs.QuestionAnsweringCLI, "instantiate_classes", stop)
    monkeypatch.chdir(tmp_path)
    if "--ckpt_path" in words:
        path = tmp_path / words[words.index("--ckpt_path") + 1]
        path.parent.mkdir(parents=True)
        path.touch()
    with pytest.raises(ParsedError):
        main(words)


def test_all_verbs_are_shown():
    assert {command.split()[0] for command in COMMANDS} == {
        "fit", "validate", "predict", "ask", "export"
    }  # fmt: skip


def test_the_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_language_model_is_the_one_that_is_tested():
    """tests/strategies/test_parity.py trains it on every kind of pipeline."""
    source = (ROOT / "tests/strategies/language_model.py").read_text("utf8")
    written = source[source.index("class LanguageModel") : source.index("class Sentences")]
    assert written.strip() in README
    assert len([line for line in written.splitlines() if line.strip()]) < 40


def run(words, folder):
    """Run a verb in a fork; return what it printed."""
    done = run_script(Path(__file__).with_name("cli_script.py"), *words, folder=folder)
    assert done.returncode == 0, done.output
    return done.output


def run_as_a_person(words, folder):
    """Run a command in a fresh process; return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "lightning_ipu_bert", *words],
        cwd=folder,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ).stdout


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_quickstart_learns_to_read_and_answers(tmp_path):
    """Exact match is below 5 before and at least 80 after, on names and values never seen."""
    quickstart = ["--config", "quickstart", *QUICKSTART_OPTIONS]
    quickstart += ["--trainer.enable_progress_bar", "false"]
    before = run(["validate", *quickstart, "--trainer.logger", "false"], tmp_path)
    untrained = float(re.search(r"val/exact_match\W+([\d.]+)", before).group(1))
    assert untrained < 5

    fit = shlex.split(COMMANDS[0])
    assert fit[:2] == ["fit", "--config"]
    printed = run_as_a_person(
        [*fit, *QUICKSTART_OPTIONS, "--trainer.enable_progress_bar", "false"], tmp_path
    )
    scores = torch.load(tmp_path / "runs/quickstart/best.ckpt", weights_only=True)["scores"]
    assert scores["val/exact_match"] >= 80

    # The closing lines say how to ask the model, and that works.
    command = re.search(r"Ask it:\n  (python -m lightning_ipu_bert ask .*)", printed).group(1)
    words = shlex.split(command)[3:]
    answer = json.loads(run([*words, "--json"], tmp_path).splitlines()[-1])
    assert answer["answer"] in words[words.index("--context") + 1]
    assert answer["answer"]

"""Runs scripts for the Python of another stack, in forks of one process that has imported it."""

import json
import sys
from pathlib import Path

from forked_script import run_script

import lightning_ipu_bert.commands.trainer_verbs  # noqa: F401  # what the forks share

for line in sys.stdin:
    script, folder, words = json.loads(line)
    done = run_script(Path(script), *words, folder=Path(folder))
    print(json.dumps([done.returncode, done.output]), flush=True)

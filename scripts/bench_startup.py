"""How long the command line takes to start, beside importing what it needs.

    python scripts/bench_startup.py --model CHECKPOINT_OR_FOLDER [--rounds 5]

ask:  from the start of the process to the first answer / importing torch and the model's class
help: `fit --help` / importing lightning.pytorch

Processes follow each other; medians over the rounds. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Dict, List

OURS = ("-m", "lightning_ipu_bert")
QUESTION = ("--question", "Where is Rufford?", "--context", "Rufford is a town on the Demar.")


def seconds(words: List[str]) -> float:
    """Return the duration of a process."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - begin


def main() -> None:
    """Start the sides in turn; print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="trained model to ask")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    network = "import torch; from transformers import BertForQuestionAnswering"
    commands = {
        "model class": ["-c", network],
        "ask": [*OURS, "ask", "--model", options.model, *QUESTION],
        "lightning": ["-c", "import lightning.pytorch"],
        "help": [*OURS, "fit", "--help"],
    }
    times: Dict[str, List[float]] = {name: [] for name in commands}
    for turn in range(options.rounds + 1):
        for name, words in commands.items():
            taken = seconds(words)
            if turn:  # the first one reads files from disk
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:12} {medians[name]:.2f} s ({min(values):.2f} .. {max(values):.2f})")
    print(f"ask / model class: {medians['ask'] / medians['model class']:.2f}")
    print(f"help / lightning: {medians['help'] / medians['lightning']:.2f}")


if __name__ == "__main__":
    main()

"""Kill runs in every way, and check that they end, say why, and resume.

    python scripts/kill_ranks.py --times 20 --results kills.json

Every run trains the small language model of the tests, saving and validating after every epoch of
two updates. SIGKILL and SIGTERM go to a random rank, SIGINT to all ranks as by Ctrl-C, during
start-up, the first collectives, a step, a save or a validation, on 2x1, 2x2 and 1x3 (stages x
replicas). Then within 30 s no process may be left, and exactly one line must say why the run has
ended. A run that had trained is resumed, and must have the losses of an uninterrupted run.

Results are added to a file after every kill; the command continues where it was ended.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import product
from pathlib import Path
from signal import SIGINT, default_int_handler, signal
from typing import Dict, List

import tests_path  # noqa: F401
from jobs import PHASES, Kill, kill_once, train_unharmed
from tqdm import tqdm

import lightning_ipu_bert  # noqa: F401  # what forked runs share

SIGNALS, LAYOUTS = ("SIGKILL", "SIGTERM", "SIGINT"), ("2x1", "2x2", "1x3")
Results = Dict[str, List[str]]
"""What happened, by signal and layout."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=20, help="kills per signal and layout")
    parser.add_argument("--results", type=Path, default=Path("kills.json"), help="file to continue")
    parser.add_argument("--seed", type=int, default=None, help="of the moments")
    options = parser.parse_args()
    # A shell starts commands in the background (&) with SIGINT ignored, which runs would inherit.
    signal(SIGINT, default_int_handler)
    results: Results = {}
    if options.results.exists():
        results = json.loads(options.results.read_text("utf8"))
    chance = random.Random(options.seed)
    unharmed = {layout: train_unharmed(layout) for layout in LAYOUTS}
    todo = list(product(range(options.times), LAYOUTS, SIGNALS))
    for number, layout, name in tqdm(todo, desc="kills"):
        done = results.setdefault(f"{name} {layout}", [])
        if len(done) <= number:
            phase = list(PHASES)[number % len(PHASES)]
            done.append(kill_once(chance, Kill(name, layout, phase), unharmed[layout]))
            options.results.write_text(json.dumps(results, indent=1), "utf8")
    print(table(results))


def table(results: Results) -> str:
    """Return the kills as a table in Markdown."""
    rows = ["| signal | layout | kills | in which phases | resumed | longest end |"]
    rows.append("|---|---|---|---|---|---|")
    for name, stories in results.items():
        sent, layout = name.split()
        phases = [next(phase for phase in PHASES if f", {phase}," in story) for story in stories]
        counts = ", ".join(f"{phase} {phases.count(phase)}" for phase in PHASES)
        resumed = sum("resumed from" in story for story in stories)
        seconds = max(float(s.split("ended in ")[1].split(" s")[0]) for s in stories)
        rows.append(
            f"| {sent} | {layout} | {len(stories)} | {counts} | {resumed} | {seconds:.1f} s |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()

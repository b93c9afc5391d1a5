"""Kill ranks of a run at random times, and check that the job ends, reports why, and resumes.

    python scripts/kill_ranks.py --times 10 --seed 1

Every run trains the small language model of the tests on two stages, saving after every epoch.
After a random time in training one of its two ranks gets SIGKILL. Then within 30 s no process may
be left, the exit code must not be 0, one line must name the rank, and a run that is resumed from
`last.ckpt` must have the losses of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import random

import tests_path  # noqa: F401
from jobs import kill_once, train_unharmed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20, help="of two updates each")
    parser.add_argument("--seed", type=int, default=None, help="of the moments")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    unharmed, seconds = train_unharmed(options.epochs)
    print(f"unharmed: {len(unharmed)} updates, {seconds:.1f} s after the first")
    for i in range(options.times):
        print(f"{i + 1}: {kill_once(chance, unharmed, seconds)}", flush=True)


if __name__ == "__main__":
    main()

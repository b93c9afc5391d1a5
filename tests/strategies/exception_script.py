"""Ranks that Lightning starts all raise, and the script continues.

python exception_script.py FOLDER
"""

import sys
from pathlib import Path

import torch
from test_runs_end import TWO, run_twice

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    states = run_twice(TWO, folder)
    torch.save(states, folder / f"rank{torch.distributed.get_rank()}.pt")

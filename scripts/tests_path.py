"""Adds tests/ to the path: for scripts that share helpers with the tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

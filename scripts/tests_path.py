"""Adds tests/ to the path: for scripts that share helpers with the tests."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "strategies")]

"""Public names and our own flags change only together with surface.txt, where a review sees it."""

from pathlib import Path

from surface import surface

WRITTEN = Path(__file__).with_name("surface.txt")


def test_the_surface_is_the_one_that_is_written_down():
    """If a change is meant: python tests/surface.py > tests/surface.txt."""
    assert surface() == WRITTEN.read_text("utf8").splitlines()

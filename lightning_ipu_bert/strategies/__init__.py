"""Strategies: who runs the stages, and how Lightning sees it."""

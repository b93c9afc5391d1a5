"""Strategies that run the stages of a module under Lightning."""

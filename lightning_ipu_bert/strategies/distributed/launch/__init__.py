"""Launching and monitoring of ranks, and their signals."""

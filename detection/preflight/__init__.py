"""Checks before the timer starts, on one process and on all ranks."""

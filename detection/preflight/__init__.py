"""Checks made before the clock starts, on one process and on all ranks."""

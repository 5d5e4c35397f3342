"""Weights and checkpoints: read, write, and find the one to resume from."""

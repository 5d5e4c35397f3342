"""Scaling study: measured gradient exchange, and a model of the training step checked against published runs."""

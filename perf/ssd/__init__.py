"""Benchmarks of SSD300."""

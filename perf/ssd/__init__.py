"""Benchmarks of SSD300's parts."""

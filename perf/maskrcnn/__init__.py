"""Benchmarks of Mask R-CNN."""

"""Benchmarks of Mask R-CNN's parts."""

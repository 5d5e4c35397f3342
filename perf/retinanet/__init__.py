"""Benchmarks of RetinaNet next to torchvision's."""

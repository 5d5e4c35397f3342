"""Annotation files and image files to batches on the device."""

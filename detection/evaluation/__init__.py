"""Detections to COCO metrics, drawings, and predictions on a user's images."""

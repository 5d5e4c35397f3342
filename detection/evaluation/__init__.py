"""COCO metrics, visualizations, and predictions on a user's images."""

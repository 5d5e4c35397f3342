"""Durations as text, without torch so that the live view starts fast."""

import math


def format_hms(seconds: float) -> str:
    """Format seconds as h:mm:ss, or "?" if they are not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

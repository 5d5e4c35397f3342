"""Values of a report as text."""

import math
from datetime import UTC, datetime
from typing import Any


def format_metric(value: float | None) -> str:
    """Format a COCO metric, which is -1 if there is no ground truth."""
    return "" if value is None else "–" if value < 0 or math.isnan(value) else f"{value:.4f}"


def format_timestamp(text: str) -> str:
    """Format a date and time of metrics.jsonl to the second, in UTC."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:
        return text


def format_value(value: Any) -> str:
    """Format the value of a setting."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(format_value, value))
    return "–" if value is None or value == "" else str(value)


def format_percent(fraction: float) -> str:
    """Format a fraction as percent."""
    return f"{fraction:.1%}" if math.isfinite(fraction) else "–"


def format_rate(images_per_s: float) -> str:
    """Format images per second."""
    if not math.isfinite(images_per_s):
        return "–"
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def format_ratio(ratio: float) -> str:
    """Format a ratio."""
    return f"{ratio:.2f}×" if math.isfinite(ratio) else "–"


def format_duration(seconds: float) -> str:
    """Format seconds for people, such as 93.2 s or 10 min 27 s."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def percent_of(value: float, largest: float) -> float:
    """Return the length of a bar in percent of the longest."""
    return round(100 * max(0.0, min(1.0, value / largest)), 2) if math.isfinite(value) and largest > 0 else 0.0

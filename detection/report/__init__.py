"""HTML report and live view of runs."""

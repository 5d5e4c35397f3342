"""HTML report, plots and live view of runs."""

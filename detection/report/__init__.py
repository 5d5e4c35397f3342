"""The HTML report, its plots and the live view of runs."""

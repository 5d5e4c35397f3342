"""The rules: what a run must say and prove."""

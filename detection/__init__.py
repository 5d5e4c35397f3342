"""The run: how anything is trained here. Read engine.py first."""

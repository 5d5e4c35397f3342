"""Settings: declared, read from config files and flags, validated. Imports no torch."""

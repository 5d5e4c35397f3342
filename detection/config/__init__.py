"""Settings: declared, read from config files and flags, validated; imports no torch."""

"""Search for the fastest settings; writes a config file."""

"""Performance benchmarks and their recorded results."""

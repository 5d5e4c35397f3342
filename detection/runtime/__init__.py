"""Device, process group, CPU affinity, signals, watchdog and launcher."""

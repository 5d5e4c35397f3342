"""Training loop, its state, optimizers, timers and loggers, and the start and end of a run."""

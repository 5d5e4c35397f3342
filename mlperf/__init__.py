"""MLPerf's rules, log, official checkers, scores and submissions."""

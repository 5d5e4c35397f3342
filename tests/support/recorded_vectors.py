"""Conformance vectors that record which of them are read."""

from detection.evaluation.conformance import Vectors


def failed_results(suite, context):
    """Return the comparisons of a suite that fail."""
    return [r for compare in suite.comparisons for r in suite.results(compare, context) if not r.passed]


class RecordedVectors(Vectors):
    """Vectors that record which of them are read."""

    def __init__(self, vectors):
        super().__init__(vectors)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

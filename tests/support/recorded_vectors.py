"""Conformance vectors that record which of them are read."""

from detection.evaluation.conformance import Vectors


class RecordedVectors(Vectors):
    """Vectors that record which of them are read."""

    def __init__(self, vectors):
        super().__init__(vectors)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

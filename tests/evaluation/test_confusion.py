"""Counts of the confusion matrix."""

from collections import Counter

import numpy as np
import pytest

from detection.evaluation import confusion
from detection.evaluation.confusion import BACKGROUND, count_confusions
from samples import make_detection, make_split

BIG, SMALL = [0.0, 0, 40, 40], [60.0, 60, 80, 80]


def test_detections_count_by_object_class_and_score():
    split = make_split([(BIG, 1, False), (SMALL, 2, False)], [(SMALL, 2, False)])
    rows = [
        make_detection(10, BIG, 3, 0.97),
        make_detection(10, SMALL, 3, 0.51),  # the object is of the other class
        make_detection(10, BIG, 3, 0.32),  # a duplicate
        make_detection(11, BIG, 7, 1.0),  # no object
        make_detection(11, SMALL, 7, 0.04),  # below all thresholds
    ]
    result = count_confusions(split, rows)
    assert result["classes"] == ["disc", "square"]
    assert result["objects"] == [1, 2]
    assert result["counts"] == [[BACKGROUND, 1, 6, 1], [BACKGROUND, 2, 19, 1], [1, 1, 19, 1], [2, 1, 10, 1]]


def test_own_class_comes_before_a_higher_iou():
    split = make_split([(BIG, 1, False), ([0.0, 0, 40, 36], 2, False)])
    rows = [make_detection(10, [0.0, 0, 40, 36], 3, 0.9), make_detection(10, BIG, 7, 0.8)]
    assert count_confusions(split, rows)["counts"] == [[1, 1, 18, 1], [2, 2, 16, 1]]


def test_crowds_are_not_counted():
    split = make_split([([0.0, 0, 100, 100], 1, True)])
    rows = [make_detection(10, SMALL, 3, 0.9), make_detection(10, SMALL, 7, 0.7)]
    result = count_confusions(split, rows)
    assert result["objects"] == [0, 0]
    assert result["counts"] == [[BACKGROUND, 2, 14, 1]]


@pytest.mark.parametrize("threshold_bin", [4, 10, 15])
def test_counts_at_a_threshold_equal_those_of_the_detections_above_it(threshold_bin):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60, (12, 2))
    split = make_split(
        [(corner.tolist() + (corner + 30).tolist(), 1 + n % 2, False) for n, corner in enumerate(corners)]
    )
    rows = [
        make_detection(10, (split.boxes(0)[n % 12] + rng.normal(0, 5, 4)).tolist(), 3 + 4 * (n % 3 == 0), float(score))
        for n, score in enumerate(rng.random(60))
    ]
    threshold = threshold_bin / confusion.SCORE_BINS

    def matrix(counts):
        total = Counter()
        for gt, detected, score_bin, count in counts:
            if score_bin >= threshold_bin:
                total[gt, detected] += count
        return total

    above = [row for row in rows if row["score"] >= threshold]
    assert matrix(count_confusions(split, rows)["counts"]) == matrix(count_confusions(split, above)["counts"])
    assert len(matrix(count_confusions(split, above)["counts"])) >= 5

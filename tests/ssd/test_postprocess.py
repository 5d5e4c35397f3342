import torch

from detection.boxes import pairwise_iou
from ssd.anchors import make_anchors
from ssd.box_coder import decode
from ssd.postprocess import detect
from tiny_ssd import predictions


def detect_sequentially(boxes, scores, threshold=0.05, nms_threshold=0.5, max_detections=200):
    """Detect with sequential greedy NMS on one image: a list of (score, label, anchor), best first."""
    kept = []
    for label in range(1, scores.shape[1]):
        candidates = [
            a
            for a in scores[:, label].argsort(descending=True, stable=True)[:max_detections].tolist()
            if scores[a, label] > threshold
        ]
        while candidates:
            best, *rest = candidates
            kept.append((float(scores[best, label]), label, best))
            overlap = pairwise_iou(boxes[best : best + 1], boxes[rest])[0] if rest else []
            candidates = [a for a, iou in zip(rest, overlap, strict=True) if iou < nms_threshold]
    return sorted(kept, reverse=True)[:max_detections]


def test_detections_match_sequential_nms():
    anchors = make_anchors()
    for seed, peak in ((0, 6.0), (1, 4.0), (2, 3.0)):
        deltas, logits = predictions(seed, peak=peak)
        detections = detect(deltas, logits, anchors)
        for image in range(2):
            expected = detect_sequentially(decode(deltas[image], anchors), logits[image].softmax(-1))
            in_image = detections.batch_index == image
            assert in_image.sum() == len(expected) > 0
            assert detections.labels[in_image].tolist() == [label for _, label, _ in expected]
            boxes = decode(deltas[image], anchors)[[anchor for _, _, anchor in expected]]
            torch.testing.assert_close(detections.boxes_xyxy[in_image], boxes)


def test_scores_below_the_threshold_give_no_detections():
    deltas, logits = predictions(0)
    logits[..., 0] += 100
    detections = detect(deltas, logits, make_anchors())
    assert detections.boxes_xyxy.shape == (0, 4)
    assert len(detections.scores) == 0

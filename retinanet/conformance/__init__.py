"""Comparisons of RetinaNet with the numbers of the MLPerf reference, part by part."""

from detection.evaluation.conformance import ConformanceSuite
from retinanet.conformance import boxes, data, network, training

SUITE = ConformanceSuite(
    "RetinaNet",
    (
        boxes.compare_anchors,
        boxes.compare_matching,
        boxes.compare_losses,
        boxes.compare_decoding,
        data.compare_resizing,
        data.compare_prepared_boxes,
        training.compare_warmup,
        training.compare_adam,
        network.compare_netsmall,
        network.compare_net256,
        network.compare_pipeline,
        network.compare_net800,
    ),
    network.reference_network,
    network_comparisons=(
        training.compare_adam,
        network.compare_netsmall,
        network.compare_net256,
        network.compare_pipeline,
        network.compare_net800,
    ),
)

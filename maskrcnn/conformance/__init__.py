"""Comparisons of Mask R-CNN with the numbers of the MLPerf reference, part by part."""

from detection.evaluation.conformance import ConformanceSuite
from maskrcnn.conformance import data, heads, network, rpn, training

SUITE = ConformanceSuite(
    "Mask R-CNN",
    (
        rpn.compare_anchors,
        rpn.compare_rpn_targets,
        rpn.compare_rpn_losses,
        rpn.compare_proposals,
        heads.compare_box_targets,
        heads.compare_box_losses,
        heads.compare_sampling,
        heads.compare_roi_align,
        heads.compare_mask_targets,
        heads.compare_mask_losses,
        heads.compare_detections,
        heads.compare_pasting,
        data.compare_resizing,
        data.compare_transforms,
        data.compare_aspect_groups,
        data.compare_dataset,
        training.compare_learning_rates,
        training.compare_optimizer,
        training.compare_initialization,
        network.compare_network,
    ),
    network.reference_network,
    network_comparisons=(network.compare_network,),
)

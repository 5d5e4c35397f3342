"""Settings of a Mask R-CNN that trains in seconds, and predictions of its box head."""

import torch

from maskrcnn.rpn import Proposals

SMALL = {
    "BACKBONE": "resnet18",
    "FREEZE_AT": "0",
    "FREEZE_BATCH_NORM": "false",
    "BATCH_NORM_EPS": "1e-5",
    "MIN_IMAGE_SIZE": "96",
    "MAX_IMAGE_SIZE": "128",
    "RPN_POST_NMS_TOP_N_PER_IMAGE": "25",
    "RPN_POST_NMS_TOP_N_EVAL": "20",
    "BOX_BATCH_SIZE_PER_IMAGE": "16",
    "BATCH_SIZE": "2",
    "EVAL_BATCH_SIZE": "2",
    "NUM_WORKERS": "0",
    "LOG_EVERY": "1",
    "WARMUP_STEPS": "2",
    "EPOCHS": "1",
    "TARGET": "0",
    "MASK_TARGET": "0",
    "DATASET": "toy",
    "DIVISION": "open",
    "DEVICE": "cpu",
    "SEED": "7",
}

SIZES_HW = torch.tensor([[100, 120], [90, 120]])


def make_outputs(generator, num_proposals=60, num_classes=6):
    """Return logits, deltas and proposals of two images, the last proposals of the second image being padding."""
    corners = torch.rand(2, num_proposals, 2, generator=generator) * 80
    boxes = torch.cat([corners, corners + 5 + 30 * torch.rand(corners.shape, generator=generator)], dim=2)
    valid = torch.ones(2, num_proposals, dtype=torch.bool)
    valid[1, 40:] = False
    logits = 2 * torch.randn(2, num_proposals, num_classes, generator=generator)
    logits[:, 1::2] = logits[:, ::2]  # equal scores
    return (
        logits,
        torch.randn(2, num_proposals, num_classes, 4, generator=generator),
        Proposals(boxes, logits[..., 0], valid),
    )

"""Parts of networks that workloads share: box coder, matcher, NMS, residual blocks and feature pyramid."""

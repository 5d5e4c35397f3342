"""Parts of networks that workloads share: box coder, matcher, residual blocks and feature pyramid."""

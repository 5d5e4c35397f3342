"""Parts of networks that workloads share: box coder, matcher and residual blocks."""

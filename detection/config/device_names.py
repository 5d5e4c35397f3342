"""The kinds of device that are known by name. Imports no torch, so that the settings can say them at once."""

# Those that torch or a vendor's package adds, with the library that moves tensors between them; None is not known.
COLLECTIVES = {"cuda": "nccl", "mlu": "cncl", "npu": "hccl", "xpu": "xccl", "mps": None}

KINDS = tuple(COLLECTIVES)

HELP = f"auto, cpu, {', '.join(KINDS)}, or what a package adds to torch; auto takes the accelerator there is"

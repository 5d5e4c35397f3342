"""Device types that are known by name. Imports no torch, so that settings load quickly."""

# Device types of torch and of vendor packages, each with its collective library. None: unknown.
COLLECTIVE_BACKENDS = {"cuda": "nccl", "mlu": "cncl", "npu": "hccl", "xpu": "xccl", "mps": None}

DEVICE_TYPES = tuple(COLLECTIVE_BACKENDS)

DEVICE_HELP = f"auto, cpu, {', '.join(DEVICE_TYPES)}, or a vendor package's type; auto: the accelerator, if any"

"""RetinaNet that is small enough for tests."""

from retinanet.config import Config, load

SMALL = {
    "DATASET": "toy",
    "DIVISION": "open",
    "DEVICE": "cpu",
    "PRECISION": "fp32",
    "BACKBONE": "resnet18",
    "FREEZE_AT": "0",
    "FREEZE_BATCH_NORM": "false",
    "PYRAMID_CHANNELS": "64",
    "IMAGE_SIZE": "128",
    "ANCHOR_SIZES": "16,32,64,128,256",
    "BATCH_SIZE": "2",
    "EVAL_BATCH_SIZE": "2",
    "EPOCHS": "1",
    "EVAL_EPOCHS": "1",
    "NUM_WORKERS": "0",
    "LOG_EVERY": "1",
    "SEED": "3",
    "TARGET": "0",
}


def make_config(*flags: str) -> Config:
    """Return small settings for 3 categories, changed by flags."""
    environment = {f"RETINANET_{name}": value for name, value in SMALL.items()}
    return load(["--num-classes", "4", *flags], environment).config

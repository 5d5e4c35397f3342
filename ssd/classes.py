"""How many classes the network tells apart: as many as the annotations have, and the background."""

from dataclasses import replace

from detection import coco
from detection.config import InputError
from ssd.config import COCO_CLASSES, Config


def followed(config: Config) -> Config:
    """The settings with their number of classes, that of the annotations where none is set, COCO's where none are read.

    ./run_and_time.sh sets it to what its checks found, in a process of their own: MLPerf forbids the one that is timed
    to touch the data before its clock. Raises InputError where the annotations cannot be read.
    """
    if config.num_classes:
        return config
    if not config.reads_data:
        return replace(config, num_classes=COCO_CLASSES)
    annotation_file, _ = coco.files(config, config.reads_data[0])
    return replace(config, num_classes=1 + len(coco.read_categories(annotation_file)))


def check(config: Config, split: coco.Split) -> None:
    """Raise InputError where a number of classes is set that is not that of the annotations."""
    if config.num_classes in (0, split.num_classes):
        return
    raise InputError(
        f"{split.annotation_file} has {len(split.categories)} categories: with the background num_classes is "
        f"{split.num_classes}, not {config.num_classes}. Pass --num-classes {split.num_classes}, or, for data that "
        "are not COCO 2017, --dataset with a name of theirs"
    )

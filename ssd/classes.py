"""How many classes the network tells apart: as many as the training annotations have, and the background."""

from dataclasses import replace

from detection import coco
from detection.config import InputError
from ssd.config import Config


def followed(config: Config) -> Config:
    """The settings with their number of classes, that of the training annotations where none is set.

    ./run_and_time.sh sets it to what its checks found, in a process of their own: MLPerf forbids the one that is timed
    to touch the data before its clock. Raises InputError where the annotations cannot be read.
    """
    if config.num_classes:
        return config
    annotation_file, _ = coco.files(config, "train")
    return replace(config, num_classes=1 + len(coco.read_categories(annotation_file)))


def check(config: Config, train: coco.Split) -> None:
    """Raise InputError where a number of classes is set that is not that of the training annotations."""
    if config.num_classes in (0, train.num_classes):
        return
    raise InputError(
        f"{train.annotation_file} has {len(train.categories)} categories: with the background num_classes is "
        f"{train.num_classes}, not {config.num_classes}. Pass --num-classes {train.num_classes}, or, for data that "
        "are not COCO 2017, --dataset with a name of theirs"
    )

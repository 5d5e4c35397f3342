"""How many classes the network tells apart: as many as the annotations have, and the background."""

from dataclasses import replace
from typing import TypeVar

from detection.config.run_config import COCO_CLASSES, RunConfig
from detection.data import coco

Config = TypeVar("Config", bound=RunConfig)


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

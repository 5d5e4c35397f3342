"""Classes of the network: the categories of the annotations plus background."""

from dataclasses import replace
from typing import TypeVar

from detection.config.run_config import COCO_NUM_CLASSES, RunConfig
from detection.data import coco

Config = TypeVar("Config", bound=RunConfig)


def resolve_num_classes(config: Config) -> Config:
    """Return the settings with `num_classes` set: from the annotations, or COCO's if the run reads none.

    ./run_and_time.sh sets it after its preflight checks, which run in another process: MLPerf forbids the timed
    process to touch the data before its timer starts. Raises InputError if the annotations are unreadable.
    """
    if config.num_classes:
        return config
    if not config.required_splits:
        return replace(config, num_classes=COCO_NUM_CLASSES)
    return replace(config, num_classes=1 + len(read_categories(config)))


def read_categories(config: RunConfig) -> tuple[coco.Category, ...]:
    """Return the categories of the annotations, or none if the run reads none. Raises InputError if unreadable."""
    if not config.required_splits:
        return ()
    annotation_file, _ = coco.dataset_paths(config, config.required_splits[0])
    return coco.read_categories(annotation_file)

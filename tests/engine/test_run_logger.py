"""Lines of a run on the terminal."""

from tqdm import tqdm

from detection.engine.run_logger import BAR_FORMAT, format_metrics
from detection.evaluation.coco_metric import COCO_STATS


def test_bar_fits_80_columns():
    text = tqdm.format_meter(
        n=500, total=1000, elapsed=18000, prefix="epoch 100/100", postfix="loss 12.345, 12345.6 img/s",
        bar_format=BAR_FORMAT,
    )  # fmt: skip
    assert "5:00:00 to evaluation" in text
    assert len(text) <= 80


def test_metrics_are_one_row_for_boxes_and_one_for_masks():
    metrics = dict.fromkeys(COCO_STATS, 0.25) | {f"mask_{name}": 0.5 for name in COCO_STATS} | {"mask_APl": -1.0}
    heading, box, mask = format_metrics(metrics).splitlines()
    assert heading.split() == list(COCO_STATS)
    assert box.split() == ["box", *["0.250"] * 12]
    assert mask.split() == ["mask", *["0.500"] * 5, "-", *["0.500"] * 6]
    assert max(map(len, (heading, box, mask))) <= 80

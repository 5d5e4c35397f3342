"""Layer tables of --model-summary for every workload."""

import re

import pytest

import commands
import maskrcnn.config
import maskrcnn.model
import retinanet.config
import retinanet.model
import ssd.config
import ssd.model
from detection.engine.model_summary import summarize_model
from detection.engine.optim import freeze_batch_norm

SSD, MASKRCNN = (ssd.config, ssd.model), (maskrcnn.config, maskrcnn.model)
RETINANET = (retinanet.config, retinanet.model)
CLASSES = ("--num-classes", "5")
SMALL = (*CLASSES, "--backbone", "resnet18")


def rows_of(table):
    """Parse a table into kind, shapes, number of parameters and status, by layer name."""
    rows = [re.split(r" {2,}", line) for line in table.splitlines()[1:-2]]
    return {row[0]: (row[1], row[2], int(row[3].replace(",", "")), row[4]) for row in rows}


@pytest.mark.parametrize(
    ("benchmark", "flags"),
    [(SSD, CLASSES), (MASKRCNN, (*SMALL, "--batch-norm-eps", "1e-5")), (RETINANET, SMALL)],
)
@pytest.mark.parametrize("freeze", [True, False])
def test_every_parameter_is_counted_once(benchmark, flags, freeze):
    config, model = benchmark
    settings = config.load([*flags, f"--{'' if freeze else 'no-'}freeze-batch-norm"], {}).config
    table = summarize_model(model.make_model, settings)
    real = model.make_model(settings)
    if freeze:
        freeze_batch_norm(real)
    counts = {True: 0, False: 0}
    for parameter in real.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    rows = rows_of(table)
    for status, requires_grad in (("trained", True), ("frozen", False)):
        assert sum(row[2] for row in rows.values() if row[3] == status) == counts[requires_grad]
    assert table.splitlines()[-1] == (
        f"{settings.network_name} for 5 classes: {len(rows)} layers, {sum(counts.values()):,} parameters, "
        f"{counts[True]:,} trained and {counts[False]:,} frozen"
    )


def test_rows_have_name_kind_and_shapes():
    rows = rows_of(summarize_model(maskrcnn.model.make_model, maskrcnn.config.load(SMALL, {}).config))
    assert rows["backbone.body.conv1"] == ("Conv2d", "64×3×7×7", 64 * 3 * 49, "frozen")
    assert rows["box_head.predictor.cls_score"] == ("Linear", "5×1024 + 5", 5 * 1025, "trained")
    assert rows["backbone.body.layer4.1.bn1"] == ("BatchNorm2d", "512 + 512", 1024, "frozen")


@pytest.mark.parametrize("command", [commands.ssd, commands.maskrcnn])
@pytest.mark.parametrize(("dataset", "classes"), [("coco2017", 81), ("toy", 4), ("synthetic_coco", 81)])
def test_summary_needs_no_data_set(command, dataset, classes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATADIR", str(tmp_path / "none"))
    assert command("summary", "--dataset", dataset) == 0
    out, err = capsys.readouterr()
    assert f"for {classes} classes" in out.splitlines()[-1]
    assert err == ""
    assert not (tmp_path / "none").exists()


def test_summary_of_retinanet_has_the_references_parameters(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATADIR", str(tmp_path / "none"))
    assert commands.retinanet("summary") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("retinanet-resnext50_32x4d-fpn for 265 classes")
    assert "36,849,004 trained" in last


def test_number_of_classes_comes_from_the_annotations(four_image_coco, monkeypatch, capsys):
    monkeypatch.setenv("DATADIR", str(four_image_coco))
    assert commands.ssd("summary", "--dataset", "mine") == 0
    assert "for 4 classes" in capsys.readouterr().out


def test_settings_error_is_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATADIR", str(tmp_path / "none"))
    for flags, message in (
        (["--batch-sise", "4"], "--batch-sise"),
        (["--dataset", "mine"], f"DATADIR={tmp_path / 'none'}"),
    ):
        assert commands.ssd("summary", *flags) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert err.count("\n") == 1

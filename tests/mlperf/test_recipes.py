"""Recipes for any global batch: published ones are reproduced, and interpolated ones follow the rules."""

import pytest

from config_files import exported
from detection.preflight import run_checks
from detection.tuning.config_file import to_flags
from maskrcnn import commands as maskrcnn_commands
from maskrcnn import config as maskrcnn_config
from mlperf import recipes
from retinanet import commands as retinanet_commands
from retinanet import config as retinanet_config
from ssd import commands as ssd_commands
from ssd import config as ssd_config


@pytest.mark.parametrize(("system", "ranks"), [("CPU", 1), ("DGX1", 8), ("DGXA100", 8), ("DGXA100_multi_2x8x56", 16)])
def test_published_batch_has_recipe_of_its_config_file(system, ranks):
    env = {name: value for name, value in exported(system).items() if name.startswith("SSD_")}
    config = ssd_config.load([], env).config
    settings = ssd_commands.recipe_settings(recipes.interpolate_recipe("ssd", config.global_batch_size(ranks)))
    tuned = ssd_config.load(to_flags(settings), {"SSD_BATCH_SIZE": str(config.batch_size)}).config
    for name in settings:
        assert getattr(tuned, name) == getattr(config, name), name
    assert tuned.peak_lr(ranks) == config.peak_lr(ranks)


@pytest.mark.parametrize("batch", [1, 8, 48, 128, 500, 900, 1000, 1100, 1300, 1536, 1800, 2048, 3000, 4096])
def test_ssd_recipe_of_any_batch_follows_every_rule(batch):
    words = to_flags(ssd_commands.recipe_settings(recipes.interpolate_recipe("ssd", batch)))
    words += ["--batch-size", str(batch), "--eval-epochs", "every 5", "--pretrained-backbone", "resnet34.pth"]
    config = ssd_config.load(words, {}).config
    assert run_checks.check_rules(config, ssd_commands.rule_values(config, 1), 1)[1] == []


@pytest.mark.parametrize("batch", [4, 16, 40, 48, 56, 64, 96, 112, 128, 192, 256])
def test_maskrcnn_recipe_of_any_batch_follows_every_rule(batch):
    words = to_flags(maskrcnn_commands.recipe_settings(recipes.interpolate_recipe("maskrcnn", batch)))
    config = maskrcnn_config.load([*words, "--batch-size", str(batch), "--pretrained-backbone", "R-50.pkl"], {}).config
    broken = run_checks.check_rules(config, maskrcnn_commands.rule_values(config, 1), 1)[1]
    assert broken == []


def test_maskrcnn_has_decay_steps_of_submissions():
    schedules = {}
    for batch in (48, 64, 96):
        words = to_flags(maskrcnn_commands.recipe_settings(recipes.interpolate_recipe("maskrcnn", batch)))
        config = maskrcnn_config.load([*words, "--batch-size", str(batch)], {}).config
        schedules[batch] = (config.peak_lr(1), config.warmup_steps, config.decay_steps(1))
    assert schedules == {
        48: (0.06, 625, (24000, 32000)),
        64: (0.08, 800, (18000, 24000)),
        96: (0.12, 625, (12000, 16000)),
    }


@pytest.mark.parametrize("batch", [1, 32, 64, 100, 192, 256, 640, 700, 768, 2000, 4096])
def test_retinanet_recipe_of_any_batch_follows_every_rule(batch):
    words = to_flags(retinanet_commands.recipe_settings(recipes.interpolate_recipe("retinanet", batch)))
    words += ["--batch-size", str(batch), "--pretrained-backbone", "resnext50_32x4d.pth"]
    config = retinanet_config.load(words, {}).config
    assert run_checks.check_rules(config, retinanet_commands.rule_values(config, 1), 1)[1] == []


@pytest.mark.parametrize("system", ["DGXH100", "H200"])
def test_retinanet_has_the_recipe_of_its_config_files(system):
    env = {name: value for name, value in exported(f"{system}_retinanet").items() if name.startswith("RETINANET_")}
    config = retinanet_config.load([], env).config
    recipe = recipes.interpolate_recipe("retinanet", 256)
    assert (config.base_lr, config.warmup_epochs) == (recipe.base_lr, recipe.warmup)


def test_recipe_between_two_batches_is_interpolated():
    recipe = recipes.interpolate_recipe("ssd", 1774)  # the logarithmic mean of 1536 and 2048
    assert recipe.warmup == pytest.approx((200 + 1489) / 2, abs=3)
    assert recipe.base_lr == pytest.approx((2.5e-3 + 4.57e-3) / 2, abs=1e-5)
    assert recipe.decay_k == 3
    assert "(1536)" in recipe.source
    assert "(2048)" in recipe.source
    assert "the nearest" in recipes.interpolate_recipe("ssd", 8).source
    assert recipes.interpolate_recipe("ssd", 8).base_lr == 2.5e-3
    assert recipes.interpolate_recipe("ssd", 8192).warmup == 1145


@pytest.mark.parametrize(
    ("ruleset", "batch", "epochs"),
    [("1.1.0", 32, 50), ("1.1.0", 1280, 52.5), ("1.0.0", 1536, 56.17), ("1.1.0", 4096, 87), ("1.1.0", 4097, None),
     ("0.7.0", 912, 50)],
)  # fmt: skip
def test_expected_epochs_are_interpolated_between_reference_points(ruleset, batch, epochs):
    assert recipes.reference_epochs("ssd", ruleset, batch) == (epochs and pytest.approx(epochs, abs=0.01))

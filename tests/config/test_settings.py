import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from config_files import exported
from detection.checkpoint.backbone_urls import BACKBONE_FILES
from detection.config.settings import InputError, RankInfo, format_settings, read_launch_layout, read_rank_info, to_json
from paths import ROOT
from ssd.config import Config, load

SYSTEMS = sorted(
    path.stem.removeprefix("config_")
    for path in ROOT.glob("config_*.sh")
    if not path.stem.endswith(("_maskrcnn", "_retinanet"))
)


def settings(*argv: str, **environ: str) -> Config:
    return load(argv, environ).config


def load_error(*argv: str, **environ: str) -> str:
    with pytest.raises(InputError) as caught:
        load(argv, environ)
    return str(caught.value)


def test_flags_override_the_environment_which_overrides_defaults():
    resolved = load(["--batch-size", "8"], {"SSD_BATCH_SIZE": "16", "SSD_EPOCHS": "7"})
    assert (resolved.config.batch_size, resolved.config.epochs, resolved.config.momentum) == (8, 7, 0.9)
    assert resolved.sources["batch_size"] == "--batch-size"
    assert resolved.sources["epochs"] == "SSD_EPOCHS"
    assert resolved.sources["momentum"] == "default"


def test_an_empty_variable_counts_as_unset():
    assert settings(SSD_BATCH_SIZE="", DATADIR="") == Config()


def test_an_empty_flag_overrides_the_environment():
    assert settings("--pretrained-backbone", "", SSD_PRETRAINED_BACKBONE="weights.pth").pretrained_backbone == ""


def test_a_setting_with_a_custom_variable_is_read_from_it():
    assert settings(DATADIR="/data", LOGDIR="/logs", DGXSYSTEM="DGX1").data_dir == Path("/data")
    assert "Did you mean DATADIR?" in load_error(SSD_DATA_DIR="/data")


@pytest.mark.parametrize(("word", "value"), [("1", True), ("true", True), ("0", False), ("no", False)])
def test_a_boolean_is_a_word_in_the_environment_and_a_pair_of_flags(word, value):
    assert settings(SSD_JITTER=word).jitter is value
    assert settings("--jitter" if value else "--no-jitter").jitter is value


def test_lists_are_comma_separated():
    assert settings(SSD_LR_DECAY_EPOCHS="40, 50").lr_decay_epochs == (40, 50)
    assert settings("--lr-decay-epochs", "48").lr_decay_epochs == (48,)


@pytest.mark.parametrize("text", ["every 5", "every-5", "every5"])
def test_eval_epochs_accept_an_interval(text):
    assert settings("--eval-epochs", text, "--epochs", "12").eval_epochs == (5, 10)


def test_a_seed_can_be_unset():
    assert settings(SSD_SEED="3").seed == 3
    assert settings("--seed", "none", SSD_SEED="3").seed is None


def test_an_unknown_variable_is_rejected_with_the_closest_name():
    assert load_error(SSD_BATCHSIZE="8") == "SSD_BATCHSIZE=8: unknown setting. Did you mean SSD_BATCH_SIZE?"
    assert "unknown setting" in load_error(SSD_QQQ="8")
    assert settings(BATCH_SIZE="8", SSDS="1") == Config()


def test_an_unknown_flag_is_rejected_with_the_closest_name():
    assert load_error("--batchsize", "8") == "--batchsize: unknown setting. Did you mean --batch-size?"
    assert load_error("--batchsize=8") == "--batchsize=8: unknown setting. Did you mean --batch-size?"
    assert "--batch: unknown setting" in load_error("--batch", "8")
    assert "--name value" in load_error("8")


def test_a_flag_without_a_value_is_rejected():
    assert "--batch-size" in load_error("--batch-size")


def test_all_errors_are_reported_at_once():
    message = load_error("--batchsize", "8", "--epochs", "0", SSD_X="1", SSD_TARGET="half", SSD_BASE_LR="nan")
    for part in ("--batchsize", "--epochs=0", "SSD_X=1", "SSD_TARGET=half", "SSD_BASE_LR=nan"):
        assert part in message
    assert len(message.splitlines()) == 5


def test_epochs_must_be_in_ascending_order():
    message = load_error("--lr-decay-epochs", "55,44", "--eval-epochs", "5,5")
    assert sorted(message.splitlines()) == [
        "--eval-epochs=5,5: should be in ascending order",
        "--lr-decay-epochs=55,44: should be in ascending order",
    ]


def test_grad_accum_steps_must_divide_the_batch_size():
    assert load_error("--grad-accum-steps", "5") == "grad_accum_steps 5 should divide batch_size 32"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch-size", "0"),
        ("--batch-size", "1.5"),
        ("--grad-accum-steps", "0"),
        ("--base-lr", "0"),
        ("--base-lr", "inf"),
        ("--warmup-steps", "-1"),
        ("--lr-decay-epochs", "0,5"),
        ("--lr-decay-epochs", "a"),
        ("--eval-epochs", "every 0"),
        ("--momentum", "1"),
        ("--weight-decay", "-1e-4"),
        ("--target", "1"),
        ("--max-samples", "0"),
        ("--precision", "fp8"),
        ("--ruleset", "2.0.0"),
        ("--division", "ajar"),
        ("--num-classes", "1"),
        ("--seed", "-1"),
        ("--device", "CUDA 1"),
        ("--system", "../x"),
        ("--org", "a,b"),
        ("--num-workers", "-1"),
    ],
)
def test_an_invalid_value_is_reported_with_its_flag(flag, value):
    assert load_error(f"{flag}={value}").startswith(f"{flag}={value}: ")


@pytest.mark.parametrize(
    ("base_lr", "batch_size", "peak"), [(2.92e-3, 120, 0.0875), (3.2e-3, 114, 0.09), (1e-5, 1, 2.5e-3)]
)
def test_peak_lr_matches_the_logs_of_the_submissions(base_lr, batch_size, peak):
    assert Config(base_lr=base_lr, batch_size=batch_size, lr_round_to=2.5e-3).peak_lr(world_size=8) == peak


def test_peak_lr_is_linear_in_the_global_batch_size():
    config = Config(batch_size=64, grad_accum_steps=4)
    assert config.global_batch_size(4) == 256
    assert config.peak_lr(4) == pytest.approx(2.5e-3 * 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mode", "evaluate"), "Pass --weights FILE"),
        (("--mode", "bench-train", "--resume", "auto"), "does not resume"),
        (("--mode", "bench-infer", "--eval-before-training"), "--eval-before-training requires --mode train"),
        (("--mode", "training"), "--mode=training: should be"),
    ],
)
def test_invalid_mode_combinations_are_rejected(flags, message):
    assert message in load_error(*flags)


def test_eval_blocks_lie_between_scheduled_evaluations():
    assert Config().eval_blocks() == [
        range(1, 41), range(41, 51), range(51, 56), range(56, 61),
        range(61, 66), range(66, 71), range(71, 76), range(76, 81),
    ]  # fmt: skip


@pytest.mark.parametrize("eval_epochs", [(2, 4), (2, 4, 5), (2, 4, 9)])
def test_eval_blocks_cover_every_epoch_once_and_end_with_the_last(eval_epochs):
    assert Config(epochs=5, eval_epochs=eval_epochs).eval_blocks() == [range(1, 3), range(3, 5), range(5, 6)]


def test_batch_norm_spans_a_micro_batch():
    values = Config(batch_size=32, grad_accum_steps=4).hyperparameters(world_size=2)
    assert (values["model_bn_span"], values["global_batch_size"]) == (8, 64)


def test_the_default_run_folder_contains_system_and_start_time():
    assert settings(DGXSYSTEM="H200", LOGDIR="/logs").run_folder("then") == Path("/logs/H200/ssd/then")
    assert settings(RUN_DIR="/here").run_folder("then") == Path("/here")


def test_a_configuration_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().batch_size = 3  # type: ignore[misc]


def test_json_contains_every_setting_and_round_trips():
    config = settings("--seed", "3", "--eval-epochs", "every 20", DATADIR="/data")
    content = json.loads(to_json(config))
    assert list(content) == [field.name for field in dataclasses.fields(Config)]
    assert Config(**content) == config


def test_help_lists_every_flag_and_its_variable(capsys):
    with pytest.raises(SystemExit) as caught:
        load(["--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
    for variable in ("SSD_BATCH_SIZE", "DATADIR", "DGXSYSTEM", "RUN_DIR", "images per accelerator"):
        assert variable in text


def test_the_settings_table_shows_the_source_of_each_value():
    rows = format_settings(load(["--batch-size", "8"], {"SSD_EPOCHS": "7"})).splitlines()
    assert len(rows) == len(dataclasses.fields(Config))
    assert any(row.split()[:2] == ["batch_size", "8"] and row.endswith("--batch-size") for row in rows)
    assert any(row.split()[:2] == ["epochs", "7"] and row.endswith("SSD_EPOCHS") for row in rows)


def test_settings_load_without_torch():
    program = "import sys, ssd.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_a_process_without_a_launcher_is_a_single_rank():
    assert read_rank_info({}) == RankInfo(rank=0, local_rank=0, world_size=1, local_world_size=1)


def test_rank_info_comes_from_torchrun():
    environ = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    topology = read_rank_info(environ)
    assert (topology.rank, topology.local_rank, topology.world_size, topology.num_nodes) == (5, 1, 8, 2)


@pytest.mark.parametrize("environ", [{"RANK": "1"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "two"}])
def test_invalid_rank_info_is_rejected(environ):
    with pytest.raises(InputError, match=next(iter(environ))):
        read_rank_info(environ)


def test_world_size_counts_the_ranks_of_all_nodes():
    assert read_launch_layout({"DGXNNODES": "2", "DGXNGPU": "8"}).world_size == 16
    with pytest.raises(InputError, match="DGXNGPU=0"):
        read_launch_layout({"DGXNGPU": "0"})


@pytest.mark.parametrize("system", SYSTEMS)
def test_config_files_contain_only_known_settings(system):
    environ = exported(system)
    config = load([], environ).config
    assert config.system == system
    nodes, _, _ = (system.rpartition("_")[2] if "multi" in system else "1x").partition("x")
    assert read_launch_layout(environ).num_nodes == int(nodes)
    assert environ["WALLTIME"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_config_files_allow_overriding_folders_and_ranks(system):
    environ = exported(system, DATADIR="/here", DGXNGPU="3", PRETRAINED_DIR="/weights")
    assert load([], environ).config.data_dir == Path("/here")
    assert read_launch_layout(environ).ranks_per_node == 3
    if system not in ("toy", "synthetic_coco"):
        config = load([], environ).config
        assert config.pretrained_backbone == f"/weights/{BACKBONE_FILES[config.backbone_name]}"


@pytest.mark.parametrize(
    ("system", "global_batch_size", "peak_lr", "weight_decay"),
    [
        ("DGX1", 960, 0.0875, 1.6e-4),
        ("V100_1x8", 960, 0.0875, 1.6e-4),
        ("BI-V100_1x8", 960, 0.0875, 1.6e-4),
        ("DGXA100", 912, 0.09, 1.3e-4),
        ("NF5488", 912, 0.09, 1.3e-4),
    ],
)
def test_config_files_match_the_recipes_of_the_submissions(system, global_batch_size, peak_lr, weight_decay):
    environ = exported(system)
    config, world_size = load([], environ).config, read_launch_layout(environ).world_size
    assert config.global_batch_size(world_size) == global_batch_size
    assert config.peak_lr(world_size) == peak_lr
    assert (config.weight_decay, config.warmup_steps, config.lr_decay_epochs) == (weight_decay, 650, (44, 55))


@pytest.mark.parametrize(("system", "ranks"), [("MLU370_1x1", 1), ("MLU370_1x4", 4)])
def test_cambricon_config_files_use_the_ssd300_v1_1_recipe(system, ranks):
    environ = exported(system)
    config = load([], environ).config
    assert read_launch_layout(environ).world_size == ranks
    assert config.peak_lr(ranks) == pytest.approx(2.6e-3 * ranks)
    assert (config.epochs, config.lr_decay_epochs, config.warmup_steps) == (65, (43, 54), 300)
    assert (config.device, config.precision, config.weight_decay) == ("mlu", "fp16", 5e-4)


@pytest.mark.parametrize("system", ["BI-V100_1x8", "MLU370_1x1", "MLU370_1x4", "V100_1x8"])
def test_vendor_config_files_set_vendor_defaults_that_users_can_override(system):
    environ = exported(system)
    assert environ["RESET_COMMAND"] == ""
    assert {"SSD_DEVICE", "SSD_PRECISION", "SSD_OPTIMIZER_BACKEND"} <= environ.keys()
    visible = "MLU_VISIBLE_DEVICES" if "MLU" in system else "CUDA_VISIBLE_DEVICES"
    assert len(environ[visible].split(",")) == read_launch_layout(environ).ranks_per_node
    assert exported(system, **{visible: "3", "RESET_COMMAND": "reset it"})[visible] == "3"
    assert exported(system, RESET_COMMAND="reset it")["RESET_COMMAND"] == "reset it"


CUSTOM_DATA = ("--train-images", "a", "--train-annotations", "b", "--val-images", "c", "--val-annotations", "d")


def test_custom_data_flags_replace_the_data_of_the_config_file():
    assert settings(*CUSTOM_DATA, SSD_DATASET="toy").dataset == "custom"
    assert settings(*CUSTOM_DATA).num_classes == 0
    assert settings(*CUSTOM_DATA, "--dataset", "coco2017").num_classes == 81
    assert settings(
        SSD_DATASET="cells", **{f"SSD_{name[2:].replace('-', '_').upper()}": "x" for name in CUSTOM_DATA[::2]}
    )


def test_generated_datasets_exclude_custom_paths():
    assert "--dataset toy is generated" in load_error(*CUSTOM_DATA, "--dataset", "toy")


def test_a_single_class_is_rejected():
    assert "the background is not a category" in load_error("--num-classes", "1")
    assert settings("--dataset", "mine").num_classes == 0


@pytest.mark.parametrize("system", [system for system in SYSTEMS if system.startswith("SSD300v1.1")])
def test_ssd300_v1_1_config_files_match_its_recipe(system):
    config = load([], exported(system)).config
    assert (config.network_name, config.backbone_name, config.extras_batch_norm) == ("ssd300-r50", "resnet50", True)
    assert (config.base_lr, config.epochs, config.lr_decay_epochs) == (2.6e-3, 65, (43, 54))
    assert config.eval_epochs == (21, 31, 37, 42, 48, 53, 59, 64)
    assert (config.weight_decay, config.weight_decay_on_bias_and_norm, config.warmup_steps) == (5e-4, False, 300)
    assert config.division == "open"


def test_the_default_backbone_depends_on_the_network():
    assert settings().network_name == "ssd300-r34"
    assert settings("--network", "ssd300-r50").backbone_name == "resnet50"
    assert settings("--network", "ssd300-r50", "--backbone", "resnet101").network_name == "ssd300-r50 on resnet101"
    assert "--backbone=vgg16" in load_error("--backbone", "vgg16")


def test_former_name_suggests_the_new_one():
    assert load_error("--trunk", "resnet18") == "--trunk: unknown setting. Did you mean --backbone?"
    assert load_error(SSD_SGD="apex") == "SSD_SGD=apex: unknown setting. Did you mean SSD_OPTIMIZER_BACKEND?"


def test_help_of_a_topic_shows_its_settings_with_the_values_of_the_system(capsys):
    with pytest.raises(SystemExit):
        load(["--help", "evaluation"], {"SSD_TARGET": "0.125"})
    shown = capsys.readouterr().out
    assert "default 0.125" in shown
    assert "--batch-size" not in shown
    with pytest.raises(InputError, match=r"--help foo: unknown topic. Topics: run, data"):
        load(["--help", "foo"], {})

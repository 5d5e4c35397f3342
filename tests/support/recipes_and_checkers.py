"""Recipes of published runs, and rule files of the official checker."""

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mlperf.rules import BENCHMARKS

CHECKER = files("mlperf_logging") / "compliance_checker"


DGX1 = {
    "global_batch_size": 960,
    "model_bn_span": 120,
    "opt_base_learning_rate": 0.0876,
    "opt_weight_decay": 1.6e-4,
    "opt_learning_rate_warmup_steps": 650,
    "opt_learning_rate_warmup_factor": 0,
    "opt_learning_rate_decay_boundary_epochs": (44, 55),
    "max_samples": 1,
    "gradient_accumulation_steps": 1,
    "eval_accuracy": 0.23,
    "dataset": "coco2017",
    "network": "ssd300-r34",
    "weights": "none",
    "pretrained_backbone": "resnet.pth",
    "seed": "none",
}


A100 = {
    "global_batch_size": 96,
    "opt_base_learning_rate": 0.12,
    "opt_learning_rate_warmup_steps": 625,
    "opt_learning_rate_warmup_factor": 0.000192,
    "opt_learning_rate_decay_factor": 0.1,
    "opt_learning_rate_decay_steps": (12000, 16000),
    "batch_size": 6,
    "num_image_candidates": 6000,
    "min_image_size": 800,
    "max_image_size": 1333,
    "gradient_accumulation_steps": 1,
    "eval_accuracy": {"BBOX": 0.377, "SEGM": 0.339},
    "dataset": "coco2017",
    "weights": "none",
    "pretrained_backbone": "resnet.pth",
    "seed": "none",
}


H200 = {
    "global_batch_size": 256,
    "opt_name": "adam",
    "opt_base_learning_rate": 8.5e-5,
    "opt_weight_decay": 0.0,
    "opt_learning_rate_warmup_epochs": 0,
    "opt_learning_rate_warmup_factor": 0.001,
    "gradient_accumulation_steps": 1,
    "eval_accuracy": 0.34,
    "dataset": "openimages-mlperf",
    "weights": "none",
    "pretrained_backbone": "resnext50.pth",
    "seed": "none",
}


RECIPES = {"ssd": DGX1, "maskrcnn": A100, "retinanet": H200}
RULESETS_BY_BENCHMARK = [(benchmark, ruleset) for benchmark, rules in BENCHMARKS.items() for ruleset in rules.names]


@cache
def checker_yaml(name: str) -> list[dict[str, Any]]:
    checks: list[dict[str, Any]] = yaml.load((CHECKER / name).read_text(), Loader=yaml.BaseLoader)
    return checks


def parameters_of_ssd300_r34() -> list[str]:
    both = ("weight", "bias")
    names = ["backbone.conv1.weight", *(f"backbone.bn1.{kind}" for kind in both)]
    for layer, blocks in ((1, 3), (2, 4), (3, 6)):
        for block in range(blocks):
            prefix = f"backbone.layer{layer}.{block}"
            for i in (1, 2):
                names += [f"{prefix}.conv{i}.weight", *(f"{prefix}.bn{i}.{kind}" for kind in both)]
            if layer > 1 and block == 0:
                names += [f"{prefix}.downsample.0.weight"]
                names += [f"{prefix}.downsample.1.{kind}" for kind in both]
    names += [f"extras.{i}.conv{j}.{kind}" for i in range(5) for j in (1, 2) for kind in both]
    names += [f"heads.{i}.{kind}" for i in range(6) for kind in both]
    return names

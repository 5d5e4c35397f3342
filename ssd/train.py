"""Train SSD300: puts the model, the loss, the data and the evaluation into the loop of detection/engine.py."""

import json
import secrets
import signal
import sys
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from detection import device, engine, optim
from detection.config import InputError, read_topology, to_json
from detection.distributed import PeerLost, Ranks, connect
from detection.metric import to_results
from detection.progress import Diverged, Progress
from mlperf import check
from mlperf.log import MlperfLog
from mlperf.rules import ssd_tensor_name
from ssd import augment, backbone
from ssd.anchors import IMAGE_SIZE_PX, make_anchors
from ssd.box_coder import encode
from ssd.config import Config, load
from ssd.data import Batch, SSDData
from ssd.evaluation import Evaluation
from ssd.loss import multibox_loss
from ssd.model import SSD300


def main(argv: list[str]) -> int:
    """Run on this rank; returns the exit status."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the log of an ended run says so
    try:
        config = load(argv).config
        topology = read_topology()
        rank_device = device.choose(config.device, topology.local_rank)
        with connect(topology, rank_device) as ranks:
            return run(config, ranks, topology.nodes)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        if topology.rank == 0:  # it is the same on every rank
            print(f"error: {error}", file=sys.stderr)
        return 1
    except PeerLost as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def run(config: Config, ranks: Ranks, num_nodes: int) -> int:
    """Train to the target, have the log checked, and say where everything lies."""
    folder = Path(ranks.broadcast(config.run_folder(datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))))
    log_file = folder / f"result_{config.experiment}.txt"
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(to_json(config))
    progress = Progress(ranks, folder / "metrics.jsonl", log_every=config.log_every)
    log = open_log(log_file if ranks.is_first else None, progress)
    try:
        log_submission(log, config, num_nodes)
        log.start("init")
        seed = ranks.broadcast(secrets.randbits(31) if config.seed is None else config.seed)
        torch.manual_seed(seed)
        model = SSD300(config.num_classes)
        if config.backbone:
            backbone.load(model.backbone, Path(config.backbone))
        log_hyperparameters(log, config, ranks, seed, model)
        evaluation = Evaluation(config, ranks)
        benchmark = make_benchmark(config, ranks, seed, model, evaluation)
        outcome = engine.run(benchmark, config, ranks, log, progress, folder)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself now, with a status of its own
        log.close()
        progress.close()
    if ranks.is_first:
        (folder / "detections.json").write_text(json.dumps(to_results(evaluation.rows)))
        report(outcome, config, check.check(log_file, config.ruleset), folder)
        if (official := evaluation.confirm()) != outcome.metrics:
            print(f"error: pycocotools says AP {official['AP']}. Run again with --metric pycocotools.", file=sys.stderr)
            return 1
        print("pycocotools confirms the last figures")
    return 0 if outcome.reached else 3


def open_log(log_file: Path | None, progress: Progress) -> MlperfLog:
    """The MLPerf log, which clears the progress bar away before it prints; None is silent."""
    try:
        return MlperfLog(log_file, before_echo=progress.clear)
    except ValueError as error:
        raise InputError(str(error)) from error


def make_benchmark(
    config: Config, ranks: Ranks, seed: int, model: SSD300, evaluation: Evaluation
) -> engine.Benchmark[Batch]:
    """SSD300 as the loop sees it."""
    return engine.Benchmark(
        model=model,
        loss=partial(batch_loss, device=ranks.device),
        made_up_batch=partial(made_up_batch, config),
        open_data=partial(SSDData, config, ranks, seed),
        learning_rate=partial(
            optim.learning_rate,
            peak=config.peak_lr(ranks.world_size),
            warmup_steps=config.warmup_steps,
            warmup_factor=config.warmup_factor,
            decay_epochs=config.decay_epochs,
            decay_factor=config.decay_factor,
        ),
        evaluate=evaluation,
        targets={"AP": config.target},
        accuracy=lambda metrics: metrics["AP"],
    )


def batch_loss(model: nn.Module, batch: Batch, *, device: torch.device) -> Tensor:
    """Sum of the losses of the images of a batch, (): augment, encode, predict, compare, all on the device."""
    on_device = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
    with torch.autocast(device.type, enabled=False):
        images, boxes_xyxy = augment.flip(augment.to_unit(on_device.images), on_device.boxes_xyxy, batch.flips)
        images = augment.normalise(augment.jitter(images, on_device.jitter, batch.jitter_order))
        deltas, labels = encode(boxes_xyxy, on_device.labels, make_anchors(device))
    pred_deltas, logits = model(images)
    return multibox_loss(pred_deltas, logits, deltas, labels).sum()


def made_up_batch(config: Config) -> Batch:
    """A batch of noise with one box an image, in the shape of the real ones."""
    size = config.batch_size
    pixels = torch.randint(0, 256, (size, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX), dtype=torch.uint8)
    return Batch(
        images=pixels.contiguous(memory_format=torch.channels_last),
        boxes_xyxy=torch.tensor([0.25, 0.25, 0.75, 0.75]).expand(size, 1, 4),
        labels=torch.ones(size, 1, dtype=torch.int64),
        flips=torch.zeros(size, 2, dtype=torch.bool),
        jitter=torch.from_numpy(augment.NO_JITTER).expand(size, 4),
        jitter_order=torch.arange(4).expand(size, 4),
    )


def log_submission(log: MlperfLog, config: Config, num_nodes: int) -> None:
    """Say whose run this is, and what is known before it begins."""
    log.point("submission_benchmark", "ssd")
    log.point("submission_org", config.org)
    log.point("submission_division", config.division)
    log.point("submission_status", config.status)
    log.point("submission_platform", config.submission_platform(num_nodes))
    log.point("dataset", config.dataset, is_coco2017=config.dataset == "coco2017")
    log.point("cache_clear", config.caches_cleared)
    log.point("config", json.loads(to_json(config)))


def log_hyperparameters(log: MlperfLog, config: Config, ranks: Ranks, seed: int, model: SSD300) -> None:
    """Say what the run is made of: the seed, the recipe, and each tensor that was initialised."""
    log.point("seed", seed)
    for key, value in config.hyperparameters(ranks.world_size).items():
        log.point(key, value)
    for name, _ in model.named_parameters():
        log.point("weights_initialization", tensor=ssd_tensor_name(name))


def report(outcome: engine.Outcome, config: Config, verdict: check.Verdict, folder: Path) -> None:
    """Print how the run ended, the checker's verdict on its log, and where its files are."""
    reached = "the target is reached" if outcome.reached else f"the {config.epochs} epochs are used up"
    print(f"AP {outcome.metrics['AP']:.4f} after epoch {outcome.epoch}, target {config.target}: {reached}")
    print(f"MLPerf compliance ({verdict.ruleset}): {'PASS' if verdict.passed else 'FAIL'}")
    for message in verdict.messages:
        print(f"  {message}")
    print(f"The run lies in {folder}/:")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"  {path.relative_to(folder)}")


if __name__ == "__main__":
    status = main(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends the ranks that are left; this one is ending
    sys.exit(status)

"""Stages of a session on an accelerator, most important first. Every measurement is a command of this program."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from detection.runtime.device import is_out_of_memory
from perf.accelerator.session import Measurement, MeasurementError, Session, Stage, last_lines
from perf.record import summarize
from perf.systems import COMMANDS, benchmark_of, exported_settings, load_config
from perf.table import read

Result = Mapping[str, Any]

PHOTOS = 3648  # four batches of the largest config file
REHEARSED_PHOTOS = 8
STEPS, WARMUP_STEPS = 12, 5
COMPILED = ("--compile", "on")
REHEARSED = {
    "ssd": ("--precision", "auto", "--num-workers", "1", "--backbone", "resnet18"),
    "maskrcnn": (
        *("--precision", "auto", "--num-workers", "1", "--backbone", "resnet18"),
        *("--min-image-size", "96", "--max-image-size", "128"),
    ),
    "retinanet": ("--precision", "auto", "--num-workers", "1", "--backbone", "resnet18", "--image-size", "128"),
}
SSD, SSD_R50, MASK_RCNN, RETINANET = "H200", "SSD300v1.1_A100", "H200_maskrcnn", "H200_retinanet"


def measure(session: Session, *, name: str, module: str) -> Result:
    """Run a module of this package, and return the content of the file that it writes."""
    file = session.out / f"{name}.json"
    flags = ("--device", session.device, *(("--rehearse",) if session.rehearse else ()))
    session.python(name, "-m", f"perf.accelerator.{module}", str(file), *flags)
    content: Result = json.loads(file.read_text())
    return content


def generate_photos(session: Session) -> Result:
    """Generate images of COCO's sizes with boxes and polygons."""
    count = REHEARSED_PHOTOS if session.rehearse else PHOTOS
    session.python(
        "photos", "-m", "detection.synthetic.coco_sized", str(session.out / "photos"), "--images", str(count)
    )
    return {"images": count}


def compare_with_reference(session: Session, *, benchmark: str, precision: str) -> Result:
    """Compare a workload with the vectors of its reference."""
    vectors = f"tests/golden/{benchmark}/{benchmark}_reference.npz"
    words = ("conformance", vectors, "--device", session.device, "--precision", precision)
    output = session.python(f"conformance_{benchmark}_{precision}", "-m", benchmark, *words, statuses=(0, 1))
    if failed := [line for line in output.splitlines() if line.endswith("FAIL")]:
        raise MeasurementError("failed", "\n".join([last_lines(output, 1), *failed]))
    return {"verdict": last_lines(output, 1)}


def time_steps(
    session: Session,
    *,
    name: str,
    system: str,
    flags: Sequence[str] = (),
    mode: str = "bench-train",
    inputs: str = "both",
) -> dict[str, Any]:
    """Time steps of a system's settings, changed by flags, in images per second.

    If the device has too little memory, the micro-batch is halved until it fits.
    """
    if inputs != "synthetic" and session.result("ssd", "photos").get("status") != "ok":
        with suppress(MeasurementError):  # the command reports that they are missing
            generate_photos(session)
    benchmark, config = benchmark_of(system), load_config(system, flags)
    summary = session.out / f"{name}.json"
    batch_size, micro_batches = config.batch_size, config.grad_accum_steps
    eval_batch_size = config.eval_batch_size
    if session.rehearse:
        batch_size, micro_batches, eval_batch_size = 2, 1, 2
        flags = (*flags, *REHEARSED[benchmark])
    common = ["--mode", mode, "--benchmark-input", inputs, "--division", "open", "--dataset", "synthetic_coco"]
    common += ["--data-dir", str(session.out / "photos"), "--summary-json", str(summary), "--device", session.device]
    common += ["--pretrained-backbone", "", "--run-dir", str(session.out / "runs" / name)]
    steps, warmup = (1, 1) if session.rehearse else (STEPS, WARMUP_STEPS)
    common += ["--benchmark-steps", str(steps), "--benchmark-warmup", str(warmup)]
    while True:
        sizes = ("--batch-size", batch_size, "--grad-accum-steps", micro_batches, "--eval-batch-size", eval_batch_size)
        words = ("-m", benchmark, "train", *flags, *common, *map(str, sizes))
        try:
            session.python(name, *words, environ=exported_settings(system))
            break
        except MeasurementError:
            output = read_log(session, name)
            is_smallest = batch_size // micro_batches == 1 if mode == "bench-train" else eval_batch_size == 1
            if not is_out_of_memory(output) or is_smallest:
                raise
            if mode == "bench-train":
                micro_batches *= 2
            else:
                eval_batch_size //= 2
    content = json.loads(summary.read_text())
    result: dict[str, Any] = {
        f"{timed['input']}_img_per_s": timed["images_per_s"]["median"] for timed in content["results"]
    }
    result |= {"precision": content["precision"], "init_s": content["init_s"], "memory_gib": content["peak_memory_gib"]}
    result["micro_batch"] = batch_size // micro_batches if mode == "bench-train" else eval_batch_size
    if inputs != "synthetic":
        result["time_fraction"] = content["results"][0]["time_fraction"]
    return result


def read_log(session: Session, name: str) -> str:
    """Return the output of a command so far."""
    return (session.out / "logs" / f"{name}.txt").read_text(errors="replace")


def time_first_step(session: Session, *, system: str) -> Result:
    """Train one small step in bf16."""
    flags = ("--precision", "bf16", "--compile", "off", "--batch-size", "2", "--grad-accum-steps", "1")
    name = f"first_step_{benchmark_of(system)}"
    return time_steps(session, name=name, system=system, flags=flags, inputs="synthetic")


def time_ssd(session: Session, *, name: str, system: str, flags: Sequence[str], inputs: str = "both") -> Result:
    """Time SSD300 end to end, compared with its step alone and with the limit of the device."""
    result = time_steps(session, name=name, system=system, flags=flags, inputs=inputs)
    if inputs == "both":
        result["of_step"] = result["real_img_per_s"] / result["synthetic_img_per_s"]
    network = load_config(system, flags).network_name
    limits = session.result("first-steps", "environment").get("limit_img_per_s", {}).get(network, {})
    if limit := limits.get(result["precision"]):
        result["of_limit"] = result["synthetic_img_per_s"] / limit
    return result


def train_toy(session: Session, *, system: str) -> Result:
    """Train on the toy data set until the target is reached."""
    benchmark = benchmark_of(system)
    data, folder = session.out / "toy", session.out / "runs" / system
    data_flags = ("--train-images", "8", "--val-images", "4") if session.rehearse else ()
    session.python("toy", "-m", "detection.synthetic.toy", str(data), *data_flags)
    flags = ["--device", session.device, "--data-dir", str(data), "--run-dir", str(folder)]
    if session.rehearse:
        flags += ["--epochs", "1", "--eval-epochs", "1", "--target", "0", *REHEARSED[benchmark]]
        flags += ["--mask-target", "0"] if benchmark == "maskrcnn" else []
    launch = ("-m", "detection.runtime.launch", "--nproc-per-node", "1", "-m", benchmark, "train")
    session.python(system, *launch, *flags, environ=exported_settings(system))
    summary = summarize(next(folder.glob("result_*.txt")))
    return {key: summary[key] for key in ("init_s", "run_s", "images_per_s_median", "ap_by_epoch")}


def run_gpu_tests(session: Session, *, name: str, keyword: str) -> Result:
    """Run the tests that need an accelerator and match a keyword. A rehearsal only collects them."""
    report = session.out / f"{name}.xml"
    words = ("-m", "pytest", "-v", "-m", "gpu", "-k", keyword, "-p", "no:cacheprovider")
    if session.rehearse:
        return {"collected": last_lines(session.python(name, *words, "--collect-only"), 1)}
    session.python(name, *words, "--junitxml", str(report), statuses=(0, 1))
    (suite,) = ElementTree.parse(report).iter("testsuite")
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    names = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None
    ]
    if counts["failures"] + counts["errors"]:
        raise MeasurementError("failed", "\n".join([str(counts), *names]))
    return counts


def run_benchmark(session: Session, *, part: str) -> Result:
    """Run a part of perf.run, and return the median of each result in its unit."""
    file = session.out / f"{part}.json"
    size = "--tiny" if session.rehearse else "--quick"
    words = ("-m", "perf.run", part, size, "--allow-dirty", "--device", session.device, "--out", str(file))
    session.python(part, *words)
    return {result.variant: f"{result.value.median:.4g} {result.unit}" for result in read(file)["results"]}


STAGES = (
    Stage(
        "first-steps",
        "environment, and one training step of each workload in bf16",
        45,
        [
            Measurement("environment", partial(measure, name="environment", module="environment")),
            *(Measurement(benchmark_of(s), partial(time_first_step, system=s)) for s in (SSD, MASK_RCNN, RETINANET)),
        ],
    ),
    Stage(
        "conformance",
        "comparison with the references in fp32 and bf16",
        75,
        [
            Measurement(f"{b} {p}", partial(compare_with_reference, benchmark=b, precision=p))
            for p in ("fp32", "bf16")
            for b in COMMANDS
        ],
    ),
    Stage(
        "ssd",
        "SSD300-R34 from files to weights",
        150,
        [
            Measurement("photos", generate_photos),
            *(
                Measurement(name, partial(time_ssd, name=f"ssd_{number}", system=SSD, flags=flags))
                for number, (name, flags) in enumerate(
                    {
                        "eager, host workers": ("--compile", "off"),
                        "compiled, host workers": COMPILED,
                        "compiled, device image cache": (*COMPILED, "--image-cache", "device"),
                        "compiled, device JPEG decoder": (*COMPILED, "--jpeg-decoder", "gpu"),
                    }.items()
                )
            ),
        ],
    ),
    Stage(
        "toy",
        "toy runs to their targets",
        60,
        [Measurement(benchmark_of(s), partial(train_toy, system=s)) for s in ("toy", "toy_maskrcnn", "toy_retinanet")],
    ),
    Stage(
        "gpu-tests",
        "tests that need an accelerator, those of conformance in all precisions last",
        60,
        [
            Measurement("tests", partial(run_gpu_tests, name="gpu_tests", keyword="not every_comparison")),
            Measurement("conformance", partial(run_gpu_tests, name="gpu_conformance", keyword="every_comparison")),
        ],
    ),
    Stage(
        "maskrcnn-retinanet",
        "steps and predictions of Mask R-CNN and RetinaNet, and evaluations",
        120,
        [
            *(
                Measurement(
                    f"Mask R-CNN, RoIAlign {method}",
                    partial(
                        time_steps,
                        name=f"maskrcnn_{method}",
                        system=MASK_RCNN,
                        flags=("--roi-align", method, "--compile", "off"),
                    ),
                )
                for method in ("torchvision", "gather")
            ),
            Measurement("RetinaNet", partial(time_steps, name="retinanet", system=RETINANET, inputs="synthetic")),
            *(
                Measurement(
                    f"{benchmark_of(s)}, predictions",
                    partial(time_steps, name=f"{s}_predict", system=s, mode="bench-infer", inputs="synthetic"),
                )
                for s in (MASK_RCNN, RETINANET, SSD)
            ),
            Measurement(
                "Mask R-CNN, compiled",
                partial(time_steps, name="maskrcnn_compiled", system=MASK_RCNN, flags=COMPILED),
            ),
            Measurement("SSD300, evaluation", partial(run_benchmark, part="evaluate")),
            Measurement("Mask R-CNN, evaluation", partial(run_benchmark, part="maskrcnn_evaluation")),
            Measurement("RetinaNet, evaluation", partial(run_benchmark, part="retinanet_evaluation")),
        ],
    ),
    Stage(
        "ssd300-r50",
        "SSD300-R50",
        40,
        [
            Measurement(
                "compiled",
                partial(
                    time_ssd,
                    name="ssd300_r50",
                    system=SSD_R50,
                    flags=("--precision", "bf16", *COMPILED),
                    inputs="synthetic",
                ),
            )
        ],
    ),
    Stage(
        "profile",
        "kernels of SSD300's step",
        35,
        [Measurement("step", partial(measure, name="profile", module="step_profile"))],
    ),
)

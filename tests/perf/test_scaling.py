"""The scaling model: counted operations, its parts, and published runs that it was not fitted to."""

import json
import socket
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paths import ROOT, shared
from perf.scaling import __main__ as study
from perf.scaling import gradient
from perf.scaling.published_runs import DGX_A100, GENERATIONS, check, fit
from perf.scaling.step_model import (
    EPOCHS,
    TRAIN_IMAGES,
    Accelerator,
    Layout,
    all_reduce_s,
    batch_norm_s,
    best_run,
    buckets,
    count_network,
    epochs,
    exposed_s,
    run,
    step,
)
from ssd.model import SSD300
from torchrun import run_ranks

A100 = Accelerator(1600, 0.005)


@pytest.fixture(scope="module")
def network():
    return count_network()


def count_elements(network):
    return sum(elements for _, elements in network.grad_ready_times)


def test_network_operations_are_counted(network):
    with torch.device("meta"):
        assert count_elements(network) == sum(p.numel() for p in SSD300(81).parameters()) == 19_972_534
    assert network.forward_fraction == pytest.approx(31.72 / 94.75, rel=0.01)  # counted by another program
    assert network.batch_norms == 29
    ready_times = [time for time, _ in network.grad_ready_times]
    assert ready_times == sorted(ready_times)
    assert 0 < ready_times[0] < 0.1
    assert ready_times[-1] == 1


def test_buckets_contain_the_gradient_once_in_the_sizes_of_ddp(network):
    assert sum(elements for _, elements in buckets(network)) == count_elements(network)
    first, *full, _ = (4 * elements for _, elements in buckets(network))
    assert 2**20 <= first < 25 * 2**20
    assert all(25 * 2**20 <= size < 40 * 2**20 for size in full)


layouts = st.builds(Layout, st.sampled_from([1, 2, 8, 128]), st.sampled_from([1, 2, 8]), st.integers(1, 228))


@given(st.floats(0, 1e9), st.floats(0, 1e9), layouts)
def test_more_bytes_take_longer_and_one_rank_takes_no_time(one, other, layout):
    times = [all_reduce_s(size, DGX_A100, layout.nodes, layout.per_node) for size in sorted((one, other))]
    assert 0 <= times[0] <= times[1]
    assert (times[0] > 0) == (layout.ranks > 1)


def test_bandwidth_bounds_large_gradients_and_latency_small_ones():
    assert all_reduce_s(1e9, DGX_A100, 1, 8) == pytest.approx(2 * 7 / 8 / 235, rel=0.01)
    assert all_reduce_s(1e9, DGX_A100, 2, 8) == pytest.approx(2 * 15 / 16 / 170, rel=0.05)
    assert all_reduce_s(8, DGX_A100, 1, 8) == pytest.approx(12e-6, rel=0.1)
    assert all_reduce_s(8, DGX_A100, 128, 8) == pytest.approx(4.4e-6 + 2 * 7 * 0.52e-6 + 2 * 7 * 5e-6, rel=0.01)


@given(layouts)
def test_overlap_hides_all_reduces_except_the_last(network, layout):
    backward_s = 0.002 * layout.batch_size
    overlapped = exposed_s(network, DGX_A100, layout, backward_s)
    without_overlap = exposed_s(network, replace(DGX_A100, overlaps=False), layout, backward_s)
    fp32 = exposed_s(network, replace(DGX_A100, gradient_bytes=4), layout, backward_s)
    last = all_reduce_s(2 * buckets(network)[-1][1], DGX_A100, layout.nodes, layout.per_node)
    total = sum(all_reduce_s(2 * size, DGX_A100, layout.nodes, layout.per_node) for _, size in buckets(network))
    assert max(last, total - backward_s) * 0.999 <= overlapped <= without_overlap
    assert without_overlap == pytest.approx(total)
    assert overlapped <= fp32
    assert overlapped > 0 or layout.ranks == 1


def test_synchronized_batch_norm_costs_more_across_nodes(network):
    one_rank, one_node, two_nodes = (batch_norm_s(network, DGX_A100, Layout(2, 8, 2, group)) for group in (1, 8, 16))
    assert one_rank == 0 < one_node < two_nodes
    assert one_node == pytest.approx(2 * 29 * all_reduce_s(2048, DGX_A100, 1, 8))


def test_too_few_cores_bound_the_step(network):
    assert step(network, A100, DGX_A100, Layout(1, 8, 114)).data == 0
    slow = step(network, A100, replace(DGX_A100, cores=1), Layout(1, 8, 114))
    assert sum(slow) == pytest.approx(114 / 400)


def test_epochs_match_the_reference_points_and_are_constant_below():
    assert [epochs(size) for size in EPOCHS] == list(EPOCHS.values())
    assert epochs(8) == 50
    assert 65.1 < epochs(3072) < 87


@given(st.floats(100, 5000), st.floats(0.001, 0.05))
def test_fit_recovers_the_accelerator_of_synthetic_times(network, images_per_s, overhead_s):
    expected = Accelerator(images_per_s, overhead_s)
    synthetic = [
        one._replace(epoch_s=run(network, expected, one.system, one.layout).epoch_s) for one in GENERATIONS[0].fitted
    ]
    fitted = fit(network, synthetic)
    assert fitted.images_per_s == pytest.approx(images_per_s, rel=0.05)
    predicted = run(network, fitted, DGX_A100, synthetic[1].layout)
    assert predicted.epoch_s == pytest.approx(synthetic[1].epoch_s, rel=0.05)


def test_predictions_of_a_run_do_not_use_its_measurement(network):
    generation = GENERATIONS[0]
    slower = generation.fitted[0]._replace(epoch_s=2 * generation.fitted[0].epoch_s)
    changed = generation._replace(fitted=(slower, *generation.fitted[1:]))
    before, after = check(network, generation), check(network, changed)
    assert after[0].run == before[0].run
    assert after[1].run != before[1].run


def test_published_epochs_are_predicted(network):
    """The bounds are the errors that docs/SCALING.md states."""
    errors = {
        (generation.name, one.published.submitter, one.published.layout.ranks): abs(one.epoch_error)
        for generation in GENERATIONS
        for one in check(network, generation)
    }
    a100 = [error for (name, *_), error in errors.items() if name.startswith("A100")]
    assert max(a100) < 0.08
    assert statistics.mean(a100) < 0.03
    v100 = {ranks: error for (name, _, ranks), error in errors.items() if name.startswith("V100")}
    assert v100[8] < 0.03
    assert v100[64] < 0.08


def test_more_accelerators_are_faster_and_less_efficient(network):
    runs = [best_run(network, A100, DGX_A100, ranks) for ranks in study.DEVICE_COUNTS]
    assert [one.layout.ranks for one in runs] == list(study.DEVICE_COUNTS)
    minutes = [one.minutes for one in runs]
    assert minutes == sorted(minutes, reverse=True)
    device_minutes = [one.minutes * one.layout.ranks for one in runs]
    assert device_minutes[3:] == sorted(device_minutes[3:])
    assert all(one.layout.global_batch_size <= 4096 for one in runs)
    assert all(one.layout.batch_size * one.layout.group >= min(16, one.layout.global_batch_size) for one in runs)


@pytest.mark.parametrize(("folder", "system"), [("dgx1_ngc20.06_pytorch", "DGX-1"), ("nf5488_pytorch", "NF5488")])
def test_published_epochs_match_their_logs(folder, system):
    times = []
    for path in shared(f"logs/{folder}/ssd").iterdir():
        start_ms = 0
        for line in path.read_text().splitlines():
            if line.startswith(":::MLLOG"):
                event = json.loads(line.removeprefix(":::MLLOG"))
                if event["key"] == "epoch_start":
                    start_ms = event["time_ms"]
                if event["key"] == "epoch_stop":
                    times.append((event["time_ms"] - start_ms) / 1000)
                if event["key"] == "train_samples":
                    assert event["value"] == TRAIN_IMAGES
    published = [one for g in GENERATIONS for one in (*g.fitted, *g.others) if one.system.name == system]
    assert [one.epoch_s for one in published] == [pytest.approx(statistics.median(times), abs=0.001)]


def test_command_writes_page_and_plot(tmp_path, monkeypatch, capsys):
    (tmp_path / "SCALING.md").write_text("".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in study.TABLES))
    monkeypatch.setattr(study, "measure", lambda: gradient.format_result(synthetic_result()))
    assert study.main(["--measure", "--docs", str(tmp_path)]) == 0
    page = (tmp_path / "SCALING.md").read_text()
    assert "old" not in page
    assert "fp32: 1.0000 of the bytes" in page
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert (
        study.what_if_rows(count_network(), fit(count_network(), GENERATIONS[0].fitted))[1][-1]
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rate", "4000"], "Pass both"),
        (["--rate", "-1", "--overhead-ms", "3"], "--rate should be positive"),
        (["--docs", "nowhere"], "No such file"),
    ],
)
def test_invalid_input_gives_one_message(flags, message, capsys):
    assert study.main(flags) == 2
    assert message in capsys.readouterr().err


def test_page_shows_the_model(network):
    page = (ROOT / "docs" / "SCALING.md").read_text()
    checks = [(generation.name, one) for generation in GENERATIONS for one in check(network, generation)]
    accelerator = fit(network, GENERATIONS[0].fitted)
    runs = [best_run(network, accelerator, DGX_A100, ranks) for ranks in study.DEVICE_COUNTS]
    for rows in (study.published_rows(checks), study.fastest_rows(runs), study.what_if_rows(network, accelerator)):
        assert study.markdown(rows) in page
    assert (ROOT / "docs" / "scaling.png").is_file()


# Times of one round, and received bytes, with a gradient of 800 bytes.
TIMES = {gradient.NO_DDP: [1.0], gradient.DDP: [1.3], gradient.NO_SYNC: [1.1], gradient.BF16: [1.2]}
RECEIVED = {gradient.DDP: 800.0, gradient.BF16: 400.0}


def test_ratios_follow_from_times_and_bytes():
    two = gradient.ratios(TIMES, RECEIVED, 800, world_size=2)
    assert two["ddp_cost"]["median"] == pytest.approx(1.1)
    assert two["bytes_of_ideal"] == {"fp32": 1.0, "bf16": 1.0}
    four = gradient.ratios(TIMES, RECEIVED, 800, world_size=4)
    assert four["bytes_of_ideal"]["fp32"] == pytest.approx(1 / 1.5)
    one = gradient.ratios(TIMES, dict.fromkeys(RECEIVED, 0.0), 800, world_size=1)
    assert one["ddp_cost"]["median"] == pytest.approx(1.3)
    assert "bytes_of_ideal" not in one


def synthetic_result():
    return {
        "date": "2026-01-01",
        "machine": {"hardware": "cpu", "processor": "x", "versions": {"torch": "2.9"}, "commit": "abc1234"},
        "load": {"load_1min": 0.1, "is_idle": True},
        "ranks": 2,
        "batch_size": 4,
        "precision": "bf16",
        "gradient_bytes": 800,
        "n": 1,
        "time_s": {name: {"median": 1.0, "min": 1.0, "max": 1.0} for name in TIMES},
        "received_bytes": dict.fromkeys(TIMES, 1),
        **gradient.ratios(TIMES, RECEIVED, 800, world_size=2),
    }


def test_bytes_received_over_tcp_are_counted():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            before = gradient.received_bytes()
            sender.sendall(bytes(100_000))
            assert len(receiver.recv(100_000, socket.MSG_WAITALL)) == 100_000
            assert gradient.received_bytes() - before == 100_000


CHILD = """
import json
import torch
from detection.config.settings import read_rank_info
from detection.runtime.distributed import init_process_group
from perf.scaling.gradient import received_bytes

with init_process_group(read_rank_info(), torch.device("cpu"), timeout_s=60) as ranks:
    results = {}
    for dtype in ("fp32", "bf16", "fp16"):
        torch.manual_seed(0)
        model = ranks.wrap_ddp(torch.nn.Linear(1000, 500, bias=False), dtype)
        inputs = torch.randn(4, 1000, generator=torch.Generator().manual_seed(ranks.rank))
        sizes = []
        for no_sync in (False, True):
            model.zero_grad()
            ranks.barrier()
            before = received_bytes()
            if no_sync:
                with ranks.no_sync(model):
                    model(inputs).sum().backward()
            else:
                model(inputs).sum().backward()
                gradient = ranks.unwrap(model).weight.grad.clone()
            sizes.append(received_bytes() - before)
        gathered = ranks.all_gather_rows(gradient.flatten()[None])
        error = (gradient - ranks.all_reduce_mean(inputs.sum(0))).abs().max()
        results[dtype] = [*sizes, torch.equal(*gathered), float(error), str(gradient.dtype)]
    if ranks.is_main:
        print(json.dumps(results))
"""


@pytest.mark.slow
def test_two_ranks_exchange_one_gradient_and_half_the_bytes_in_bf16(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    process = run_ranks(2, script)
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    for dtype, (received, received_no_sync, ranks_agree, error, grad_dtype) in results.items():
        width = 4 if dtype == "fp32" else 2
        assert received == pytest.approx(width * 500_000, rel=0.01)
        assert received_no_sync < 1000
        assert ranks_agree
        assert error < {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}[dtype]
        assert grad_dtype == "torch.float32"
    assert results["bf16"][3] > 1e-4  # it does round


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_command_measures_all_kinds_of_steps(tmp_path, ranks):
    out = tmp_path / "gradient.json"
    process = run_ranks(ranks, "-m", "perf.scaling.gradient", "--batch-size", "1", "--rounds", "2", "--out", out)
    assert process.returncode == 0, process.stderr
    result = json.loads(out.read_text())
    assert result["gradient_bytes"] == 4 * 19_972_534
    assert 0.3 < result["ddp_cost"]["median"] < 3
    assert ("bytes_of_ideal" in result) == (ranks > 1)
    for ratio in result.get("bytes_of_ideal", {}).values():
        assert ratio == pytest.approx(1, rel=0.01)

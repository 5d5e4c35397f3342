"""The model of scaling: what is counted, what follows from the parts, and published runs that it was not fitted to."""

import json
import socket
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detection.runtime.distributed import DistContext
from paths import ROOT, shared
from perf.scaling import gradient, study
from perf.scaling.published_runs import DGX_A100, GENERATIONS, check, fit
from perf.scaling.step_model import (
    EPOCHS,
    TRAIN_IMAGES,
    Accelerator,
    Layout,
    all_reduce_s,
    best_run,
    buckets,
    count_network,
    epochs,
    exposed_s,
    run,
    shared_s,
    step,
)
from ssd.model import SSD300

A100 = Accelerator(1600, 0.005)


@pytest.fixture(scope="module")
def network():
    return count_network()


def test_the_network_is_counted(network):
    with torch.device("meta"):
        assert network.elements == sum(p.numel() for p in SSD300(81).parameters()) == 19_972_534
    assert network.forward_share == pytest.approx(31.72 / 94.75, rel=0.01)  # counted by another program
    assert network.batch_norms == 29
    assert 200 < network.operations < 1000
    shares = [share for share, _ in network.arrivals]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.1
    assert shares[-1] == 1


def test_buckets_are_those_of_ddp_and_hold_the_gradient_once(network):
    found = buckets(network)
    assert sum(elements for _, elements in found) == network.elements
    first, *full, _ = (4 * elements for _, elements in found)
    assert 2**20 <= first < 25 * 2**20
    assert all(25 * 2**20 <= size < 40 * 2**20 for size in full)


layouts = st.builds(Layout, st.sampled_from([1, 2, 8, 128]), st.sampled_from([1, 2, 8]), st.integers(1, 228))


@given(st.floats(0, 1e9), st.floats(0, 1e9), layouts)
def test_more_bytes_take_longer_and_one_rank_has_nobody_to_tell(one, other, layout):
    times = [all_reduce_s(size, DGX_A100, layout.nodes, layout.per_node) for size in sorted((one, other))]
    assert 0 <= times[0] <= times[1]
    assert (times[0] > 0) == (layout.ranks > 1)


def test_large_gradients_go_at_the_bus_bandwidth_and_small_ones_at_the_latency():
    assert all_reduce_s(1e9, DGX_A100, 1, 8) == pytest.approx(2 * 7 / 8 / 235, rel=0.01)
    assert all_reduce_s(1e9, DGX_A100, 2, 8) == pytest.approx(2 * 15 / 16 / 170, rel=0.05)
    assert all_reduce_s(8, DGX_A100, 1, 8) == pytest.approx(12e-6, rel=0.1)
    assert all_reduce_s(8, DGX_A100, 128, 8) == pytest.approx(4.4e-6 + 2 * 7 * 0.52e-6 + 2 * 7 * 5e-6, rel=0.01)


@given(layouts)
def test_sending_beside_the_backward_pass_hides_all_but_the_end(network, layout):
    backward_s = 0.002 * layout.batch_size
    hidden = exposed_s(network, DGX_A100, layout, backward_s)
    open_ = exposed_s(network, replace(DGX_A100, overlaps=False), layout, backward_s)
    wide = exposed_s(network, replace(DGX_A100, gradient_bytes=4), layout, backward_s)
    last = all_reduce_s(2 * buckets(network)[-1][1], DGX_A100, layout.nodes, layout.per_node)
    every = sum(all_reduce_s(2 * size, DGX_A100, layout.nodes, layout.per_node) for _, size in buckets(network))
    assert max(last, every - backward_s) * 0.999 <= hidden <= open_
    assert open_ == pytest.approx(every)
    assert hidden <= wide
    assert hidden > 0 or layout.ranks == 1


def test_batch_norm_costs_where_it_is_shared_and_more_across_nodes(network):
    alone, node, far = (shared_s(network, DGX_A100, Layout(2, 8, 2, group)) for group in (1, 8, 16))
    assert alone == 0 < node < far
    assert node == pytest.approx(2 * 29 * all_reduce_s(2048, DGX_A100, 1, 8))


def test_decoding_on_too_few_cores_is_what_a_step_waits_for(network):
    assert step(network, A100, DGX_A100, Layout(1, 8, 114)).data == 0
    slow = step(network, A100, replace(DGX_A100, cores=1), Layout(1, 8, 114))
    assert slow.total == pytest.approx(114 / 400)


def test_epochs_are_the_references_and_no_fewer_for_a_smaller_batch():
    assert [epochs(size) for size in EPOCHS] == list(EPOCHS.values())
    assert epochs(8) == 50
    assert 65.1 < epochs(3072) < 87


@given(st.floats(100, 5000), st.floats(0.001, 0.05))
def test_the_fit_finds_the_accelerator_that_made_the_times(network, images_per_s, fixed_s):
    truth = Accelerator(images_per_s, fixed_s)
    made = [one._replace(epoch_s=run(network, truth, one.system, one.layout).epoch_s) for one in GENERATIONS[0].fitted]
    found = fit(network, made)
    assert found.images_per_s == pytest.approx(images_per_s, rel=0.05)
    assert run(network, found, DGX_A100, made[1].layout).epoch_s == pytest.approx(made[1].epoch_s, rel=0.05)


def test_no_published_run_has_a_part_in_its_own_prediction(network):
    generation = GENERATIONS[0]
    slower = generation.fitted[0]._replace(epoch_s=2 * generation.fitted[0].epoch_s)
    changed = generation._replace(fitted=(slower, *generation.fitted[1:]))
    before, after = check(network, generation), check(network, changed)
    assert after[0].run == before[0].run
    assert after[1].run != before[1].run


def test_published_epochs_are_predicted(network):
    """The bound is what docs/SCALING.md says of each kind."""
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


def test_wider_is_faster_and_less_efficient_within_the_batches_that_are_known_to_converge(network):
    runs = [best_run(network, A100, DGX_A100, ranks) for ranks in study.DEVICE_COUNTS]
    assert [one.layout.ranks for one in runs] == list(study.DEVICE_COUNTS)
    minutes = [one.minutes for one in runs]
    assert minutes == sorted(minutes, reverse=True)
    spent = [one.minutes * one.layout.ranks for one in runs]
    assert spent[3:] == sorted(spent[3:])
    assert all(one.layout.global_batch_size <= 4096 for one in runs)
    assert all(one.layout.batch_size * one.layout.group >= min(16, one.layout.global_batch_size) for one in runs)


@pytest.mark.parametrize(("folder", "system"), [("dgx1_ngc20.06_pytorch", "DGX-1"), ("nf5488_pytorch", "NF5488")])
def test_the_epochs_in_the_table_are_those_of_the_logs(folder, system):
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


def test_the_command_writes_the_page_the_plot_and_the_figures(tmp_path, monkeypatch, capsys):
    (tmp_path / "SCALING.md").write_text("".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in study.PLACES))
    monkeypatch.setattr(study, "measure", lambda: [made_up_figures()])
    out = tmp_path / "scaling.json"
    assert study.main(["--measure", "--docs", str(tmp_path), "--out", str(out)]) == 0
    page, record = (tmp_path / "SCALING.md").read_text(), json.loads(out.read_text())
    assert "old" not in page
    assert "fp32: 1.0000 of the bytes" in page
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert [one["layout"]["nodes"] for one in record["widths"]][-1] == 128
    assert f"{record['widths'][-1]['minutes']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rate", "4000"], "give both"),
        (["--rate", "-1", "--fixed-ms", "3"], "--rate should be more than 0"),
        (["--docs", "nowhere"], "No such file"),
    ],
)
def test_a_mistake_is_one_message(flags, message, capsys):
    assert study.main(flags) == 2
    assert message in capsys.readouterr().err


def test_the_page_shows_what_the_model_says(network):
    page = (ROOT / "docs" / "SCALING.md").read_text()
    checks = [(generation.name, one) for generation in GENERATIONS for one in check(network, generation)]
    accelerator = fit(network, GENERATIONS[0].fitted)
    runs = [best_run(network, accelerator, DGX_A100, ranks) for ranks in study.DEVICE_COUNTS]
    for rows in (study.published_rows(checks), study.width_rows(runs), study.what_if_rows(network, accelerator)):
        assert study.markdown(rows) in page
    assert (ROOT / "docs" / "scaling.png").is_file()


# A sample of each kind, of a gradient of 800 bytes.
SAMPLES = {
    gradient.NO_DDP: [gradient.Sample(1.0, 0.0, 0)],
    gradient.DDP: [gradient.Sample(1.3, 0.06, 800)],
    gradient.KEPT: [gradient.Sample(1.1, 0.01, 0)],
    gradient.ROUNDED: [gradient.Sample(1.2, 0.05, 400)],
    gradient.LOCAL: [gradient.Sample(0.2, 0.0, 800)],
}


def test_what_follows_from_the_times_and_the_bytes():
    found = gradient.summarize(SAMPLES, 800, DistContext(0, 2, torch.device("cpu")))
    assert found["ddp_cost"]["median"] == pytest.approx(1.1)
    assert found["hidden_share"]["median"] == pytest.approx(0.75)
    assert found["bytes_of_ideal"] == {"fp32": 1.0, "bf16": 1.0}
    four = gradient.summarize(SAMPLES, 800, DistContext(0, 4, torch.device("cpu")))
    assert four["bytes_of_ideal"]["fp32"] == pytest.approx(1 / 1.5)
    alone = gradient.summarize(SAMPLES, 800, DistContext(0, 1, torch.device("cpu")))
    assert alone["ddp_cost"]["median"] == pytest.approx(1.3)
    assert "hidden_share" not in alone


def made_up_figures():
    ranks = DistContext(0, 2, torch.device("cpu"))
    spread = {"n": 1, "median": 1.0, "min": 1.0, "q1": 1.0, "q3": 1.0, "max": 1.0}
    kind = {"time_s": spread, "after_backward_s": spread, "received_bytes": 1}
    return {
        "ranks": 2,
        "batch_size": 4,
        "precision": "bf16",
        "gradient_bytes": 800,
        "kinds": dict.fromkeys(SAMPLES, kind),
        **gradient.summarize(SAMPLES, 800, ranks),
    }


def test_bytes_are_counted_that_come_over_tcp():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            before = gradient.received_bytes()
            sender.sendall(bytes(100_000))
            assert len(receiver.recv(100_000, socket.MSG_WAITALL)) == 100_000
            assert gradient.received_bytes() - before == 100_000


CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from detection.config.settings import read_rank_info
from detection.runtime.distributed import init_process_group
from perf.scaling.gradient import received_bytes

with init_process_group(read_rank_info(), torch.device("cpu"), timeout_s=60) as ranks:
    found = {}
    for dtype in ("fp32", "bf16", "fp16"):
        torch.manual_seed(0)
        model = ranks.wrap_ddp(torch.nn.Linear(1000, 500, bias=False), dtype)
        inputs = torch.randn(4, 1000, generator=torch.Generator().manual_seed(ranks.rank))
        sizes = []
        for kept in (False, True):
            model.zero_grad()
            ranks.barrier()
            before = received_bytes()
            if kept:
                with ranks.no_sync(model):
                    model(inputs).sum().backward()
            else:
                model(inputs).sum().backward()
                gradient = ranks.unwrap(model).weight.grad.clone()
            sizes.append(received_bytes() - before)
        both = ranks.all_gather_rows(gradient.flatten()[None])
        error = (gradient - ranks.all_reduce_mean(inputs.sum(0))).abs().max()
        found[dtype] = [*sizes, torch.equal(*both), float(error), str(gradient.dtype)]
    if ranks.is_main:
        print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_ranks_send_each_other_one_gradient_and_half_of_it_in_bf16(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, "-m", "detection.runtime.launch", "--nproc-per-node", "2", str(script), str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for dtype, (sent, kept, alike, error, arrived) in found.items():
        width = 4 if dtype == "fp32" else 2
        assert sent == pytest.approx(width * 500_000, rel=0.01)
        assert kept < 1000
        assert alike
        assert error < {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}[dtype]
        assert arrived == "torch.float32"
    assert found["bf16"][3] > 1e-4  # it does round


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_gradients_way_is_measured(tmp_path, ranks):
    out = tmp_path / "gradient.json"
    launch = [
        sys.executable,
        "-m",
        "detection.runtime.launch",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "perf.scaling.gradient",
    ]
    flags = ["--batch-size", "1", "--rounds", "2", "--out", str(out)]
    done = subprocess.run([*launch, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["gradient_bytes"] == 4 * 19_972_534
    assert 0.3 < found["ddp_cost"]["median"] < 3
    assert ("bytes_of_ideal" in found) == ("hidden_share" in found) == (ranks > 1)
    for share in found.get("bytes_of_ideal", {}).values():
        assert share == pytest.approx(1, rel=0.01)

"""Training past one machine, on paper: what a GPU sends, over which link, and what becomes of the speed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from star_fast import cli
from star_fast.planning import network, plan, work
from star_fast.planning.gpus import gpu
from star_fast.planning.network import Network
from star_fast.planning.sizes import parameters
from star_fast.presets import plain, preset

XL = preset("XL")
H100 = gpu("h100")


def ring(ranks: int, numbers: int, *, gathers: bool = True) -> int:
    """Numbers that one rank sends while a ring of them sums an array, and shows the sum to all if it `gathers`."""
    sent, chunk = [0] * ranks, numbers / ranks
    for _ in range((ranks - 1) * (2 if gathers else 1)):  # each passes a chunk on to its neighbour
        for rank in range(ranks):
            sent[rank] += chunk
    assert len(set(sent)) == 1
    return sent[0]


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_what_a_gpu_sends_is_what_a_ring_sends(ranks: int) -> None:
    """XL in bf16 with float32 gradients, two micro-batches a step."""
    found = parameters(XL)
    P, Q = found.student, found.transformer
    # Each gives its shard to all: as many bytes as a sum that each keeps a shard of
    shown = {"weights": ring(ranks, 2 * (P + Q), gathers=False)}
    by_hand = {
        0: ring(ranks, 2 * P),
        1: ring(ranks, 4 * P) + shown["weights"],
        2: 2 * ring(ranks, 4 * P, gathers=False) + shown["weights"],
        3: 2 * (ring(ranks, 4 * P, gathers=False) + ring(ranks, 2 * (2 * P + Q), gathers=False)),
    }
    for stage, sent in by_hand.items():
        assert network.stage_bytes(XL, stage, ranks, 2) == pytest.approx(sent, rel=1e-6), stage
    assert network.stage_bytes(plain(XL), 1, ranks, 1) < network.stage_bytes(XL, 1, ranks, 1)
    assert network.stage_bytes(XL, 1, 1, 1) == 0


def test_bytes_cross_the_slowest_link() -> None:
    between = Network(gbit_per_s=400.0, gpus_a_machine=8)
    assert network.network_s(10**9, 1, H100, between) == 0
    assert network.network_s(450 * 10**9, 8, H100, between) == pytest.approx(1)
    assert network.network_s(50 * 10**9, 9, H100, between) == pytest.approx(1)
    # A network faster than NVLink is not used faster
    assert network.network_s(450 * 10**9, 64, H100, Network(1e6, 8)) == pytest.approx(1)
    assert network.network_s(450 * 10**9, 64, H100, Network(400.0, 72)) == pytest.approx(1)


def test_the_curve_is_the_plan_at_every_number_of_gpus() -> None:
    made = plan.make_plan(XL, 8, 79.0, H100)
    assert [row.gpus for row in made.curve] == [1, 8, 16, 64, 256]  # 1024 GPUs cannot share 256 images
    for row in made.curve:
        alone = plan.make_plan(XL, row.gpus, 79.0, H100)
        assert (row.stage, row.micro_images, row.accumulation) == (
            alone.advice.stage,
            alone.advice.micro_images,
            alone.advice.accumulation,
        )
        assert row.gpus * row.micro_images * row.accumulation == 256
        arithmetic_s = alone.flops.total / (row.gpus * 989e12 * 0.4)
        assert row.compute_s == pytest.approx(max(arithmetic_s, alone.bytes_a_gpu / 3.35e12))
        assert row.images_per_s == pytest.approx(256 / (row.compute_s + row.network_s))
        assert row.hidden_images_per_s == pytest.approx(256 / max(row.compute_s, row.network_s))
    assert made.curve[1].images_per_s == pytest.approx(
        256 / (work.speed(XL, made.flops, 8 * 989e12, 0.4).step_s + made.sent_bytes_a_gpu / 450e9)
    )
    wide = dataclasses.replace(XL, train=dataclasses.replace(XL.train, images_per_step=4096))
    assert [row.gpus for row in plan.make_plan(wide, 8, 79.0, H100).curve][-1] == 1024
    assert (
        plan.make_plan(
            dataclasses.replace(XL, train=dataclasses.replace(XL.train, precision="fp32")), 8, 79.0, H100
        ).curve
        == []
    )


def test_memory_bounds_a_step_of_few_images() -> None:
    """A GPU that computes for nothing still reads weights and optimizer: there memory's rate decides."""
    fast = H100._replace(bf16_flops_per_s=1e20)
    row = plan.make_plan(XL, 256, 79.0, fast).curve[-1]
    assert row.gpus == 256 and row.compute_s == pytest.approx(work.step_bytes(XL, 256, 1) / 3.35e12)


def test_what_does_not_fit_is_left_out() -> None:
    """3B in 40 GB: not on one GPU."""
    made = plan.make_plan(preset("3B"), 64, 40.0, H100)
    assert made.curve[0].gpus > 1 and all(row.micro_images >= 1 for row in made.curve)


def test_the_command_shows_the_curve_and_takes_the_network(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    seconds = []
    for rate in ("100", "3200"):
        file = tmp_path / f"{rate}.json"
        assert cli.main(["plan", "--preset", "XL", "--network-gbit-per-s", rate, "--json", str(file)]) == 0
        printed = capfd.readouterr().out
        table = printed[printed.index("The same step on other numbers of GPUs") :].splitlines()
        assert f"a machine's network {rate} Gbit/s (assumed: --network-gbit-per-s)" in table[1]
        assert [line.split()[0] for line in table[3:8]] == ["1", "8", "16", "64", "256"]
        assert table[-1] == "  not on 1024: it does not fit, or they do not divide train.images_per_step = 256"
        assert max(map(len, table)) <= 120
        record = json.loads(file.read_text())
        seconds.append(record["curve"][-1]["network_s"])
        assert record["curve"][-1]["step_s"] == pytest.approx(record["curve"][-1]["compute_s"] + seconds[-1])
    assert seconds[0] == pytest.approx(32 * seconds[1])
    assert cli.main(["plan", "--preset", "XL", "--gpus-per-machine", "4"]) == 0
    printed = capfd.readouterr().out
    rows = printed[printed.index("GPUs  ZeRO") :].splitlines()[1:5]
    # Two machines: 8
    assert [line.split()[0] for line in rows] == ["1", "8", "64", "256"] and "GPUs, 4 a machine" in printed
    for arguments, line in (
        (["--network-gbit-per-s", "0"], "--network-gbit-per-s: expected 0.001 ... 1000000, got 0"),
        (["--gpus-per-machine", "0"], "--gpus-per-machine: expected 1 ... 1048576, got 0"),
    ):
        assert cli.main(["plan", "--preset", "XL", *arguments]) == 2
        assert capfd.readouterr().err == f"error: {line}\n"

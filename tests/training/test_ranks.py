"""Two ranks train what one rank trains; the teacher is the closed-form average of the student, in float32, under ZeRO too."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.store import write_store

ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, ranks: int, steps: int, precision: str, stage: int) -> dict[str, Any]:
    """What rank 0 of tests.training.ranks_main saw."""
    store, out = folder / "codes", folder / f"{ranks}-{precision}-{stage}.pt"
    if not store.exists():
        write_store(store)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [subprocess.Popen(
        [sys.executable, "-m", "tests.training.ranks_main", str(store), str(out), str(steps), precision, str(stage)], cwd=ROOT,
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
             "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(ranks)]
    for process in processes:
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[str, Any]:
    return launch(folder, 1, 20, "fp32", 0)


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Any]:
    return launch(folder, 2, 20, "fp32", 0)


def test_two_ranks_have_the_gradient_of_one(one_rank: dict[str, Any], two_ranks: dict[str, Any]) -> None:
    assert one_rank["gradients"].keys() == two_ranks["gradients"].keys()
    for name, expected in one_rank["gradients"].items():
        error = (two_ranks["gradients"][name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error <= 1e-6, f"{name}: relative error {error:.2e}"


def test_two_ranks_have_the_losses_of_one_with_the_keys_of_both(one_rank: dict[str, Any], two_ranks: dict[str, Any]) -> None:
    torch.testing.assert_close(two_ranks["losses"], one_rank["losses"], rtol=0, atol=1e-5)
    # Contrast against 8 keys, not 4: untrained features give about log 8.
    assert abs(two_ranks["losses"][0, 3].item() - torch.tensor(8.0).log().item()) < 0.5
    assert one_rank["losses"][-1, 0] < one_rank["losses"][0, 0]


def check_teacher(saved: dict[str, Any], decay: float) -> None:
    """The closed form t_n = d^n s_0 + (1 - d) sum_k d^(n-k) s_k, in float64, from the students as they were."""
    steps = len(saved["student"]) - 1
    for name in saved["names"]:
        students = [state[name].double() for state in saved["student"]]
        expected = decay**steps * students[0] + (1 - decay) * sum(decay ** (steps - k) * students[k] for k in range(1, steps + 1))
        moved = (expected - students[0]).abs().max()
        error = (saved["teacher"][-1][name].double() - expected).abs().max()
        # Each update rounds the average once, by at most 2^-24 of itself.
        assert error <= steps * 2**-24 * expected.abs().max().clamp(min=1e-6), f"{name}: {error:.2e}"
        if name not in ("output.weight",):
            assert moved > 0, name
    assert not saved["requires_grad"]
    assert not saved["copies_grad"]


def test_teacher_is_the_closed_form_average(one_rank: dict[str, Any]) -> None:
    check_teacher(one_rank, 0.9999)
    moved = max((one_rank["teacher"][-1][name] - one_rank["teacher"][0][name]).abs().max() for name in one_rank["names"])
    assert moved > 0


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 1), (2, 2)])
def test_teacher_in_bf16_training_moves_in_float32(folder: Path, ranks: int, stage: int) -> None:
    saved = launch(folder, ranks, 4, "bf16", stage)
    check_teacher(saved, 0.9999)
    for name in saved["names"]:
        first, last = saved["teacher"][0][name], saved["teacher"][-1][name]
        assert last.dtype == torch.float32
        if not torch.equal(saved["student"][0][name], saved["student"][-1][name]):
            assert not torch.equal(first, last), f"{name}: the average stands still"
        assert torch.equal(saved["copies"][name], last.to(torch.bfloat16)), f"{name}: the teacher's model is not its rounded masters"

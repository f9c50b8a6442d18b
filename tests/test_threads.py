"""Threads on the CPU: cores rather than hardware threads, a container's share, and whatever the user or a launcher has
chosen.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from star_fast import threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight processors on four cores: number n shares its core with n + 4; no control group."""
    for number in range(8):
        file = tmp_path / f"devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{number % 4},{number % 4 + 4}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(root: Path, **files: str) -> None:
    for name, content in files.items():
        file = (
            root
            / "fs/cgroup"
            / {"v2": "cpu.max", "quota": "cpu/cpu.cfs_quota_us", "period": "cpu/cpu.cfs_period_us"}[name]
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def test_one_thread_a_core(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.threads_here(machine) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 2})
    assert threads.threads_here(machine) == 2
    assert threads.threads_here(machine / "nothing here") == 3


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"v2": "150000 100000\n"}, 1),
        ({"v2": "250000 100000\n"}, 2),
        ({"v2": "max 100000\n"}, 4),
        ({"v2": "1600000 100000"}, 4),
        ({"v2": "10000 100000"}, 1),
        ({"quota": "300000\n", "period": "100000\n"}, 3),
        ({"quota": "-1\n", "period": "100000\n"}, 4),
        ({"v2": "nonsense"}, 4),
        ({"v2": "5 0"}, 4),
    ],
)
def test_a_containers_share(machine: Path, files: dict[str, str], expected: int) -> None:
    write(machine, **files)
    assert threads.threads_here(machine) == expected


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
@pytest.mark.parametrize(("ranks", "expected"), [("2", 2), ("3", 1), ("16", 1), ("0", 4), ("two", 4)])
def test_ranks_share_the_cores(
    machine: Path, monkeypatch: pytest.MonkeyPatch, name: str, ranks: str, expected: int
) -> None:
    monkeypatch.setenv(name, ranks)
    assert threads.threads_here(machine) == expected


def test_the_users_choice_stands(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    threads.settle_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7" and "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(threads, "threads_here", lambda: 3)
    threads.settle_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3" and os.environ["GOMP_SPINCOUNT"] == str(threads.SPINS)

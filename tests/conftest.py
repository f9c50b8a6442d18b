"""Set before anything is imported: Triton's interpreter where there is no GPU, two threads, no telemetry."""

from __future__ import annotations

import os
import signal

import torch

# So shells start what runs in the background; the tests of Ctrl-C need what a terminal gives
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# Modules that tests share and that assert: they too say what was there
pytest.register_assert_rewrite(
    *(f"tests.{name}" for name in ("benchmark_process", "command_lines", "contract", "evaluation", "generation")),
    *(f"tests.{name}" for name in ("reliability", "training")),
)


# A minute and more in a few tests: begun first, or one worker would be busy with it when all others are done
LONG = {"test_kernels_end_to_end.py", "test_types.py", "test_examples.py", "test_fuzz.py", "test_wheel.py"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run by scripts/gpu_acceptance.sh")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

"""What training frees stays with the process, and goes back when it is told to."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, sys
import torch
from star_fast.training.host_memory import give_back, keep_freed_memory

def resident():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))) / 1024

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, usual = faults(), faults()
kept = keep_freed_memory()
for _ in range(12):
    faults()
after, held = faults(), resident()
give_back()
print(usual, kept, after, held, resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and glibc's allocator")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    usual, kept, after, held, left = done.stdout.split()
    if kept != "True":
        pytest.skip("the C library has no mallopt")
    assert int(usual) > 1000 and int(after) < 100
    assert float(held) - float(left) > 100

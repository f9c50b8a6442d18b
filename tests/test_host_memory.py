"""What training frees stays with the process, and goes back when it is told to."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, sys
import torch
from star_fast.host_memory import give_back, keep_freed_memory

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


_TAKE_AND_GIVE_BACK = """
import resource, torch
from star_fast.host_memory import keep_freed_memory

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        blocks = [torch.zeros(2**24 + number, dtype=torch.uint8) for number in range(5)]  # 80 MiB, touched
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
assert keep_freed_memory(2**28)
faults()  # taken once more, and kept
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_blocks_taken_again_cost_no_page_faults() -> None:
    told = subprocess.run(
        [sys.executable, "-c", _TAKE_AND_GIVE_BACK], capture_output=True, text=True, check=True
    ).stdout
    usual, kept = map(int, told.split())
    assert usual > 100 and kept < usual / 10, told

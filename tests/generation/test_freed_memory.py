"""What a process frees stays with it: counted in page faults, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_TAKE_AND_GIVE_BACK = """
import resource, torch
from star_fast.generation.freed_memory import keep_freed_memory

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        blocks = [torch.zeros(2**24 + number, dtype=torch.uint8) for number in range(5)]  # 80 MiB, touched
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
assert keep_freed_memory()
faults()  # taken once more, and kept
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_blocks_taken_again_cost_no_page_faults() -> None:
    told = subprocess.run([sys.executable, "-c", _TAKE_AND_GIVE_BACK], capture_output=True, text=True, check=True).stdout
    usual, kept = map(int, told.split())
    assert usual > 100 and kept < usual / 10, told

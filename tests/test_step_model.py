"""benchmarks/step_model.py: the step is made whole on tensors without data, and what is committed is what the code
launches today.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks/results/step_model.json"


def predicted(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "benchmarks/step_model.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # Among others: FLOPs counted are those that planning computes from the sizes
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_committed_table_is_of_this_code() -> None:
    line = predicted("--preset", "B", "--device", "H100")
    row = next(row for row in json.loads(TABLE.read_text())["B"] if row["device"] == "H100")
    found = re.search(r"step +([\d.]+) ms, +([\d.]+) images/s a GPU, MFU +([\d.]+) %, +([\d,]+) launches", line)
    assert int(found[4].replace(",", "")) == row["launches"], "run benchmarks/step_model.py and commit what it writes"
    assert abs(float(found[1]) - row["step_ms"]) <= 0.06 and abs(float(found[3]) - 100 * row["mfu"]) <= 0.06


def test_its_parts_add_up() -> None:
    for rows in json.loads(TABLE.read_text()).values():
        for row in rows:
            groups = row["groups"]
            assert abs(sum(group["ms"] for group in groups.values()) - row["step_ms"]) < 1e-6 * row["step_ms"]
            assert sum(group["launches"] for group in groups.values()) == row["launches"]
            assert len(row["largest_wastes"]) == 3 and 0.1 < row["mfu"] < 0.7
            assert all(0 <= group["over_peak_ms"] <= group["ms"] + 1e-9 for group in groups.values())

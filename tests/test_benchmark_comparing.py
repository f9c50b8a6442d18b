"""Two runs of the benchmarks compared (throughput.py --compare): a row is slower only beyond both runs' spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmark_process import start


def report(path: Path, rows: list[tuple[str, str, float | None, float | None, str]], **settings: Any) -> Path:
    made = [dict(zip(("name", "backend", "median_ms", "spread", "error"), row, strict=True)) for row in rows]
    path.write_text(
        json.dumps({"environment": {"device": "a CPU", "threads": 2}, "quick": False, "rows": made, **settings})
    )
    return path


def compare(old: Path, new: Path) -> tuple[int, dict[str, str], str]:
    """(exit code, {"what, backend": last columns}, all that was printed)."""
    done = start("benchmarks/throughput.py", "--compare", old, new)
    table = [
        [cell.strip() for cell in line[1:-1].split("|")] for line in done.stdout.splitlines() if line.startswith("| ")
    ]
    return done.returncode, {f"{cells[0]}, {cells[1]}": cells[-1] for cells in table[1:]}, done.stdout + done.stderr


def test_a_row_is_slower_only_beyond_both_spreads(tmp_path: Path) -> None:
    old = report(
        tmp_path / "old.json",
        [
            ("a", "cpp", 10.0, 0.05, ""),
            ("a", "naive", 10.0, 0.1, ""),
            ("b", "cpp", 10.0, 0.0, ""),
            ("c", "cpp", 1.0, 0.0, ""),
            ("d", "cpp", 1.0, 0.0, ""),
            ("once", "cpp", 10.0, None, ""),
            ("memory", "cpp", None, None, ""),
        ],
    )
    new = report(
        tmp_path / "new.json",
        [
            ("a", "cpp", 11.1, 0.05, ""),
            ("a", "naive", 12.0, 0.1, ""),
            ("b", "cpp", 8.0, 0.2, ""),
            ("d", "cpp", None, None, "it broke"),
            ("e", "cpp", 1.0, 0.0, ""),
            ("once", "cpp", 12.0, None, ""),
            ("memory", "cpp", None, None, ""),
        ],
    )
    code, verdicts, said = compare(old, new)
    # 1.11 > 1.05^2 = 1.1025; 1.20 < 1.1^2 = 1.21; 0.80 < 1 / 1.2; figures taken once count as 10 % unsure
    assert verdicts == {
        "a, cpp": "**slower**",
        "a, naive": "",
        "b, cpp": "faster",
        "c, cpp": "missing",
        "d, cpp": "**fails**: it broke",
        "e, cpp": "new",
        "once, cpp": "",
    }
    assert (
        code == 1
        and "2 of 5 became slower beyond both runs' spread: a, cpp; d, cpp." in said
        and "Not the same setting" not in said
    )


def test_nothing_slower_is_success_and_another_machine_is_told(tmp_path: Path) -> None:
    old = report(tmp_path / "old.json", [("a", "cpp", 10.0, 0.05, "")])
    new = report(
        tmp_path / "new.json",
        [("a", "cpp", 10.5, 0.05, "")],
        environment={"device": "another", "threads": 2},
        quick=True,
    )
    code, verdicts, said = compare(old, new)
    assert (
        code == 0
        and verdicts == {"a, cpp": ""}
        and "device: a CPU before, another now; one of them was --quick" in said
    )

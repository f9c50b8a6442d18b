"""A result among other files: one job writes it at a time, and what a killed one left half-written is removed by the
next.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from star_fast.evaluation.runs import only_result
from star_fast.locks import Busy


def test_leftovers_of_this_result_go_and_others_stay(tmp_path: Path) -> None:
    for name in (".m.json.4242.tmp", ".m.txt.4242.tmp", ".other.json.4242.tmp", "m.json"):
        (tmp_path / name).write_text("half")
    with only_result(tmp_path / "m.json", "evaluating", ["m.json", "m.txt"]):
        assert {path.name for path in tmp_path.iterdir()} == {".m.json.lock", ".other.json.4242.tmp", "m.json"}
    assert {path.name for path in tmp_path.iterdir()} == {".other.json.4242.tmp", "m.json"}


def test_the_lock_goes_with_a_job_that_fails_and_stays_with_one_that_runs(tmp_path: Path) -> None:
    with pytest.raises(KeyError), only_result(tmp_path / "new" / "m.json", "evaluating", ["m.json"]):
        raise KeyError
    assert not list((tmp_path / "new").iterdir())
    lock = tmp_path / ".m.json.lock"
    with lock.open("w") as other:
        other.write(json.dumps({"job": "evaluating", "holder": "process 1 on another machine"}))
        other.flush()
        fcntl.flock(other, fcntl.LOCK_SH)
        with (
            pytest.raises(Busy, match="evaluating is writing there"),
            only_result(tmp_path / "m.json", "evaluating", ["m.json"]),
        ):
            pass
    assert lock.exists()
    with (
        only_result(tmp_path / "m.json", "evaluating", ["m.json"]),
        only_result(tmp_path / "n.json", "evaluating", ["n.json"]),
    ):
        pass  # another result in the same folder is no hindrance

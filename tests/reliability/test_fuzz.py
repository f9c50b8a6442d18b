"""A slice of scripts/fuzz.py, and proof that it would see a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from scripts.fuzzing import bytes_damage, payloads, results, text_damage
from scripts.fuzzing.trial import Case, Outcome, Subject

ROOT = Path(__file__).resolve().parents[2]
INPUTS = 4000  # of all subjects together, the first of each; less than a minute on a quiet core


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        # As a user has it: without Triton's interpreter, in which doctor's small calls take seconds
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"OMP_NUM_THREADS": "1"},
    )


def test_a_slice_of_damaged_inputs_does_no_harm(tmp_path: Path) -> None:
    done = run(
        "scripts/fuzz.py",
        "--inputs",
        INPUTS,
        "--seed",
        0,
        "--out",
        tmp_path / "failures",
        "--record",
        tmp_path / "record.md",
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    record = (tmp_path / "record.md").read_text()
    rows = {
        cells[0]: [int(cell) for cell in cells[2:12]]
        for line in record.splitlines()
        if line.count("|") == 14 and "---" not in line
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] != "subject"
    }
    assert len(rows) > 55  # kinds of files and commands, and the sum
    inputs, accepted, refused, *failures = rows["all"]
    assert inputs == accepted + refused >= INPUTS - 50
    assert accepted > inputs // 20  # damage that readers see through is no damage
    assert not any(failures)
    assert all(numbers[0] for numbers in rows.values())


@pytest.fixture(scope="module")
def planted() -> dict[str, list]:
    done = run("tests/reliability/planted_readers.py")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("reader", "verdict", "kind"),
    [
        ("refuses", "refused", ""),
        ("unpickles", "executed", "canary"),
        ("is_made_to_run_a_program", "executed", "subprocess.Popen"),
        ("raises_key_error", "traceback", "KeyError"),
        ("allocates_a_gigabyte", "fat", ""),
        ("sleeps", "slow", ""),
        ("waits_for_good", "hung", ""),
        ("takes_the_process_down", "crashed", "crashed"),
        ("prints_what_it_read", "garbled", ""),
        ("leaves_the_input_damaged", "accepted", ""),
        ("accepts", "accepted", ""),
    ],
)
def test_a_planted_bug_is_seen(planted: dict[str, list], reader: str, verdict: str, kind: str) -> None:
    found = planted[reader]
    assert found[:2] == [verdict, kind]
    assert bool(found[2]) == (verdict not in ("accepted", "refused"))


def test_an_input_is_the_same_whatever_was_made_before_it() -> None:
    good = json.dumps({"a": {"b": [1, 2.5, "x"]}, "c": True}).encode()
    first = [text_damage.damaged_json(Random(seed), good, b"") for seed in range(300)]
    assert [text_damage.damaged_json(Random(seed), good, b"") for seed in range(300)] == first
    assert len({content for _, content in first}) > 150
    assert len({bytes_damage.damaged(Random(seed), good, b"other")[1] for seed in range(300)}) > 150


def test_every_way_of_damage_and_every_payload_can_be_made() -> None:
    assert len({payloads.bomb(Random(seed))[0] for seed in range(1000)}) > 40
    calls = {payloads.pickle_of_call(Random(seed))[1] for seed in range(3000)}
    assert len(calls) > 1500
    assert all(call.endswith(b".") for call in calls)


def test_a_kept_example_is_read_back_as_it_was(tmp_path: Path) -> None:
    cases = [
        Case("bits flipped", "run/x.json", b"\xff\x00", repairs=("run/y.json",)),
        Case("command line", arguments=("sample", "\udcff", "\x1b")),
    ]
    tally = results.Tally([Subject("one", "", lambda random, good: cases[0], lambda place, case: None)])
    for number, case in enumerate(cases):
        tally.add(
            Outcome(
                "one",
                number,
                "traceback",
                ["traceback"],
                kind=f"Error{number}",
                where="star_fast/x.py:3 read",
                case=case,
            )
        )
    results.keep(tally, tmp_path)
    assert {number: case for _, number, case in map(results.kept, tmp_path.iterdir())} == dict(enumerate(cases))
    assert tally.rows()[-1][1][:4] == [2, 0, 0, 2]

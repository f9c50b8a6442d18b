"""Throw damaged files and absurd command lines at everything that star_fast reads, and see that nothing runs, crashes,
hangs, bloats or shows a traceback.

    python scripts/fuzz.py [--inputs 100000] [--seconds S] [--seed 0] [--subject NAME] [--out FOLDER] [--record FILE]
    python scripts/fuzz.py --replay FOLDER/EXAMPLE.json

Every input must end with success, or with one line that says what is wrong, within 1 s + 10 ms a kilobyte and 300 MB
over what the process held before. The exit status is 1 if one did not; of each kind of failure one example is kept.
Seeded: input n of a subject is the same in every run.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch comes: workers are forked, and time is taken of one core
os.environ["TQDM_DISABLE"] = "1"  # the readers' bars

import argparse
import dataclasses
import gc
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch._dynamo  # noqa: E402, F401 (an optimizer loads it at its first step: not within an input's second)
from tqdm import tqdm  # noqa: E402

from scripts.fuzzing import goods, results, workers  # noqa: E402
from scripts.fuzzing.subjects import all_subjects  # noqa: E402
from scripts.fuzzing.trial import Subject  # noqa: E402


def main() -> int:
    """0 if every input ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many, dealt to the subjects by their shares")
    parser.add_argument("--seconds", type=float, default=3600, help="end after so long, with what was done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subject", action="append", help="only subjects whose name contains this; may be given again")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir()) / "star_fast-fuzz",
        help="folder for examples of failures",
    )
    parser.add_argument("--record", type=Path, help="write the result as Markdown")
    parser.add_argument("--replay", type=Path, help="run one kept example again, and show what it does")
    parser.add_argument(
        "--goods",
        type=Path,
        help="keep the good files in this folder, or take them from there; making them takes half a minute",
    )
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        folder = (arguments.goods or scratch / "goods").resolve()
        make_goods(folder)
        subjects = all_subjects()
        if arguments.replay:
            return replay(arguments.replay, subjects, folder, scratch)
        chosen = [
            subject
            for subject in subjects
            if not arguments.subject or any(part in subject.name for part in arguments.subject)
        ]
        if not chosen:
            parser.error(f"no such subject; there are: {', '.join(subject.name for subject in subjects)}")
        started = time.monotonic()
        tally = run(chosen, arguments.inputs, arguments.seconds, arguments.seed, folder, scratch)
        seconds = time.monotonic() - started
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    results.show(tally, seconds)
    results.keep(tally, arguments.out)
    if arguments.record:
        arguments.record.write_text(results.record(tally, arguments.seed, seconds, ROOT))
    return 1 if tally.failures else 0


def make_goods(folder: Path) -> None:
    """The good files, made in a process of their own: training leaves threads behind, which do not go with forks."""
    if (folder / goods.LAST_FILE).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / ".log"
    maker = multiprocessing.get_context("fork").Process(target=_make_goods, args=(folder, log))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit(f"fuzz: the good files could not be made:\n{log.read_text(errors='replace')[-5000:]}")
    log.unlink()


def _make_goods(folder: Path, log: Path) -> None:
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        goods.make(folder)


def jobs_of(subjects: Sequence[Subject], inputs: int) -> list[tuple[int, int]]:
    """(place of the subject, number of the input), every subject spread evenly over the run, at least one of each."""
    shares = sum(subject.share for subject in subjects)
    counts = [max(1, round(inputs * subject.share / shares)) for subject in subjects]
    return [
        job
        for _, job in sorted(
            ((number + 0.5) / count, (place, number)) for place, count in enumerate(counts) for number in range(count)
        )
    ]


def run(
    subjects: Sequence[Subject], inputs: int, seconds: float, seed: int, folder: Path, scratch: Path
) -> results.Tally:
    """Try the inputs until they or the seconds are used up."""
    tally, end, jobs = results.Tally(subjects), time.monotonic() + seconds, jobs_of(subjects, inputs)
    tqdm.monitor_interval = 0  # its thread would not survive the forks
    gc.collect()
    gc.freeze()
    with tqdm(total=len(jobs), desc="fuzzing", unit="input", disable=False, dynamic_ncols=True, mininterval=1) as bar:
        for outcome in workers.run(subjects, jobs, seed, folder, scratch):
            tally.add(outcome)
            bar.update()
            if outcome.failures:
                bar.set_postfix_str(
                    f"{sum(map(len, tally.failures.values()))} failures of {len(tally.failures)} kinds", refresh=False
                )
            if time.monotonic() > end:
                break
    return tally


def replay(path: Path, subjects: Sequence[Subject], folder: Path, scratch: Path) -> int:
    """Run a kept example again, in a process of its own; 0 if it now ends as it should."""
    name, number, case = results.kept(path)
    subject = dataclasses.replace(next(one for one in subjects if one.name == name), make=lambda random, good: case)
    outcome = next(workers.run([subject], [(0, number)], 0, folder, scratch))
    print(
        f"{name}: {case.change!a}\n{outcome.verdict} {', '.join(outcome.failures)}: {outcome.seconds:.2f} s, "
        f"{outcome.extra_bytes / 2**20:.0f} MiB more\n{outcome.told}"
    )
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())

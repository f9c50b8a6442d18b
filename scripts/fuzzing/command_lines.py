"""Command lines: real options of every subcommand, with values that nobody should give, around a job that ends at once.

Each line has a brake: an input that is missing, broken or tiny, so that it ends in a moment whatever the options ask
for (command_skeletons.py). Options that say how long a job takes get large values only where an input is missing.
"""

from __future__ import annotations

import os
import re
import sys
import typing
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from scripts.fuzzing import small_network
from scripts.fuzzing.command_skeletons import HASH, SKELETONS
from scripts.fuzzing.option_values import NUMBERS, OPTIONS, WORDS, value_of
from scripts.fuzzing.trial import Case, Subject
from star_fast import cli, demo, train
from star_fast.errors import UserError
from star_fast.training import ranks

_ENDLESS = (
    "steps",
    "epochs",
    "images",
    "samples-per-class",
    "largest-side",
    "channels",
    "base-channels",
    "multipliers",
    "codebook",
    "z-channels",
    "code-channels",
    "residual-blocks",
    "image-size",
    "affine-views",
    "images-per-step",
    "max-steps",
    "exact",
    "crop-ranges",
    "per-class",
    "points",
    "shifts",
)
_WRITTEN = {
    "prepare": ("few", "store", "unfinished"),
    "data": ("few", "store", "unfinished"),
    "probe": ("run/probe.json", "run/probe.png", "run/.report.lock"),
    "report": ("run/.report.lock",),
    "sample": ("samples",),
    "attention": (
        "run/attention.json",
        "run/attention.png",
        "run/maps.png",
        "run/.report.lock",
        "few",
        "store",
        "unfinished",
    ),
    "stability": ("run/stability.json", "run/stability.png", "run/.report.lock", "few", "store", "unfinished"),
    "figure6": ("run/figure6.json", "run/figure6.png", "run/model", "few", "store", "unfinished"),
    "evaluate": ("metrics.json", "metrics.txt", "reference.npz", "reference.json", "samples"),
}
_WRITTEN["train"] = _WRITTEN["train.py"] = ("few/.lock", "store/.lock", "unfinished/.lock", "run/.lock")


def subjects() -> list[Subject]:
    """One for each command, one for what is no command."""
    shares = {
        "prepare": 0.9,
        "data": 0.5,
        "train": 0.4,
        "train.py": 0.4,
        "sample": 0.8,
        "probe": 0.5,
        "report": 0.7,
        "plan": 0.4,
        "plan sample": 0.3,
        "plan prepare": 0.3,
        "doctor": 0.2,
        "presets": 0.1,
        "": 0.3,
        "evaluate": 0.9,
        "attention": 0.4,
        "stability": 0.4,
        "figure6": 0.4,
        "paper": 0.2,
        "demo": 0.3,
    }
    return [
        Subject(
            f"command line: {name or 'others'}",
            f"{'star_fast/train.py' if name == 'train.py' else f'star-fast {name}'.rstrip()}",
            _maker(name),
            _read,
            share,
            # Loaded at a command's first use, which takes longer than an input may.
            start=ranks.import_deepspeed if name == "doctor" else None,
            clean=("out", *_WRITTEN.get(name, ())),
        )
        for name, share in shares.items()
    ]


def _maker(command: str) -> Any:
    def make(random: Random, good: Path) -> Case:
        arguments = _line(random, command) if command else _others(random)
        environment = _ranks(random) if command == "sample" and random.random() < 0.1 else ()
        return Case("command line", arguments=tuple(arguments), environment=environment)

    return make


def _ranks(random: Random) -> tuple[str, ...]:
    """A launcher's environment that makes no sense; one that does would make rank 0 wait for the others."""
    broken = ("x", "", "-1", "-2", "0.5", "1e3", "99999999999999999999", "\u0663", " ", "None")
    return random.choice(
        (
            (f"RANK={random.choice(broken)}", "WORLD_SIZE=2"),
            ("RANK=1", f"WORLD_SIZE={random.choice(broken)}"),
            ("RANK=2", "WORLD_SIZE=2"),
            ("RANK=7", "WORLD_SIZE=1"),
            ("RANK=0", "WORLD_SIZE=0"),
            (f"LOCAL_RANK={random.choice(broken)}",),
            ("RANK=",),
            ("WORLD_SIZE=",),
        )
    )


def _others(random: Random) -> list[str]:
    return random.choice(
        (
            [],
            ["--help"],
            ["-h"],
            ["help"],
            [random.choice(WORDS)],
            [random.choice(WORDS), random.choice(list(OPTIONS))],
            ["sample", "sample"],
            [*OPTIONS],
            ["Sample"],
            ["sample "],
            ["--version"],
            ["-v"],
            ["demo"],
            ["prepare"],
            ["train", "--help"],
            ["sample", "--help"],
            ["report", "--help"],
            ["probe", "-h"],
            ["prepare", "--help"],
        )
    )


def _line(random: Random, command: str) -> list[str]:
    """The command, a skeleton with a brake, options."""
    whole = random.random() < 0.5  # the inputs are there
    start = SKELETONS[command](random, whole) if command in SKELETONS else []
    allowed = [
        option
        for option in OPTIONS[command]
        if option not in start and not (whole and option.rsplit(".", 1)[-1].removeprefix("--") in _ENDLESS)
    ]
    if "--tokenizer" in start:  # of these one gives none
        allowed = [option for option in allowed if not option.startswith("--new-tokenizer") or random.random() < 0.1]
    more: list[str] = []
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        option = random.choice(allowed) if allowed else "--x"
        values = value_of(random, command, option, whole)
        more += random.choice(
            ([option, *values],) * 12
            + (
                [f"{option}={' '.join(values)}"],
                [option],
                [f"--no-{option[2:]}"],
                [option, *values, option, *values],
                [option, *values, random.choice(WORDS)],
            )
        )
    if random.random() < 0.1:
        more.append(
            random.choice((*WORDS, *NUMBERS, "--help", "--no-such-option", "-q", "--tyro-print-completion", "bash"))
        )
    return [*command.split(), *start, *more]


def _read(place: Path, case: Case) -> None:
    """Run it. What the command line promises: status 0; or 2 with one line that begins with "error: ", or tyro's own
    usage; doctor's status is 1 where a stage cannot work, and its last line says which.
    """
    arguments = [small_network.weights_sha256() if word == HASH else word for word in case.arguments]
    by_parser = False
    variables = dict(variable.split("=", 1) for variable in case.environment)
    try:
        with (
            mock.patch.object(ranks, "start_ranks", _no_training),
            mock.patch.object(demo, "page", _no_page),
            small_network.small_network(),
            mock.patch.dict(os.environ, variables),
        ):
            if arguments[:1] == ["train.py"]:
                with mock.patch.object(sys, "argv", arguments):
                    status = train.main()
            else:
                status = cli.main(arguments)
    except SystemExit as end:
        status, by_parser = end.code, True
    text, told = _captured(sys.stderr), _captured(sys.stdout)
    missing = arguments[:1] == ["doctor"] and status == 1 and told.split("\n")[-2].startswith("missing: ")
    if status in (0, None) or missing:
        if bad := next((line for line in told.replace("\t", " ").split("\n") if not line.isprintable()), None):
            raise AssertionError(f"a line that a terminal may misread: {bad!r}")
        return
    errors = [line for line in text.split("\n") if re.match(r"(rank .*: )?error: ", line)]
    silent = variables.get("RANK", "0").isdecimal() and int(variables.get("RANK", "0")) > 0  # rank 0 says it
    if "Traceback" in text or status != 2 or not (by_parser or len(errors) == 1 or not arguments or silent):
        raise AssertionError(f"exit status {status} with {len(errors)} error lines:\n{text[-2000:]}")
    if errors and not errors[0].isprintable():
        raise AssertionError(f"an error line that a terminal may misread: {errors[0]!r}")
    raise UserError(errors[0] if errors else "usage")


def _captured(stream: Any) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8", "replace")


def _no_training() -> typing.NoReturn:
    raise UserError("ranks: training itself is not what is tried here")


def _no_page(*_: object) -> typing.NoReturn:
    raise UserError("demo: opening a page is not what is tried here")

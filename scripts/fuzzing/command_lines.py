"""Command lines: real options of every subcommand, with values that nobody should give, around a job that ends at once.

Each line has a brake: an input that is missing, broken or tiny, so that it ends in a moment whatever the options ask
for. Options that say how long a job takes get large values only where an input is missing.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from scripts.fuzzing import goods, small_network
from scripts.fuzzing.trial import Case, Subject
from star_fast import cli, data_commands, demo, plan_commands, train
from star_fast.errors import UserError
from star_fast.evaluation.attention import AttentionConfig
from star_fast.evaluation.evaluate import EvaluateConfig
from star_fast.evaluation.figure6 import Figure6Config
from star_fast.evaluation.paper import EXHIBITS
from star_fast.evaluation.probe import ProbeConfig
from star_fast.evaluation.report import ReportConfig
from star_fast.evaluation.stability import StabilityConfig
from star_fast.generation.sample import SampleConfig
from star_fast.training import ranks

# Nothing in between: a thousand images are a real job, and allowed.
NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "3",
    "-0",
    "007",
    "1.5",
    "0.5",
    "-1e-9",
    "1e-300",
    "1e308",
    "1e400",
    "1000000000",
    "1000000000000000",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "1" * 30,
    "1" * 400,
    "1" * 5000,
    "1_0",
    "0x10",
    "1e3",
    "+1",
    " 1",
    "nan",
    "inf",
    "-inf",
    "infinity",
    "\u0663",
    "\u00b2",
)
WHOLE = tuple(number for number in NUMBERS if number.lstrip("-").isascii() and number.lstrip("-").isdecimal())
WORDS = (
    "None",
    "none",
    "null",
    "True",
    "False",
    "true",
    "",
    " ",
    "x",
    "-",
    "--",
    "---",
    "-x",
    "--x",
    "=",
    "--=",
    "a=b",
    "@file",
    "%s",
    "{}",
    "[]",
    "\n",
    "\t",
    "\x1b[31mred\x1b[0m",
    "\u202e",
    "größe",
    "猫",
    "\udcff\udc80",
    "a\udc80b",
    "x" * 300,
    "y" * 5000,
    "/" * 4096,
    "../" * 1000,
    "~",
    "~nobody",
    "$HOME",
    "*",
    "1,2",
    "(1, 2)",
    "digits",
)
DEVICES = ("cuda", "cuda:99", "cuda:-1", "cuda:", "cpu:7", "cpu", "meta", "mps", "xla", "auto", "CPU", "cuda:1e9")
CLASS_NAMES = (*goods.CLASSES, "0", "2", "3", "-1", "1" * 400)
HERE = (
    "listed",
    "listed/labels.csv",
    "shards",
    "shards/a.tar",
    "names/list.txt",
    "images",
    "images/ash",
    "images/ash/0.png",
    "store",
    "store/manifest.json",
    "store/tokenizer",
    "run",
    "run/model",
    "run/config.yaml",
    "run/model/model.safetensors",
    "run/model/config.json",
    "run/checkpoints",
    "unfinished",
    "released/model.pt",
    "released/tokenizer.pt",
    "samples/done.npz",
    "llamagen",
    "few",
    "gallery",
    "kept",
    small_network.REFERENCE,
    small_network.ADM_REFERENCE,
    small_network.WEIGHTS,
    "fuzz_canary_module.py",
)
BROKEN = (
    "nowhere",
    "nowhere/at/all",
    "/dev/zero",
    "/dev/null",
    "/proc/self/mem",
    "odd/pipe",
    "odd/loop",
    "odd/empty",
    "odd/folder",
    "odd/noise.pt",
    "odd/noise.npz",
    "x" * 255,
    "x" * 256,
    "x/" * 3000,
    "größe",
    "a\nb",
    "\x1b[31m",
    "\udcff",
    "~",
    "out",
    "out/new",
    "fuzz_canary_module.py",
)
PLACES = (
    "out/new",
    "out/new",
    "out/new",
    "out/größe",
    "out/a\nb",
    "out/\x1b[31m",
    "out/\udcff",
    "out/" + "x" * 240,
    "out/" + "x" * 256,
    "out/" + "x/" * 3000,
    "/dev/zero",
    "/dev/null",
    "/dev/null/x",
    "/proc/new",
    "odd/pipe",
    "odd/pipe/x",
    "odd/loop",
    # To write to; all but these are outside, or put back
    "odd/empty",
    "odd/empty/x",
    "out",
    "unfinished",
    "store",
    "few",
)
FILES_TO_WRITE = (
    "out/x.npz",
    "out/x.npz",
    "out/x.npz",
    *(f"{place}.npz" for place in PLACES if place.startswith("out/")),
    "out/x.NPZ",
    "out/.npz",
    "out/x",
    "samples/done.npz",
    "odd/pipe/x.npz",
    "odd/empty/x.npz",
    "odd/loop/x.npz",
    "/proc/new.npz",
    "/dev/null",
    "/dev/null/x.npz",
)
RESULTS_TO_WRITE = tuple(name.replace(".npz", ".json") for name in FILES_TO_WRITE)
_PATHS = (
    "--labels",
    "--class-names",
    "--held-out-source",
    "--held-out-labels",
    "--fine-tune",
    "--sibling",
    "--data.images",
    "--model",
    "--tokenizer",
    "--run",
    "--codes",
    "--source",
    "--against",
    "--config",
    "--init",
    "--data.codes",
    "--samples",
    "--reference",
    "--make-reference",
    "--source-labels",
    "--inception",
    "--draw.model",
    "--draw.tokenizer",
    "--draw.class-names",
    "--features",
)
_HASH = "SHA256-OF-THE-WEIGHTS"  # in a line that is run, their hash stands in its place
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
_TINY = (
    "--new-tokenizer.steps",
    "1",
    "--new-tokenizer.image-size",
    "8",
    "--new-tokenizer.base-channels",
    "4",
    "--new-tokenizer.multipliers",
    "1",
    "2",
    "--new-tokenizer.z-channels",
    "4",
    "--new-tokenizer.codebook",
    "16",
    "--new-tokenizer.residual-blocks",
    "1",
    "--new-tokenizer.images-per-step",
    "2",
    "--data.views",
    "small-affine",
    "--data.affine-views",
    "2",
)


def options_of(command: Any, renamed: dict[str, str] | None = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option of a command's dataclass, as tyro names it, with its type."""
    hints = typing.get_type_hints(command)
    for field in dataclasses.fields(command):
        name = (renamed or {}).get(field.name, field.name.replace("_", "-"))
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options_of(hints[field.name], prefix=f"{prefix}{name}." if name else prefix)
        else:
            yield f"--{prefix}{name}", hints[field.name]


OPTIONS: dict[str, dict[str, Any]] = {
    "prepare": dict(options_of(data_commands.PrepareCommand, {"train_tokenizer": "new-tokenizer"})),
    "sample": dict(options_of(SampleConfig)),
    "probe": dict(options_of(ProbeConfig)),
    "report": dict(options_of(ReportConfig)),
    "train": dict(options_of(train.TrainCommand, {"config": ""})) | {"--preset": str, "--config": str},
    "doctor": dict(options_of(cli.DoctorCommand)),
    "presets": {},
    "attention": dict(options_of(AttentionConfig)),
    "stability": dict(options_of(StabilityConfig)),
    "figure6": dict(options_of(Figure6Config)),
    "evaluate": dict(options_of(EvaluateConfig)),
    "paper": dict(options_of(cli.PaperCommand)),
    "demo": dict(options_of(demo.DemoCommand)),
}
for _name, _command in (
    ("plan", plan_commands.PlanCommand),
    ("plan sample", plan_commands.PlanSampleCommand),
    ("plan prepare", plan_commands.PlanPrepareCommand),
):
    OPTIONS[_name] = dict(options_of(_command, {"config": "", "config_file": "config"}))
for _command, _positional in (("prepare", "--source"), ("paper", "--exhibit"), ("demo", "--model")):
    OPTIONS[_command].pop(_positional)
OPTIONS["doctor"].pop("--self-test")  # seconds: only with a device that is not there
OPTIONS["data"] = {
    name: hint
    for kind in ("Show", "Import", "Export")
    for name, hint in options_of(getattr(data_commands, f"{kind}Command"))
    if name not in ("--store", "--root")
}
OPTIONS["train.py"] = OPTIONS["train"] | {"--local_rank": int, "--local-rank": int}


def value_of(random: Random, command: str, option: str, whole: bool) -> list[str]:
    """What follows an option: something of its type in most cases, and absurd."""
    hint, kind = OPTIONS[command].get(option, str), random.random()
    if kind < 0.06:
        return [random.choice((*WORDS, *NUMBERS))]
    if option == "--json":
        return [random.choice(("out/plan.json", "out/plan.json", "/proc/new.json", "/dev/null/x.json"))]
    if option == "--out" or (option == "--run" and command in ("train", "train.py")):
        return [random.choice({"sample": FILES_TO_WRITE, "evaluate": RESULTS_TO_WRITE}.get(command, PLACES))]
    if option in _PATHS or (option == "--weights" and command == "doctor"):
        return [random.choice((*BROKEN, *(() if whole else HERE)))]
    if option == "--device":
        return [random.choice(DEVICES)]
    if option == "--classes":
        return random.choices((*CLASS_NAMES, *WORDS), k=random.choice((0, 1, 1, 2, 3)))
    if typing.get_origin(hint) is typing.Literal:
        return [random.choice((*(list(map(str, typing.get_args(hint))) * 3), random.choice(WORDS)))]
    if typing.get_origin(hint) is tuple:
        (kind_of_one, *_) = typing.get_args(hint)
        named = typing.get_args(kind_of_one) if typing.get_origin(kind_of_one) is typing.Literal else ()
        return random.choices((*named * 8, *WORDS) if named else NUMBERS, k=random.choice((0, 1, 2, 3, 20)))
    if hint is bool:
        # Settings of a run are no flags
        return [random.choice(("True", "False"))] if "." in option and command != "evaluate" else []
    return [random.choice(WHOLE if hint is int and kind < 0.8 else NUMBERS if hint in (int, float) else WORDS)]


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
    start = _SKELETONS[command](random, whole) if command in _SKELETONS else []
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


def _prepare(random: Random, whole: bool) -> list[str]:
    place = random.choice(PLACES)
    if whole:
        return [
            "few",
            "--out",
            place,
            *random.choice(
                (*[("--tokenizer", "store/tokenizer")] * 4, ("--tokenizer", "released/tokenizer.pt"), _TINY, _TINY)
            ),
        ]
    source, tokenizer = random.choice(
        (
            (random.choice(BROKEN), random.choice(((), ("--tokenizer", random.choice((*BROKEN, *HERE)))))),
            (random.choice((*BROKEN, *HERE)), ("--tokenizer", random.choice(BROKEN))),
        )
    )
    return [source, "--out", place, *tokenizer]


def _sample(random: Random, whole: bool) -> list[str]:
    model = random.choice(("run/model", "run", "released/model.pt")) if whole else random.choice(BROKEN)
    tokenizer = ["--tokenizer", "store/tokenizer"] if model == "released/model.pt" else []
    return [
        "--model",
        model,
        *tokenizer,
        "--out",
        random.choice(FILES_TO_WRITE),
        "--images",
        random.choice(("1", "2", "2", "2", "2", "2", "3", random.choice(NUMBERS))),
        *random.choice((["--no-grid"], ["--no-grid"], [])),
    ]


def _probe(random: Random, whole: bool) -> list[str]:
    if not whole:
        return ["--run", random.choice(BROKEN)]
    return [
        "--run",
        "run",
        *random.choice(
            (
                ["--depths", "99"],
                ["--epochs", "1", "--warmup-epochs", "0"],
                ["--codes", random.choice(BROKEN)],
                ["--weights", "x"],
            )
        ),
    ]


def _report(random: Random, whole: bool) -> list[str]:
    if not whole:
        return ["--run", random.choice(BROKEN)]
    return [
        "--run",
        "run",
        *random.choice(
            (
                ["--against", random.choice(BROKEN)],
                ["--classes", random.choice(("none", "99", "", "\x1b"))],
                ["--codes", random.choice(BROKEN)],
                ["--source", random.choice(BROKEN)],
                ["--device", "cuda:99"],
            )
        ),
    ]


def _attention(random: Random, whole: bool) -> list[str]:
    if not whole:
        return ["--run", random.choice(BROKEN)]
    return [
        "--run",
        "run",
        *random.choice(
            (
                ["--block", "99"],
                ["--rows", "99999"],
                ["--queries", "0"],
                ["--against", random.choice(BROKEN)],
                ["--codes", random.choice(BROKEN)],
                ["--weights", "x"],
            )
        ),
    ]


def _stability(random: Random, whole: bool) -> list[str]:
    if not whole:
        return [random.choice(("--run", "--codes")), random.choice(BROKEN)]
    return [
        *random.choice((["--run", "run"], ["--codes", "store"])),
        "--images",
        "2",
        *random.choice(
            (
                *[["--shifts", "1"]] * 3,
                ["--source", random.choice(BROKEN)],
                ["--tokenizer", random.choice((*BROKEN, *HERE))],
                ["--device", "cuda:99"],
            )
        ),
    ]


def _figure6(random: Random, whole: bool) -> list[str]:
    model, other = (
        random.choice(("run", "run/model", "released/model.pt") if whole else (*BROKEN, *HERE)) for _ in range(2)
    )
    return [
        "--run",
        model,
        "--against",
        other if whole else random.choice(BROKEN),
        "--per-class",
        "1",
        *random.choice(
            (
                [],
                ["--out", random.choice(PLACES)],
                ["--tokenizer", "store/tokenizer"],
                ["--classes", random.choice(CLASS_NAMES)],
            )
        ),
    ]


def _evaluate(random: Random, whole: bool) -> list[str]:
    """Every kind of measurement; what is whole is of eight small images, with the weights that fit."""
    weights = ["--inception", small_network.WEIGHTS, "--inception-sha256", _HASH]
    reference = [
        "--reference",
        random.choice((small_network.REFERENCE, small_network.ADM_REFERENCE, "samples/done.npz")),
    ]
    draw = ["--draw.model", "run/model", "--draw.images", "6", "--draw.batch-images", "4", "--draw.precision", "fp32"]
    if whole:
        return (
            random.choice(
                (
                    ["--samples", "samples/done.npz", *reference],
                    ["--samples", "gallery", *reference],
                    [*draw, *reference],
                    ["--tokenizer", "store/tokenizer", "--source", "few"],
                    ["--make-reference", "few", "--image-size", "8"],
                )
            )
            + weights
        )
    there, broken = random.choice((*BROKEN, *HERE)), random.choice(BROKEN)
    return random.choice(
        (
            ["--samples", broken, *reference, *weights],
            ["--samples", "samples/done.npz", "--reference", broken, *weights],
            ["--draw.model", broken, *reference, *weights],
            ["--tokenizer", broken, "--source", there, *weights],
            ["--tokenizer", there, "--source", broken, *weights],
            ["--make-reference", broken, *weights],
            ["--samples", there, *reference, "--inception", broken],
            ["--samples", there, "--reference", there],
        )
    )


def _paper(random: Random, whole: bool) -> list[str]:
    return [random.choice(list(EXHIBITS) if whole else WORDS)]


def _demo(random: Random, whole: bool) -> list[str]:
    return [random.choice(("run", "run/model")) if whole else random.choice((*BROKEN, *HERE))]


def _train(random: Random, whole: bool) -> list[str]:
    config = random.choice(
        (
            (),
            (),
            ("--preset", random.choice(("tiny", "B", "XL", random.choice(WORDS)))),
            ("--config", random.choice(("run/config.yaml", *HERE, *BROKEN))),
        )
    )
    if whole and random.random() < 0.6:
        config = ("--config", "run/config.yaml")  # which fits the store
    run = random.choice(
        (
            ["--run", "run"],
            ["--run", "out/new", "--resume"],
            ["--run", random.choice(PLACES)],
            ["--run", "out/new", "--plain"],
        )
    )
    return [
        *config,
        "--data.codes",
        "store" if whole else random.choice((*BROKEN, *(path for path in HERE if path != "store"))),
        *run,
    ]


def _doctor(random: Random, whole: bool) -> list[str]:
    """The kernels are tested on a device that is not there: on the others that takes longer than an input may."""
    if whole:
        return random.choice(([], ["--weights", random.choice(("run", "run/model", "store", "released"))]))
    return ["--self-test", "--device", random.choice(("cuda:99", "cuda:", "meta", "tpu", "\x1b[31m", "x" * 300))]


def _data(random: Random, whole: bool) -> list[str]:
    """One of its commands; a store that is shown, imported or exported whole is small."""
    command = random.choice((*data_commands.DATA_COMMANDS, random.choice(WORDS)))
    place = {"import": "llamagen"}.get(command, "store") if whole else random.choice((*BROKEN, *HERE))
    needs = {
        "import": ["--out", random.choice(PLACES), "--tokenizer", random.choice(("store/tokenizer", *BROKEN))],
        "export": ["--out", random.choice(PLACES)],
        "show": ["--out", "out/show.png"],
    }
    return [command, place, *needs.get(command, [])]


_SKELETONS = {
    "prepare": _prepare,
    "data": _data,
    "sample": _sample,
    "probe": _probe,
    "report": _report,
    "train": _train,
    "train.py": _train,
    "attention": _attention,
    "stability": _stability,
    "figure6": _figure6,
    "evaluate": _evaluate,
    "paper": _paper,
    "demo": _demo,
    "doctor": _doctor,
}


def _read(place: Path, case: Case) -> None:
    """Run it. What the command line promises: status 0; or 2 with one line that begins with "error: ", or tyro's own
    usage; doctor's status is 1 where a stage cannot work, and its last line says which.
    """
    arguments = [small_network.weights_sha256() if word == _HASH else word for word in case.arguments]
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

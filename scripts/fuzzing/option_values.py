"""The options of every subcommand, and values that nobody should give them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from random import Random
from typing import Any

from scripts.fuzzing import goods, small_network
from star_fast import cli, data_commands, demo, plan_commands, train
from star_fast.evaluation.attention import AttentionConfig
from star_fast.evaluation.evaluate import EvaluateConfig
from star_fast.evaluation.figure6 import Figure6Config
from star_fast.evaluation.probe import ProbeConfig
from star_fast.evaluation.report import ReportConfig
from star_fast.evaluation.stability import StabilityConfig
from star_fast.generation.sample_config import SampleConfig

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
# To write to; all but the last six are outside, or put back
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

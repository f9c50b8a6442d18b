"""`star-fast`: one subcommand a stage. Wiring only; each stage lives in its own module, loaded when it is asked for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import tyro

from star_fast import __version__
from star_fast.config_file import parse
from star_fast.errors import UserError, printable
from star_fast.guard import guarded
from star_fast.presets import IMAGENET_CODES, PRESETS, plain
from star_fast.records import require
from star_fast.threads import settle_threads


@dataclass(frozen=True)
class PaperCommand:
    """The commands that make a table or figure of the paper on ImageNet, with the values that it reports and what
    training takes.
    """

    exhibit: tyro.conf.Positional[str]  # table1 ... table6, figure1c, figure2, figure4, figure6
    gpus: int = 8  # that the predicted days are for
    gpu: str = "h100"  # a100, h100, h200 or b200
    share: float = 0.4  # of the GPUs' peak, at which they run


@dataclass(frozen=True)
class DoctorCommand:
    """What this machine has, what each stage needs, and how to get what is missing. Exit status 1 where something that
    is needed is missing.
    """

    # stages that must work here
    need: tuple[Literal["prepare", "train", "sample", "evaluate", "demo"], ...] = ("prepare", "train", "sample")
    weights: str = ""  # a folder: what the weights files in it are, and whether they are whole
    # also run every kernel once, small, against plain torch in float64: seconds, on a new GPU the first thing to do
    self_test: bool = False
    device: str = ""  # that the kernels are tested on: cpu, cuda; empty: a GPU where there is one


def paper(arguments: list[str]) -> None:
    """star-fast paper EXHIBIT ..."""
    from star_fast.evaluation.paper import EXHIBITS, text
    from star_fast.planning.gpus import gpu
    from star_fast.planning.work import step_flops, training_days
    from star_fast.presets import preset

    command = parse(PaperCommand, arguments, "star-fast paper", PaperCommand.__doc__ or "", exhibit=tyro.MISSING)
    require(command.exhibit in EXHIBITS, "exhibit", command.exhibit, " or ".join(EXHIBITS))
    require(0 < command.share <= 1, "--share", command.share, "a share of the peak, more than 0 and at most 1")
    require(command.gpus >= 1, "--gpus", command.gpus, "at least 1")
    device, days = gpu(command.gpu), []
    for row in EXHIBITS[command.exhibit].rows:
        if not row.preset:
            days.append("")
            continue
        config = plain(preset(row.preset)) if "--plain" in row.options else preset(row.preset)
        spent = training_days(
            config,
            step_flops(config, 1, config.train.images_per_step),
            device.bf16_flops_per_s * command.gpus,
            command.share,
        )
        days.append(
            f"training, predicted: {spent:.2g} days on {command.gpus} {command.gpu} at {command.share:.0%} of "
            "their peak"
        )
    print("\n".join(text(command.exhibit, IMAGENET_CODES, days)))


def plan(arguments: list[str]) -> None:
    """star-fast plan [sample|prepare] --preset NAME ..."""
    from star_fast.plan_commands import plan as run

    run(arguments)


def train(arguments: list[str]) -> None:
    """star-fast train: star_fast/train.py without a launcher."""
    from star_fast.train import run_command

    run_command(arguments, "star-fast train")


def convert(arguments: list[str]) -> None:
    """star-fast convert ..."""
    from star_fast.training.conversion import ConvertCommand, run_convert

    run_convert(parse(ConvertCommand, arguments, "star-fast convert", ConvertCommand.__doc__ or "", run=tyro.MISSING))


def sample(arguments: list[str]) -> None:
    """star-fast sample ..."""
    from star_fast.generation.sample import sample_images
    from star_fast.generation.sample_config import SampleConfig

    sample_images(parse(SampleConfig, arguments, "star-fast sample", SampleConfig.__doc__ or ""))


def probe(arguments: list[str]) -> None:
    """star-fast probe ..."""
    from star_fast.evaluation.probe import ProbeConfig, run_probe
    from star_fast.evaluation.probe_result import table

    config = parse(ProbeConfig, arguments, "star-fast probe", ProbeConfig.__doc__ or "")
    result = run_probe(config)
    if result is not None:
        print(printable(f"{config.run}: probe.json, probe.png"), table(result), sep="\n")


def attention(arguments: list[str]) -> None:
    """star-fast attention ..."""
    from star_fast.evaluation.attention import AttentionConfig, run_attention, table

    config = parse(AttentionConfig, arguments, "star-fast attention", AttentionConfig.__doc__ or "")
    looked = run_attention(config)
    print(
        printable(f"{config.run}: attention.json, attention.png, maps.png"),
        "\n".join(map(printable, table(looked).split("\n"))),
        sep="\n",
    )


def stability(arguments: list[str]) -> None:
    """star-fast stability ..."""
    from star_fast.evaluation.stability import StabilityConfig, run_stability

    print(
        "\n".join(
            map(
                printable,
                run_stability(
                    parse(StabilityConfig, arguments, "star-fast stability", StabilityConfig.__doc__ or "")
                ).split("\n"),
            )
        )
    )


def figure6(arguments: list[str]) -> None:
    """star-fast figure6 ..."""
    from star_fast.evaluation.figure6 import Figure6Config, run_figure6

    print(printable(run_figure6(parse(Figure6Config, arguments, "star-fast figure6", Figure6Config.__doc__ or ""))))


def evaluate(arguments: list[str]) -> None:
    """star-fast evaluate ..."""
    from star_fast.evaluation.evaluate import EvaluateConfig, run_evaluate

    print(
        "\n".join(
            map(
                printable,
                run_evaluate(
                    parse(EvaluateConfig, arguments, "star-fast evaluate", EvaluateConfig.__doc__ or "")
                ).splitlines(),
            )
        )
    )


def report(arguments: list[str]) -> None:
    """star-fast report ..."""
    from star_fast.evaluation.report import ReportConfig, write_report

    print(printable(write_report(parse(ReportConfig, arguments, "star-fast report", ReportConfig.__doc__ or ""))))


def demo(arguments: list[str]) -> None:
    """star-fast demo MODEL ..."""
    from star_fast.demo import DemoCommand, run_demo

    run_demo(parse(DemoCommand, arguments, "star-fast demo", DemoCommand.__doc__ or "", model=tyro.MISSING))


def doctor(arguments: list[str]) -> int:
    """star-fast doctor."""
    from star_fast.doctor.examination import examine, show_self_test

    settings = parse(DoctorCommand, arguments, "star-fast doctor", DoctorCommand.__doc__ or "")
    missing = examine(settings.need, settings.weights)
    if settings.self_test:
        from star_fast.generation.device import take_device
        from star_fast.ops.self_test import self_test

        if not show_self_test(self_test(take_device(settings.device).type)):
            raise UserError(
                "self-test: a kernel failed, see the table; STAR_FAST_BACKEND=reference runs without any of them"
            )
    if missing:
        print(printable(f"missing: {', '.join(missing)}"))
    return 1 if missing else 0


def presets(arguments: list[str]) -> None:
    """star-fast presets."""
    for name, row in PRESETS.items():
        model, settings = row.config.model, row.config.train
        own = f" | LlamaGen's own: lr {row.llamagen}" if row.config.model.num_classes else ""
        print(
            f"{name:6} {model.blocks:3} blocks {model.heads:3} heads, width {model.width:4}, {settings.epochs:g} "
            f"epochs, {settings.images_per_step} images a "
            f"step, lr {row.config.lr:g}, ZeRO-{settings.zero_stage} | {row.machine} | {row.paper}{own}\n       "
            f"{row.command}"
        )
    print(f"CODES of ImageNet: {IMAGENET_CODES}")


def prepare(arguments: list[str]) -> None:
    """star-fast prepare SOURCE ..."""
    from star_fast.data_commands import prepare as run

    run(arguments)


def data(arguments: list[str]) -> None:
    """star-fast data info|verify|show|import|export ..."""
    from star_fast.data_commands import data as run

    run(arguments)


COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], str]] = {  # what they return is the exit status; None: 0
    "prepare": (prepare, "images -> code store; trains a tokenizer when none is given"),
    "data": (data, "look at a code store, check it, see its pictures; LlamaGen's .npy codes in and out"),
    "plan": (
        plan,
        "what training, sampling (plan sample) or preparation (plan prepare) will need, predicted: memory, FLOPs, time",
    ),
    "paper": (paper, "the paper's tables and figures: exact commands, reported values, cost"),
    "train": (train, "code store -> model; many ranks: deepspeed star_fast/train.py"),
    "convert": (convert, "a run's checkpoint -> a run that goes on with any number of ranks and any ZeRO stage"),
    "sample": (sample, "model -> images: .npz for evaluation, labelled grid"),
    "evaluate": (
        evaluate,
        "images -> FID, sFID, Inception Score, precision, recall; rFID of a tokenizer; references of own images",
    ),
    "probe": (probe, "how much of the class a model knows at eight positions (the paper's Figure 4)"),
    "attention": (attention, "where every block looks, in numbers, curves and maps (Figures 1a, 2, 5, 7)"),
    "stability": (stability, "how many codes change when an image moves a little (Figure 1c)"),
    "figure6": (figure6, "the same seeds without guidance, a baseline above another run, in one picture (Figure 6)"),
    "report": (report, "run folder -> one HTML page with every picture and figure"),
    "demo": (demo, "a page in the browser that draws images of a class as they are asked for"),
    "doctor": (doctor, "what this machine has, and what is missing for what"),
    "presets": (presets, "the named runs: size, machine, command, published figure"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (see guard.guarded)."""
    settle_threads()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: star-fast COMMAND [options]    (star-fast COMMAND --help lists the options, star-fast "
            "--version the version)\n"
        )
        print("\n".join(f"  {name:9} {about}" for name, (_, about) in COMMANDS.items()))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import torch

        print(f"star_fast {__version__}, torch {torch.__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(
            f"error: unknown command {printable(repr(arguments[0]))}; expected one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    told: list[int] = []
    return guarded(lambda: told.append(COMMANDS[arguments[0]][0](arguments[1:]) or 0)) or told[0]


if __name__ == "__main__":
    sys.exit(main())

"""What a command line begins with, its brake: inputs that are tiny, missing or broken, so that it ends in a moment."""

from __future__ import annotations

from random import Random

from scripts.fuzzing import small_network
from scripts.fuzzing.option_values import BROKEN, CLASS_NAMES, FILES_TO_WRITE, HERE, NUMBERS, PLACES, WORDS
from star_fast import data_commands
from star_fast.evaluation.paper import EXHIBITS

HASH = "SHA256-OF-THE-WEIGHTS"  # in a line that is run, their hash stands in its place
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


# Its file says nothing of sizes; at 256 pixels, the usual one, an honest job would be taken for one that hangs.
_RELEASED = ("--tokenizer", "released/tokenizer.pt", "--image-size", "8")


def _prepare(random: Random, whole: bool) -> list[str]:
    place = random.choice(PLACES)
    if whole:
        return [
            "few",
            "--out",
            place,
            *random.choice((*[("--tokenizer", "store/tokenizer")] * 4, _RELEASED, _TINY, _TINY)),
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
    weights = ["--inception", small_network.WEIGHTS, "--inception-sha256", HASH]
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


SKELETONS = {
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

"""The paper's tables and figures as commands on ImageNet, with the values that it reports (arXiv 2509.15185).

Which weights the paper evaluates is not known, so every row is sampled from the student's and from the teacher's.
Baselines see one view an image and step, as LlamaGen trains; where a comparison at equal views says more, that baseline
stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

CODES, TOKENIZER, REFERENCE = "data/imagenet", "vq_ds16_c2i.pt", "VIRTUAL_imagenet256_labeled.npz"
SCALES = (1.5, 1.75, 2.0)  # of guidance, swept where the paper gives none
_RANKS = "torchrun --nproc-per-node 8 --no-python --"


class Values(NamedTuple):
    """What the ADM suite measures on 50 000 samples."""

    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None

    def __str__(self) -> str:
        names = ("FID", "sFID", "IS", "precision", "recall")
        return ", ".join(f"{name} {value:g}" for name, value in zip(names, self, strict=True) if value is not None)


class Row(NamedTuple):
    """One model of a table."""

    name: str
    preset: str  # to train it with; empty: a released file
    options: str  # of training, beside the preset
    reported: str  # what the paper reports
    released: str = ""  # LlamaGen's file, instead of a training


class Exhibit(NamedTuple):
    """A table or figure of the paper."""

    title: str
    rows: tuple[Row, ...]
    measures: str  # "samples": ADM metrics; "probe"; or the commands themselves, with {run} and {baseline}
    scales: tuple[float, ...] = (1.0,)  # of guidance
    notes: tuple[str, ...] = ()


def _pair(preset: str, plain: Values | None, st_ar: Values | None, name: str) -> list[Row]:
    rows = [] if plain is None else [Row(f"{name}, baseline", preset, "--plain", str(plain))]
    return rows + ([] if st_ar is None else [Row(f"{name} + ST-AR", preset, "", str(st_ar))])


def _released(size: str, values: Values) -> Row:
    return Row(
        f"{size}, 300 epochs, LlamaGen's released 384-pixel model scored at 256",
        "",
        "",
        str(values),
        f"c2i_{size}_384.pt",
    )


_TABLE_1 = (
    *_pair("B", Values(31.35, 8.75, 39.58, 0.57, 0.61), Values(26.58, 7.70, 49.91, 0.60, 0.62), "B, 50 epochs"),
    *_pair("B-300", Values(26.26, 9.22, 48.07, 0.59, 0.62), Values(18.44, 6.71, 66.18, 0.64, 0.62), "B, 300 epochs"),
    *_pair("L", Values(21.81, 8.77, 59.18, 0.62, 0.64), Values(12.59, 6.79, 91.19, 0.65, 0.64), "L, 50 epochs"),
    *_pair("L-300", Values(13.45, 8.32, 82.29, 0.66, 0.64), Values(9.38, 6.64, 112.71, 0.70, 0.65), "L, 300 epochs"),
    *_pair("XL", Values(19.42, 8.91, 66.20, 0.61, 0.67), Values(9.81, 6.94, 109.77, 0.71, 0.63), "XL, 50 epochs"),
    *_pair("XL-300", None, Values(6.20, 6.47, 147.47, 0.73, 0.65), "XL, 300 epochs"),
    _released("XL", Values(15.55)),
    _released("XXL", Values(14.65)),
    _released("3B", Values(9.38)),
)

_TABLE_2 = (
    *_pair("B-300", Values(5.46, 7.50, 193.61, 0.84, 0.46), Values(4.09, 6.72, 246.29, 0.86, 0.47), "B, 300 epochs"),
    *_pair("L-300", Values(3.81, 8.49, 248.28, 0.83, 0.52), Values(2.98, 6.44, 264.11, 0.85, 0.53), "L, 300 epochs"),
    *_pair("XL", Values(3.39, 7.02, 227.08, 0.81, 0.54), Values(2.72, 6.03, 254.59, 0.83, 0.57), "XL, 50 epochs"),
    *_pair("XL-300", None, Values(2.37, 6.05, 270.59, 0.82, 0.58), "XL, 300 epochs"),
    _released("B", Values(6.09)),
    _released("L", Values(3.08)),
    _released("XL", Values(2.63)),
)


def _ablation(name: str, options: str, fid: float, probe: float | None = None) -> Row:
    return Row(name, "B", options, f"{Values(fid)}" + (f", probe {probe:g} %" if probe is not None else ""))


EXHIBITS: dict[str, Exhibit] = {
    "table1": Exhibit(
        "Table 1: ImageNet 256 x 256 without guidance",
        _TABLE_1,
        "samples",
        notes=("the baselines' rows at 300 epochs of XL and above are released 384-pixel models",),
    ),
    "table2": Exhibit(
        "Table 2: with guidance",
        _TABLE_2,
        "samples",
        SCALES,
        (
            "the paper gives no scale: it says LlamaGen's sampling strategy; its B figure at 256 pixels is a run "
            "at 2.0, others are swept",
        ),
    ),
    "table3": Exhibit(
        "Table 3: the losses (B, 50 epochs)",
        (
            _ablation("baseline", "--plain", 31.35, 18.68),
            _ablation("masked features", "--method.contrast-weight 0", 30.58, 22.71),
            _ablation("masked features, between steps", "--method.view-contrast False", 28.02, 27.73),
            _ablation("masked features, between views", "--method.step-contrast False", 27.78, 38.31),
            _ablation("all three", "", 26.58, 45.27),
        ),
        "samples and probe",
        notes=(
            "the baseline at equal views a step: --plain --method.views 2; the probe's figure is that of the last "
            "position",
            "in small, on a CPU: scripts/small_study.sh",
        ),
    ),
    "table4": Exhibit(
        "Table 4: the mask ratio (B, 50 epochs)",
        tuple(
            _ablation(f"r = {ratio}", f"--method.mask-ratio {ratio}", fid)
            for ratio, fid in ((0.15, 28.62), (0.25, 26.58), (0.35, 26.36), (0.45, 27.50))
        ),
        "samples",
    ),
    "table5": Exhibit(
        "Table 5: the depth of contrast (B, 50 epochs, 12 blocks)",
        tuple(
            _ablation(f"after block {block}", f"--method.contrast-depth {block}", fid)
            for block, fid in ((3, 27.34), (6, 26.58), (9, 28.76), (12, 29.45))
        ),
        "samples",
    ),
    "table6": Exhibit(
        "Table 6: positions contrasted (B, 50 epochs)",
        tuple(
            _ablation(f"K = {count}", f"--method.contrast-positions {count}", fid)
            for count, fid in ((2, 27.50), (4, 26.58), (8, 26.54), (16, 25.78))
        ),
        "samples",
    ),
    "figure4": Exhibit(
        "Figure 4: linear probe by position",
        (
            Row("baseline, 50 epochs", "B", "--plain", "6 10 16 20 23 23 21 19 % (read off the figure)"),
            Row("baseline, 300 epochs", "B-300", "--plain", "6 12 18 24 26 27 24 21 %"),
            Row("ST-AR, 50 epochs", "B", "", "9 18 28 37 42 44 45 45 %"),
            Row("ST-AR, 300 epochs", "B-300", "", "11 24 36 45 51 54 55 55 %"),
        ),
        "probe",
    ),
    "figure2": Exhibit(
        "Figures 1a, 2, 5: attention maps",
        (
            Row("baseline", "B", "--plain", "looks at neighbours and the class position"),
            Row("ST-AR", "B", "", "looks at the object"),
        ),
        "star-fast attention --run {run} --against {baseline}",
    ),
    "figure1c": Exhibit(
        "Figure 1c: tokens of two slightly different crops", (), f"star-fast stability --codes {CODES}"
    ),
    "figure6": Exhibit(
        "Figure 6: the same seeds without guidance",
        (Row("baseline", "L", "--plain", "a picture"), Row("ST-AR", "L", "", "a picture")),
        "star-fast figure6 --run {run} --against {baseline}",
    ),
}


def run_folder(row: Row) -> str:
    """Where a row's run goes."""
    words = [word.removeprefix("--method.").removeprefix("--") for word in row.options.split()]
    return "runs/" + "-".join([row.preset, *words]) if row.preset else row.released


def commands(row: Row, exhibit: Exhibit) -> Iterator[str]:
    """What makes and measures one row, line by line."""
    run = run_folder(row)
    if row.preset:
        yield " ".join(
            f"deepspeed star_fast/train.py --preset {row.preset} {row.options} --data.codes {CODES} --run {run}".split()
        )
    if "samples" in exhibit.measures:
        for weights in ("student", "teacher") if row.preset and "--plain" not in row.options else ("student",):
            for scale in exhibit.scales:
                name = (
                    f"{run}/{weights}-{scale:g}" if row.preset else f"runs/{row.released.removesuffix('.pt')}-{scale:g}"
                )
                model = (
                    f"{run}/model --weights {weights}"
                    if row.preset
                    else f"{row.released} --tokenizer {TOKENIZER} --pixels 256"
                )
                yield (
                    f"{_RANKS} star-fast sample --model {model} --images 50000 --labels random --guidance {scale:g} "
                    f"--out {name}.npz"
                )
                yield (
                    f"star-fast evaluate --samples {name}.npz --reference {REFERENCE} --protocol adm-imagenet-256 "
                    f"--out {name}.json"
                )
    if "probe" in exhibit.measures:
        yield f"star-fast probe --run {run}"


def text(name: str, codes_command: str, days: Sequence[str] = ()) -> Iterator[str]:
    """An exhibit for people: title and notes, the codes' command, then each row with what the paper reports and its
    commands.

    Args:
        codes_command: makes the codes. days: what each row's training takes, to be said beside it.
    """
    exhibit = EXHIBITS[name]
    yield f"# {exhibit.title}"
    yield from (f"# ({note})" for note in exhibit.notes)
    yield (
        "# Whether the paper samples from the student's weights or the teacher's is not known: both are measured."
        if "samples" in exhibit.measures
        else ""
    )
    yield codes_command.replace("CODES", CODES)
    for number, row in enumerate(exhibit.rows):
        cost = f"; {days[number]}" if number < len(days) and days[number] else ""
        yield f"\n# {row.name}; reported: {row.reported}{cost}"
        yield from commands(row, exhibit)
    if exhibit.measures.startswith("star-fast"):
        folders = {"run": run_folder(exhibit.rows[-1]), "baseline": run_folder(exhibit.rows[0])} if exhibit.rows else {}
        yield "\n" + exhibit.measures.format(**folders)

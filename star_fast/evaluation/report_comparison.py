"""Two reports side by side: `star-fast report --run A --against B`, where B has a report of its own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from star_fast.errors import UserError
from star_fast.evaluation import page, plots
from star_fast.evaluation.wording import nats, number, percent
from star_fast.records import from_dict, require
from star_fast.storage import read_json, to_record

FORMAT_VERSION = 1


@dataclass(frozen=True)
class MethodFigures:
    """Of the run's settings, those of the method."""

    views: int | None = None


@dataclass(frozen=True)
class ConfigFigures:
    """Of the run's settings, those that are compared."""

    method: MethodFigures


@dataclass(frozen=True)
class TrainedFigures:
    """What was trained, on what, for how long."""

    tokenizer_sha256: str
    source: dict[str, Any]
    train_images: int
    held_out_images: int
    weights: str
    config: ConfigFigures
    step: int | None = None
    images_seen: int | None = None
    last_val_ar: float | None = None


@dataclass(frozen=True)
class ProbeFigures:
    """The linear probe."""

    positions: list[int]
    held_out: list[float]
    chance: float
    depth: int
    epochs: int
    train_views: int
    train_images: int

    def __post_init__(self) -> None:
        require(
            len(self.positions) == len(self.held_out) > 0,
            "probe.held_out",
            self.held_out,
            "one share for each of probe.positions",
        )
        require(
            all(0 <= share <= 1 for share in (*self.held_out, self.chance)),
            "probe.held_out",
            self.held_out,
            "shares in [0, 1]",
        )


@dataclass(frozen=True)
class SampleFigures:
    """The samples."""

    settings: dict[str, Any]
    per_class: int
    classes: dict[str, Any]
    agreement: float | None = None


@dataclass(frozen=True)
class DistanceFigures:
    """The classifier Fréchet distance."""

    samples: float | None = None


@dataclass(frozen=True)
class ClassifierFigures:
    """What the small classifier said."""

    held_out_accuracy: float
    classifier_frechet_distance: DistanceFigures


@dataclass(frozen=True)
class AttentionFigures:
    """Where the last block looks."""

    to_class: float
    near: float
    far: float


@dataclass(frozen=True)
class Figures:
    """Of a report.json, what is compared; the schema of reading another run's."""

    run: str
    trained: TrainedFigures
    probe: ProbeFigures
    samples: SampleFigures
    attention: AttentionFigures
    classifier: ClassifierFigures | None = None


# Two reports are comparable where these agree.
_CONDITIONS: dict[str, Callable[[Figures], Any]] = {
    "tokenizer": lambda f: f.trained.tokenizer_sha256,
    "images": lambda f: (f.trained.source, f.trained.train_images, f.trained.held_out_images),
    "training steps": lambda f: f.trained.step,
    "images seen": lambda f: f.trained.images_seen,
    "weights shown": lambda f: f.trained.weights,
    "probed block": lambda f: f.probe.depth,
    "probe settings": lambda f: (f.probe.epochs, f.probe.train_views, f.probe.train_images),
    "sampler settings": lambda f: (f.samples.settings, f.samples.per_class, list(f.samples.classes)),
}

# Of Figures; what a report lacks, its row raises (_find)
_ROWS: dict[str, Callable[[Any], str]] = {
    "Steps": lambda f: number(f.trained.step),
    "Images seen": lambda f: number(f.trained.images_seen),
    "Views a step": lambda f: number(f.trained.config.method.views),
    "Held-out next-token loss, nats": lambda f: nats(f.trained.last_val_ar),
    "Linear probe, last position": lambda f: percent(f.probe.held_out[-1]),
    "Linear probe, best position": lambda f: percent(max(f.probe.held_out)),
    "Samples of the class asked for": lambda f: percent(f.samples.agreement),
    "Classifier's held-out accuracy": lambda f: percent(f.classifier.held_out_accuracy),
    "Classifier Fréchet distance": lambda f: f"{f.classifier.classifier_frechet_distance.samples:.2f}",
    "Attention to the class position": lambda f: percent(f.attention.to_class),
    "Attention to neighbouring cells": lambda f: percent(f.attention.near),
    "Attention to other cells": lambda f: percent(f.attention.far),
}


def read_other(folder: Path) -> Figures:
    """The figures of another run's report. Raises UserError when it has none, or none of this version."""
    file, hint = folder / "report.json", f"run `star-fast report --run {folder}` again"
    if not os.path.exists(file):  # of os.path: unlike Path.exists it raises for no name
        raise UserError(f"against: {folder} holds no report.json; run `star-fast report --run {folder}` first")
    values = read_json(file, hint)
    if values.get("format_version") != FORMAT_VERSION:
        raise UserError(f"against: {file} is not a report of this version; {hint}")
    return to_record(values, f"against: {file}", Figures, hint, ignore_unknown=True)


def comparison(figures: dict[str, Any], other: Figures) -> page.Section:
    """Both probe curves in one plot, the main figures in one table, and a warning where the two were not trained or
    measured alike.
    """
    ours = from_dict(Figures, figures, ignore_unknown=True)
    names = (f"{ours.run} (this)", f"{other.run} (other)") if ours.run == other.run else (ours.run, other.run)
    section = page.Section("comparison", f"Against {names[1]}")
    if differing := differences(ours, other):
        section.add(
            page.text(
                f"Not alike: the two runs differ in {', '.join(differing)}. What the table shows may come from that.",
                "note",
            )
        )
    curves = {name: dataclasses.asdict(each.probe) for name, each in zip(names, (ours, other), strict=True)}
    light, dark = (plots.probe_curves(curves, dark=dark) for dark in (False, True))
    last = [percent(each.probe.held_out[-1]) for each in (ours, other)]
    alt = f"Linear probe by position of {names[0]} (last position {last[0]}) and {names[1]} (last position {last[1]})."
    rows = [(name, _find(pick, ours), _find(pick, other)) for name, pick in _ROWS.items()]
    plot = page.figure(light, alt, "Both linear probes, each as its own report describes it.", dark=dark)
    section.add(page.group("plots", [plot, page.table(("", *names), rows, css_class="names")]))
    return section


def differences(ours: Figures, other: Figures) -> list[str]:
    """In which conditions two reports differ; numbers and names are shown, ours first."""
    named = []
    for name, pick in _CONDITIONS.items():
        here, there = pick(ours), pick(other)
        if here != there:
            simple = all(value is None or isinstance(value, int) or name == "weights shown" for value in (here, there))
            shown = [value if isinstance(value, str) else number(value) for value in (here, there)] if simple else []
            named.append(f"{name} ({shown[0]} here, {shown[1]} there)" if shown else name)
    return named


def _find(pick: Callable[[Any], str], figures: Figures) -> str:
    """A figure of a report that may lack it (no real images were given, no validation ran)."""
    try:
        return pick(figures)
    except (AttributeError, TypeError):
        return "not measured"

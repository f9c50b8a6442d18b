"""What a linear probe found: its figures, the table for a terminal, and another run's, read back."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from star_fast.errors import UserError
from star_fast.evaluation.limits import option
from star_fast.records import require
from star_fast.storage import read_record


@dataclass(frozen=True)
class DepthResult:
    """Top-1 accuracies after one block, one a position."""

    depth: int
    held_out: list[float]  # share of held-out images whose class is named
    train: list[float]  # the same of the training images that were learnt from (of their plain view)
    lr: float  # the learning rate of these two
    knn: list[float] | None  # of held-out images, by their nearest training images; None: not asked for
    # Of every learning rate: {"lr", "held_out", "kept_aside"}: accuracies, None where training ended in numbers that
    # are not finite, and (with one rate) where none are kept aside.
    by_lr: list[dict[str, Any]]


@dataclass(frozen=True)
class ProbeResult:
    """Top-1 accuracies, one a position, of the first depth; of all of them in `depths`."""

    positions: list[int]
    held_out: list[float]
    train: list[float]
    depth: int
    held_out_images: int
    train_images: int
    chance: float  # share of the commonest class among the held-out images
    judged_on: str  # what `held_out` are; where none are held out, others
    lr: float
    knn: list[float] | None
    kept_aside_images: int  # of the training images, to choose a learning rate on; not learnt from
    classes: int
    sequence: int  # codes of an image
    depths: list[DepthResult]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, the standard error of each accuracy included."""
        return {**dataclasses.asdict(self), "held_out_standard_error": self.errors(self.held_out)}

    def errors(self, shares: Sequence[float]) -> list[float]:
        """The standard error of each share of the held-out images."""
        return [math.sqrt(p * (1 - p) / self.held_out_images) for p in shares]


@dataclass(frozen=True)
class OtherProbe:
    """Of another run's probe.json, what is drawn."""

    positions: list[int]
    held_out: list[float]
    chance: float
    depth: int
    classes: int = 0  # of a file of an earlier version: not known
    sequence: int = 0

    def __post_init__(self) -> None:
        require(
            len(self.positions) == len(self.held_out) > 0, "held_out", self.held_out, "one share for each of positions"
        )
        require(
            all(0 <= share <= 1 for share in (*self.held_out, self.chance)),
            "held_out",
            self.held_out,
            "shares in [0, 1]",
        )


def read_probe(folder: Path) -> OtherProbe:
    """The probe of another run. Raises UserError when it has none."""
    file, hint = folder / "probe.json", f"run `star-fast probe --run {folder}` first"
    if not os.path.exists(file):
        raise UserError(f"{option('against')}: {folder} holds no probe.json; {hint}")
    return read_record(file, OtherProbe, hint, ignore_unknown=True)


def table(result: ProbeResult) -> str:
    """The result for a terminal: for each depth a table over positions, then what each learning rate gave."""
    lines = []
    for each in result.depths:
        lines += [
            f"after block {each.depth}, learning rate {each.lr:g}, top-1, %:",
            "  position  held-out           train" + ("    k-NN" if each.knn else ""),
        ]
        for place, position in enumerate(result.positions):
            share, error = each.held_out[place], result.errors(each.held_out)[place]
            near = f"  {100 * each.knn[place]:6.1f}" if each.knn else ""
            lines.append(
                f"  {position:8}  {100 * share:8.1f} ± {100 * error:4.1f}  {100 * each.train[place]:8.1f}{near}"
            )
        for rate in each.by_lr if len(each.by_lr) > 1 else ():
            kept, held = (
                f"{100 * sum(rate[key]) / len(rate[key]):.1f}" if rate[key] else "not finite"
                for key in ("kept_aside", "held_out")
            )
            lines.append(
                f"  learning rate {rate['lr']:g}: mean over positions {kept} on those kept aside, {held} on those "
                "judged"
            )
    aside = f", {result.kept_aside_images} kept aside to choose the learning rate" if result.kept_aside_images else ""
    basis = (
        f"% of {result.held_out_images} {result.judged_on}, learnt from {result.train_images}{aside}; chance "
        f"{100 * result.chance:.1f} %"
    )
    return "\n".join([*lines, basis])

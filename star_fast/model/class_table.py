"""Class embeddings of one data set as the start for another: rows are matched by the names of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from star_fast.errors import UserError
from star_fast.model.tensor_files import some


class ClassMatch(NamedTuple):
    """Where each class of a data set finds its embedding."""

    rows: tuple[int | None, ...]  # by class here: its number there, None where no class there has its name
    told: str  # what happened, in a line; empty where the classes are the same ones

    def table(self, fresh: Tensor, stored: Tensor) -> Tensor:
        """The table (classes here + 1, D): matched rows and the last one, the null class, of `stored` (classes there +
        1, D), the others of `fresh`.
        """
        table = fresh.clone()
        here = [number for number, row in enumerate(self.rows) if row is not None]
        there = [row for row in self.rows if row is not None]
        table[torch.tensor([*here, len(self.rows)])] = stored[torch.tensor([*there, len(stored) - 1])].to(table.dtype)
        return table


def match_classes(
    source: str | Path, there: int, names_there: Sequence[str] | None, here: int, names_here: Sequence[str] | None
) -> ClassMatch:
    """Match the classes of the weights at `source` with those of the data here.

    Equal lists of names are matched as they stand, and so are as many classes here as there where either side's names
    are not known (None, or the 'class 0', 'class 1' ... of imported codes). Else by name, exactly; of a name that
    occurs several times the first stands for the first, the second for the second, and so on.

    Raises:
        UserError: the numbers of classes differ and the names of one side are not known.
    """
    theirs, ours = _known(names_there), _known(names_here)
    if theirs is None or ours is None:
        if there != here:
            lacking = (
                f"give the names of its {there} classes with --init-class-names FILE (one a line, in the order of "
                "their numbers)"
                if theirs is None
                else "the data here has no class names, so none can be matched; prepare the codes from a folder with "
                "one subfolder per class"
            )
            raise UserError(f"{source}: weights of {there} classes, the data here has {here}: {lacking}")
        return ClassMatch(
            tuple(range(here)),
            "" if names_here is None else f"class embeddings: all {here} taken by number, since names are not known",
        )
    if theirs == ours:
        return ClassMatch(tuple(range(here)), "")
    places: dict[str, list[int]] = {}
    for number, name in reversed(list(enumerate(theirs))):
        places.setdefault(name, []).append(number)
    rows = tuple(places[name].pop() if places.get(name) else None for name in ours)
    fresh = [name for name, row in zip(ours, rows, strict=True) if row is None]
    return ClassMatch(
        rows,
        f"class embeddings: {here - len(fresh)} of {here} taken by name"
        + (f", {len(fresh)} fresh: {some(fresh)}" if fresh else ""),
    )


def _known(names: Sequence[str] | None) -> list[str] | None:
    if names is None or list(names) == [f"class {number}" for number in range(len(names))]:
        return None
    return list(names)

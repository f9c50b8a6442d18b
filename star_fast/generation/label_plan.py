"""Which class each image gets: a function of the image's index, the plan and the seed alone."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from star_fast.errors import UserError

Plan = Literal["balanced", "random"]
_NAMES_SHOWN = 20
_NAME_SHOWN = 60  # letters
_MOST_DIGITS = 18  # of a class number: Python takes seconds over a thousand times as many, or refuses them


def plan_labels(images: int, classes: Sequence[int], plan: Plan, seed: int) -> np.ndarray:
    """(N,) int64 labels. "balanced": the classes in turn, so that any first n images are balanced too; "random": drawn
    uniformly (LlamaGen).
    """
    chosen = np.asarray(classes, dtype=np.int64)
    if plan == "random":
        return chosen[np.random.Generator(np.random.Philox(seed)).integers(len(chosen), size=images)]
    return chosen[np.arange(images) % len(chosen)]


def find_classes(wanted: Sequence[str | int], class_names: Sequence[str]) -> list[int]:
    """Labels of the classes asked for, by name or else by number; all classes if none is asked for.

    A name goes before a number: where classes are called "1", "2" ..., these are names.

    Raises:
        UserError: no such class; the line lists the names there are. Or a class asked for twice.
    """
    if not wanted:
        return list(range(len(class_names)))
    label_of: dict[str, int] = {}
    for label, name in enumerate(class_names):
        label_of.setdefault(name, label)
    found = []
    for one in map(str, wanted):
        if one in label_of:
            found.append(label_of[one])
        elif one.isdecimal() and len(one) <= _MOST_DIGITS and int(one) < len(class_names):
            found.append(int(one))
        else:
            near = ", ".join(map(_cut, difflib.get_close_matches(one[:_NAME_SHOWN], class_names, n=3)))
            raise UserError(
                f"classes: no class {_cut(one)!r}{f' (near: {near})' if near else ''}; there are "
                f"{_listed(class_names)}, "
                f"or numbers 0 ... {len(class_names) - 1}"
            )
    twice = sorted({class_names[label] for label in found if found.count(label) > 1})
    if twice:
        raise UserError(f"classes: each class once, got {_listed(twice)} more than once")
    return found


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(map(_cut, names[:_NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_SHOWN else name[: _NAME_SHOWN - 1] + "…"

"""The names of classes where the data or the weights know only numbers or WordNet ids: from a file, or ImageNet's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from star_fast.errors import UserError
from star_fast.storage import read_bytes

IMAGENET = "imagenet"  # stands for the names of ImageNet's 1000 classes wherever a file of names is asked for
_MOST_BYTES = 2**23  # the names of 200 000 classes
_HINT = f"expected a text file with one class name a line, in the order of the class numbers, or the word {IMAGENET}"
_FIRST_FIELD = re.compile(r"([^\s,]+)\s*[\s,]\s*(.*)")
WORDNET_ID = re.compile(r"n[0-9]{8}")


def read_class_names(path: str | Path) -> list[str]:
    """The names in a file: one a line, UTF-8, in the order of the class numbers; spaces around a name and empty lines
    at the end don't count.

    Where every line begins with a WordNet id (n01440764 tench), names are in the order of the ids, as ImageNet's
    classes are numbered, and without them. The word `imagenet` stands for ImageNet's own names.

    Raises:
        UserError: no such file, too large, not UTF-8, a line without a name; or torchvision, which knows ImageNet's
            names, is not installed.
    """
    if str(path) == IMAGENET:
        return imagenet_names()
    lines = read_lines(path)
    pairs = mapping_of(lines)
    if pairs is not None and all(WORDNET_ID.fullmatch(wnid) for wnid in pairs):
        ids = sorted(pairs)
        return unique([pairs[wnid] for wnid in ids], ids)
    return lines


def read_lines(path: str | Path) -> list[str]:
    """The lines of a file of names, without spaces around them. Raises UserError as `read_class_names` does."""
    try:
        lines = read_bytes(path, _HINT, _MOST_BYTES).decode("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; {_HINT}") from error
    names = [line.strip() for line in lines]
    for number, name in enumerate(names, 1):
        if not name:
            raise UserError(f"{path}, line {number}: no name; {_HINT}")
    return names


def mapping_of(lines: Sequence[str]) -> dict[str, str] | None:
    """Lines of a first field, then a space, tab or comma, then words, as a mapping; None where a line is no such thing
    or a first field occurs twice.
    """
    found = [_FIRST_FIELD.fullmatch(line) for line in lines]
    if not all(match and match[2] for match in found):
        return None
    pairs = {match[1]: match[2].strip() for match in found if match}
    return pairs if len(pairs) == len(lines) else None


def unique(names: Sequence[str], tags: Sequence[str]) -> list[str]:
    """The names, with the tag in brackets after each that occurs more than once: crane (n02012849)."""
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({tag})" for name, tag in zip(names, tags, strict=True)]


def imagenet_names() -> list[str]:
    """The names of ImageNet's 1000 classes, in the order of their WordNet ids, as torchvision's classifiers give them;
    each is there once.
    """
    try:
        from torchvision.models import ResNet18_Weights  # takes a second: only when asked for
    except ImportError as error:
        raise UserError(
            f"class names {IMAGENET!r}: they come with torchvision, which is not installed: pip install "
            "'star_fast[eval]', or give a "
            "file"
        ) from error
    names = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    # The same two words named two classes each before torchvision told them apart
    return unique(names, [str(number) for number in range(len(names))])


def names_for_model(names: Sequence[str], given: str) -> list[str]:
    """The names of a model's classes: its own, or those `given` (a file as for `read_class_names`, or `imagenet`) where
    it knows only numbers.

    Raises:
        UserError: the model has names of its own, or another number of classes; or as `read_class_names`.
    """
    if not given:
        return list(names)
    if not are_numbers(names):
        raise UserError(
            "class_names: the model has names of its own "
            f"({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}); leave the option out"
        )
    found = read_class_names(given)
    if len(found) != len(names):
        raise UserError(
            f"class_names: the model has {len(names)} classes, {given} has {len(found)} names; expected one for each"
        )
    return unique(found, [str(number) for number in range(len(found))])


def are_numbers(names: Sequence[str]) -> bool:
    """Whether classes are called by their numbers alone: '0', '1' ... as in released weights, or 'class 0' ... as in
    imported codes.
    """
    return all(name in (str(number), f"class {number}") for number, name in enumerate(names))

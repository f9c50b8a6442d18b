"""Words for classes that the source of the images knows by number or WordNet id."""

from __future__ import annotations

from collections.abc import Sequence

from star_fast.data.image_source import DataError, is_number
from star_fast.model.class_names import (
    IMAGENET,
    WORDNET_ID,
    are_numbers,
    imagenet_names,
    mapping_of,
    read_lines,
    unique,
)

_SHOWN = 60


def renamed_classes(names: Sequence[str], given: str) -> tuple[str, ...]:
    """The classes of a source, in their order, under the names that a file gives them.

    Args:
        names: as the source has them: names of folders, numbers.
        given: a file with lines "NAME words ..." (separated by space, tab or comma), whose first fields are the
            source's names, as ImageNet's LOC_synset_mapping.txt; or with one name a line in the order of the classes;
            or `imagenet`.

    Where the classes are whole numbers and there are more names than classes, the numbers say which names: some classes
    may have no image.

    Raises:
        DataError: the file names other classes, or another number of them. UserError: it cannot be read.
    """
    if given == IMAGENET:
        _require_imagenet(names)
        return _in_order(names, imagenet_names(), given)
    lines = read_lines(given)
    pairs = mapping_of(lines)
    if pairs is not None and any(name in pairs for name in names):
        if unknown := [name for name in names if name not in pairs]:
            raise DataError(
                f"{given}: has no line for class "
                f"{unknown[0][:_SHOWN]!r}{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}; expected "
                f"one for each of the {len(names)} classes, or a plain list of {len(names)} names"
            )
        return tuple(unique([pairs[name] for name in names], names))
    return _in_order(names, lines, given)


def _require_imagenet(names: Sequence[str]) -> None:
    ordered = list(names) == sorted(names) and all(WORDNET_ID.fullmatch(name) for name in names) and len(names) == 1000
    if not ordered and not are_numbers(names) and not all(map(is_number, names)):
        raise DataError(
            f"class names {IMAGENET!r}: expected 1000 classes called by WordNet id (n01440764 ...) or by number, "
            f"got {len(names)}: "
            f"{', '.join(names[:3])[:_SHOWN]} ...; give a file with a line for each class: its id, then its name"
        )


def _in_order(names: Sequence[str], given: Sequence[str], where: str) -> tuple[str, ...]:
    """The names given for classes 0, 1 ...; picked by number where the classes are numbers and fewer."""
    if len(given) == len(names):
        return tuple(unique(given, names))
    if all(map(is_number, names)) and max(map(int, names)) < len(given):
        return tuple(unique(given, [str(number) for number in range(len(given))])[int(name)] for name in names)
    raise DataError(
        f"{where}: expected {len(names)} names, one a line for each class, or lines that begin with the names of "
        "the classes "
        f"({', '.join(names[:3])[:_SHOWN]} ...); got {len(given)} lines, the first {given[0][:_SHOWN]!r}"
    )

"""A font for every name in a picture: one that has its letters, else the letters that no font here has as escapes.
Never a box.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import ImageFont

from star_fast.errors import printable

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_PRETENDERS = ("lastresort", "adobeblank")  # fonts that have a box, or nothing, for every letter there is


def write_with(names: Sequence[str], size: int, longest: int = 24) -> list[tuple[str, Font]]:
    """For each name what to write, on one line of at most `longest` letters, and the font that has them."""
    names = [_shortened([printable(letter) for letter in name], longest) for name in names]
    if all(name.replace("…", "").isascii() for name in names):
        return [(name, ImageFont.load_default(size)) for name in names]
    return [_fitting(name, size, longest) for name in names]


def _fitting(name: str, size: int, longest: int) -> tuple[str, Font]:
    first = None
    for file in _font_files():
        missing = {letter for letter in name if ord(letter) not in _letters(file)}
        font = _open(file, size) if not missing or first is None else None
        if font is None:
            continue
        if not missing:
            return name, font
        first = font, missing
    font, missing = first or (ImageFont.load_default(size), {letter for letter in name if not letter.isascii()})
    return _shortened([_escaped(letter) if letter in missing else letter for letter in name], longest), font


def _font_files() -> Iterator[str]:
    """DejaVu Sans (Latin, Greek, Cyrillic, Arabic, Hebrew ...), which matplotlib carries, then what the machine has."""
    import matplotlib

    carried = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    if carried.exists():
        yield str(carried)
    yield from _system_fonts()


@functools.cache
def _system_fonts() -> tuple[str, ...]:
    from matplotlib import font_manager  # reads every font of the machine when it is first loaded

    files = sorted(font_manager.findSystemFonts())
    return tuple(
        file for file in files if not any(name in Path(file).name.lower().replace(" ", "") for name in _PRETENDERS)
    )


@functools.lru_cache(maxsize=256)
def _letters(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (RuntimeError, OSError, ValueError):
        return frozenset()


def _open(file: str, size: int) -> Font | None:
    try:
        font = ImageFont.truetype(file, size)
        font.getlength("a")  # a font of pictures has one size only
    except (OSError, ValueError):
        return None
    return font


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def _shortened(pieces: Sequence[str], longest: int) -> str:
    """The pieces together, or as many whole ones as leave room for an ellipsis."""
    if sum(map(len, pieces)) <= longest:
        return "".join(pieces)
    kept, room = [], longest - 1
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            break
        kept.append(piece)
    return "".join(kept) + "…"

"""The picture of samples: every name can be read, in whatever script, and never is a box drawn."""

from __future__ import annotations

import matplotlib.font_manager
import numpy as np
import pytest
from PIL import ImageFont

from star_fast.generation import fonts
from star_fast.generation.grid import draw_grid

NAMES = ["größe", "кот", "猫", "a\nb", "plain", "mixed 猫 кот", "\x1b[31mred", "كلب", "\udcff.png", ""]


def looks(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    mask = font.getmask(letter)
    return bytes(mask) + repr(mask.size).encode()


def has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a font draws more than the box that it draws for letters that do not exist."""
    return letter == " " or looks(font, letter) != looks(font, "\u0378")


@pytest.fixture
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_system_fonts", lambda: ())


@pytest.mark.usefixtures("no_system_fonts")
def test_no_name_is_drawn_as_boxes() -> None:
    written = fonts.write_with(NAMES, 14)
    assert [text for text, _ in written] == [
        "größe",
        "кот",
        r"\u732b",
        r"a\nb",
        "plain",
        r"mixed \u732b кот",
        r"\x1b[31mred",
        "كلب",
        r"\udcff.png",
        "",
    ]
    for text, font in written:
        assert all(has(font, letter) for letter in text), text
    assert not has(written[0][1], "猫")  # the test can tell


def test_letters_of_other_scripts_come_from_the_machines_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A font that has the letters is found, after one that cannot be read; a font of pictures that cannot be drawn with
    is passed over.
    """
    monkeypatch.setattr(
        matplotlib.font_manager, "findSystemFonts", lambda: ["/c/good.ttf", "/a/broken.ttf", "/b/LastResort.otf"]
    )
    fonts._system_fonts.cache_clear()
    letters, carried = fonts._letters, next(fonts._font_files())
    try:
        monkeypatch.setattr(
            fonts,
            "_letters",
            lambda file: {"/c/good.ttf": frozenset(map(ord, "猫a"))}.get(
                file, letters(file) if file == carried else frozenset()
            ),
        )
        opened = []
        monkeypatch.setattr(fonts, "_open", lambda file, size: opened.append(file) or f"font {file}")
        assert fonts.write_with(["猫", "犬"], 14) == [("猫", "font /c/good.ttf"), (r"\u72ac", f"font {carried}")]
        assert "/b/LastResort.otf" not in opened
    finally:
        fonts._system_fonts.cache_clear()


@pytest.mark.usefixtures("no_system_fonts")
def test_without_any_font_file_the_built_in_one_writes_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_font_files", lambda: iter(()))
    assert [text for text, _ in fonts.write_with(["größe", "кот"], 14)] == [r"gr\xf6\xdfe", r"\u043a\u043e\u0442"]


@pytest.mark.usefixtures("no_system_fonts")
def test_long_names_end_in_an_ellipsis_never_amid_an_escape() -> None:
    written = [text for text, _ in fonts.write_with(["x" * 24, "x" * 25, "猫" * 9, "\x1b" * 9], 14)]
    assert written == ["x" * 24, "x" * 23 + "…", r"\u732b\u732b\u732b…", r"\x1b\x1b\x1b\x1b\x1b…"]


@pytest.mark.usefixtures("no_system_fonts")
def test_a_grid_of_any_names_is_drawn() -> None:
    images = np.zeros((len(NAMES), 28, 28, 3), np.uint8)
    picture = np.asarray(draw_grid(images, np.arange(len(NAMES)), NAMES))
    assert picture.shape[0] == 4 + len(NAMES) * 60
    left = picture.shape[1] - 60
    inked = [(picture[4 + row * 60 : 60 + row * 60, :left] < 100).any() for row in range(len(NAMES))]
    assert inked == [bool(name) for name in NAMES]


def test_labels_without_a_name_are_refused() -> None:
    for label in (-1, 3):
        with pytest.raises(ValueError, match=r"labels must lie in 0 \.\.\. 2"):
            draw_grid(np.zeros((1, 28, 28, 3), np.uint8), np.array([label]), ["a", "b", "c"])

"""What is tried: the files of file_table.py, pictures, odd names, odd entries in a run's folder, command lines; and how
each input is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

from scripts.fuzzing import (
    bytes_damage,
    command_lines,
    evaluation_readers,
    images,
    readers,
    safetensors_damage,
    tar_damage,
    tensor_damage,
    text_damage,
    zip_damage,
)
from scripts.fuzzing.file_table import CHECKPOINT, ROWS, Damage, Row
from scripts.fuzzing.trial import HOLES, IRREGULAR, Case, Subject

_IRREGULAR_SHARE, _EMPTY_SHARE = 0.04, 0.01
# Of the rest: damage that knows the format; most other damage to a container ends at its first check
_KNOWING_SHARE, _KNOWING_OF_CONTAINERS = 0.6, 0.8
_CONTAINERS = (".pt", ".pth", ".npz", ".safetensors", ".tar")
_FITTING_SHARE = 0.7  # of files with checksums: these are made to fit

_DAMAGE: dict[str, Damage] = {
    ".json": text_damage.damaged_json,
    ".lock": text_damage.damaged_json,
    ".jsonl": text_damage.damaged_lines,
    ".yaml": text_damage.damaged_yaml,
    ".safetensors": safetensors_damage.damaged_safetensors,
    ".pt": tensor_damage.damaged_torch,
    ".npy": zip_damage.damaged_npy,
    ".npz": zip_damage.damaged_npz,
    ".pth": tensor_damage.damaged_torch,
    ".csv": text_damage.damaged_table,
    ".txt": text_damage.damaged_table,
    ".tar": tar_damage.damaged_tar,
    ".bin": bytes_damage.damaged,
    ".bf16": bytes_damage.damaged,
    ".journal": bytes_damage.damaged,
}


_ODD_NAMES = (
    "a",
    "bär",
    "猫",
    "\udcff\udc80",
    "a\nb",
    "a\r\nb",
    "\x1b[31mred",
    "\x1b]0;t\x07",
    "\u202eabc",
    "\x7f",
    "\u2028",
    "-x",
    "--help",
    " ",
    ".hidden",
    "..a",
    "'",
    '"',
    "<b>&amp;",
    "%s",
    "{x}",
    "$HOME",
    "`id`",
    "~",
    "*",
    "x" * 240,
    "é" * 120,
    "a\tb",
    "null",
    "0",
    "classes",
    "\ufeff",
    "a\udc80",
    "\u0301",
    "CON",
    "a.png",
    "digits",
)


def all_subjects() -> list[Subject]:
    """Every kind of file, then every command."""
    pictures = images.good_images()
    by_format = [
        (form, {name: data for name, data in pictures.items() if name.endswith(suffix)})
        for form, suffix in images.FORMATS.items()
    ]
    return [
        *map(_subject, ROWS),
        *(
            Subject(
                f"image: {form}",
                readers.picture.__doc__ or "",
                _image_maker(of_it, list(pictures.values())),
                readers.picture,
                3,
                clean=("pictures",),
            )
            for form, of_it in by_format
        ),
        Subject(
            "image folder, evaluate",
            evaluation_readers.image_folder.__doc__ or "",
            _image_maker(pictures, list(pictures.values()), "gallery/a"),
            evaluation_readers.image_folder,
            2,
            clean=("gallery", "out"),
        ),
        Subject(
            "image folder, names, evaluate",
            evaluation_readers.image_folder.__doc__ or "",
            _odd_names("gallery"),
            evaluation_readers.image_folder,
            0.5,
            clean=("gallery", "out"),
        ),
        Subject(
            "image folder, names",
            readers.names.__doc__ or "",
            _odd_names("pictures"),
            readers.names,
            0.7,
            clean=("pictures",),
        ),
        Subject(
            "run folder, entries",
            readers.run_folder.__doc__ or "",
            _odd_entries,
            readers.run_folder,
            0.7,
            clean=("run",),
            start=readers.engine,
        ),
        *command_lines.subjects(),
    ]


def _subject(row: Row) -> Subject:
    damage = row.damage or _DAMAGE[Path(row.file).suffix or Path(row.file).name]
    checksum_files = (f"{row.file.rsplit('/', 1)[0]}/{row.fit.file}",) if row.fit else ()

    def make(random: Random, good: Path) -> Case:
        return damaged_file(
            random,
            row.file,
            _bytes_of(good / row.file),
            _bytes_of(good / "store/manifest.json"),
            damage,
            checksum_files,
        )

    return Subject(
        row.name,
        row.read.__doc__ or "",
        make,
        row.read,
        row.share,
        start=row.start,
        clean=(row.clean,) if row.clean else (),
        repair=row.fit.make if row.fit else None,
    )


def damaged_file(
    random: Random, file: str, data: bytes, other: bytes, damage: Damage, repairs: tuple[str, ...] = ()
) -> Case:
    """The file irregular, empty, or damaged by what knows its format, by what does not, or by both."""
    kind = random.random()
    if kind < _IRREGULAR_SHARE:
        return irregular(random, file)
    if kind < _IRREGULAR_SHARE + _EMPTY_SHARE:
        return Case("empty", file, b"")
    changes, knowing = [], random.random() < (_KNOWING_OF_CONTAINERS if file.endswith(_CONTAINERS) else _KNOWING_SHARE)
    for way in [damage] * knowing + [bytes_damage.damaged] * random.choice(
        (0, 0, 0, 0, 1) if knowing else (1, 1, 2, 3)
    ):
        change, data = way(random, data, other)
        changes.append(change)
    return Case("; ".join(changes), file, data, repairs=repairs if random.random() < _FITTING_SHARE else ())


def irregular(random: Random, file: str) -> Case:
    """Something else in the file's place; large files take time and are rare."""
    way = random.choice(list(HOLES) if random.random() < 0.04 else [name for name in IRREGULAR if name not in HOLES])
    return Case(way, file, irregular=way)


def _image_maker(
    pictures: dict[str, bytes], others: list[bytes], folder: str = "pictures/a"
) -> Callable[[Random, Path], Case]:
    def make(random: Random, good: Path) -> Case:
        name = random.choice(list(pictures))
        case = damaged_file(random, f"{folder}/{name}", pictures[name], random.choice(others), images.damaged_image)
        if case.content and case.content.startswith(bytes_damage.MAGIC["PNG"]) and random.random() < 0.5:
            return replace(
                case, change=f"{case.change}; checksums made right", content=images.with_png_checksums(case.content)
            )
        return case

    return make


_ODD_PLACES = (
    "run/checkpoints/step-0000009",
    "run/checkpoints/step-0000009.tmp",
    "run/checkpoints/step-0000003/x",
    "run/checkpoints/step-0000003/model/x",
    "run/checkpoints/step-99999999999999999999",
    "run/checkpoints/step-x",
    "run/checkpoints/x",
    f"{CHECKPOINT}/model",
    "run/checkpoints",
    "run/.lock",
    "run/.config.yaml.1.tmp",
    "run/.model.1.tmp",
    "run/.model.1.old",
    "run/.checkpoints.1.tmp",
    "run/model",
    "run/model/x",
    "run/model/tokenizer",
    "run/config.yaml",
    "run/metrics.jsonl",
)


def _odd_entries(random: Random, good: Path) -> Case:
    """Something in a run folder that does not belong there, or something else than what does."""
    place = random.choice(_ODD_PLACES)
    return (
        irregular(random, place)
        if random.random() < 0.7
        else Case("a file", place, random.choice((b"", b"{}", b"\x1b[31m")))
    )


def _odd_names(root: str) -> Callable[[Random, Path], Case]:
    def make(random: Random, good: Path) -> Case:
        folders = "/".join(random.choice(_ODD_NAMES) for _ in range(random.choice((1, 1, 1, 2, 3))))
        name = random.choice(_ODD_NAMES) + random.choice((".png", ".png", ".png", ".PNG", ".jpg", ".txt", ""))
        place = random.choice((f"{folders}/{name}", f"{folders}/{name}", f"{folders}/{name}", name))
        if random.random() < 0.15:
            return irregular(random, f"{root}/{place}")
        content = _bytes_of(good / "images/7/0.png") if random.random() < 0.7 else b"\x89PNG\x1b[31m\nno"
        return Case(f"named {place!r}", f"{root}/{place}", content)

    return make


@functools.cache
def _bytes_of(path: Path) -> bytes:
    return path.read_bytes()

"""The ways to make the views of files that benchmarks/loading.py measures side by side: a DataLoader that does what
LlamaGen does, Pillow in threads, DALI; each with the CPU seconds that it takes.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from star_fast.config import DataConfig
from star_fast.data.dali import DaliSquares
from star_fast.data.decoding import decode_image
from star_fast.data.views import cut_views, make_squares, square_sizes

SIDE, THREADS = 256, 2
TICKS = os.sysconf("SC_CLK_TCK")


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The published centre crop, as it is written there: through NumPy at the end."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return Image.fromarray(pixels[top : top + size, left : left + size])


class Files(torch.utils.data.Dataset):
    """What LlamaGen's extraction loads: ten crops of an image as float32, normalised."""

    def __init__(self, files: list[bytes], size: int) -> None:
        from torchvision import transforms

        self.files = files
        self.transform = transforms.Compose(
            [
                functools.partial(adm_crop, size=size),
                transforms.TenCrop(SIDE),
                lambda crops: torch.stack([transforms.ToTensor()(crop) for crop in crops]),
                transforms.Normalize([0.5] * 3, [0.5] * 3, inplace=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(io.BytesIO(self.files[index])).convert("RGB"))


class Turns(torch.utils.data.Sampler):
    """Which files the next turn is about; the workers of a loader stay alive between turns."""

    def __init__(self) -> None:
        self.places: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def cpu_seconds() -> float:
    """User and system time so far of this process and its children."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


class Candidate:
    """A way to make the views of files, with the CPU seconds of each of its turns."""

    def __init__(self, make: Callable[[list[int]], int], files: int, a_turn: int) -> None:
        self.make, self.files, self.a_turn, self.turn, self.cpu = make, files, a_turn, 0, []

    def __call__(self) -> None:
        start = self.turn * self.a_turn % self.files
        self.turn += 1
        before = cpu_seconds()
        made = self.make(list(range(start, start + self.a_turn)))
        assert made == self.a_turn, made
        self.cpu.append((cpu_seconds() - before) / self.a_turn)


def by_loader(files: list[bytes], sizes: tuple[int, ...], batch: int) -> Callable[[list[int]], int]:
    """The published way: one extraction for each crop range."""
    turns = Turns()
    loaders = [
        torch.utils.data.DataLoader(
            Files(files, size), batch_size=batch, sampler=turns, num_workers=THREADS, persistent_workers=True
        )
        for size in sizes
    ]

    def make(places: list[int]) -> int:
        turns.places = places
        made = [sum(len(crops) for crops in loader) for loader in loaders]
        assert len(set(made)) == 1
        return made[0]

    return make


def by_pillow(files: list[bytes], data: DataConfig, pool: ThreadPoolExecutor) -> Callable[[list[int]], int]:
    """star_fast's threads."""
    sizes = square_sizes(data, SIDE)

    def views(place: int) -> np.ndarray:
        return cut_views(make_squares(decode_image(files[place]), sizes, 3), place, data, SIDE)

    return lambda places: sum(len(found) == 10 * len(sizes) for found in pool.map(views, places))


def by_dali(
    files: list[bytes], data: DataConfig, pool: ThreadPoolExecutor, squares: DaliSquares
) -> Callable[[list[int]], int]:
    """DALI decodes, or on a GPU resizes too; views are cut from its squares."""

    def views(found: Any) -> np.ndarray:
        return cut_views(
            [np.asarray(square.cpu() if isinstance(square, torch.Tensor) else square) for square in found],
            0,
            data,
            SIDE,
        )

    return lambda places: sum(
        len(found) == 10 * len(squares.sizes) for found in pool.map(views, squares([files[place] for place in places]))
    )


def by_decoder(files: list[bytes], pool: ThreadPoolExecutor) -> Callable[[list[int]], int]:
    """Decoding and nothing after it: what is left when crops cost nothing."""
    return lambda places: sum(
        image.width > 0 for image in pool.map(lambda place: decode_image(files[place]).convert("RGB"), places)
    )

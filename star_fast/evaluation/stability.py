"""`star-fast stability`: how many of an image's codes change when it moves a little (the paper's Figure 1c): the
tokenizer promises no invariance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.data.codes import CodeStore
from star_fast.data.encoding import Encoder
from star_fast.data.origin import images_of
from star_fast.data.sources import ImageSource, UnreadableImage
from star_fast.data.views import make_squares
from star_fast.errors import UserError
from star_fast.evaluation.limits import MOST_COUNT, explain_out_of_memory, option, require_ranges
from star_fast.evaluation.real_images import stored_views
from star_fast.evaluation.runs import codes_of, only_result, open_run, spread
from star_fast.evaluation.stability_plot import MovedImage, draw_moves
from star_fast.generation.device import take_device
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import VQTokenizer, at_size
from star_fast.records import require
from star_fast.storage import atomic_write_bytes, atomic_write_json

CROP_RANGES = (1.1, 1.05)  # of LlamaGen's two extractions
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))  # right, left, down, up
_MOST_SHIFT = 2**10


@dataclass(frozen=True)
class StabilityConfig:
    """Write stability.json and stability.png: which codes stay when the crop of an image is shifted by some pixels, or
    cut at range 1.05 instead of 1.1.
    """

    run: str = ""  # a run folder, whose code store is looked at; or:
    codes: str = ""  # a code store
    source: str = ""  # the images, if they are no longer where `star-fast prepare` found them
    tokenizer: str = ""  # the tokenizer that made the codes; empty: the one kept in the run, else in the store
    out: str = ""  # folder that is written to; empty: the run's, or the store's
    images: int = 64  # held-out images, evenly spaced
    shifts: tuple[int, ...] = ()  # pixels; empty: 1, 2, 4 ... up to one cell of the grid
    shown: int = 3  # images in the picture
    batch_views: int = 16  # crops encoded at once
    device: str = ""  # "cpu", "cuda"; empty: a GPU where there is one

    def __post_init__(self) -> None:
        require_ranges(self, {"images": (2, MOST_COUNT), "shown": (1, 64), "batch_views": (1, 2**16)})
        require(bool(self.run or self.codes), option("run"), self.run, "a run folder, or --codes with a code store")
        for shift in self.shifts:
            require(1 <= shift <= _MOST_SHIFT, option("shifts"), shift, f"pixels, 1 ... {_MOST_SHIFT}")
        for name in ("run", "codes", "out"):
            require("\0" not in getattr(self, name), option(name), getattr(self, name), "the name of a folder")


@dataclass(frozen=True)
class Move:
    """What one kind of move does to the codes."""

    name: str
    shift: int  # pixels; 0 where the crop range changes
    stay: float  # share of the codes that are the same at the same place, over images and (of shifts) four directions
    worst_image: float  # the same of the image where least stay
    # Of shifts by whole cells: share of the codes that are the same where the content has gone; None elsewhere
    follow: float | None
    repeated_edge: int  # pixels of the shift for which the image was not wide enough, so that its edge was repeated


def run_stability(config: StabilityConfig) -> str:
    """Measure and draw; returns the table for a terminal.

    Raises:
        UserError: where the images are is not known, or too few of them can be read.
    """
    device = take_device(config.device)
    run = open_run(config.run, codes=config.codes) if config.run else None
    store = run.store if run is not None else CodeStore.open(config.codes)
    own = run.model.tokenizer_folder if run is not None else None
    tokenizer = at_size(load_tokenizer(config.tokenizer or own or store.path / "tokenizer"), store.image_size)
    store.require_tokenizer(tokenizer.weights_hash())
    source = images_of(store, config.source)
    if source is None:
        raise UserError(f"{store.path}: does not say where its images are; give --source")
    out = Path(config.out or config.run or store.path)
    with (
        only_result(out / "stability.json", "looking at stability", ("stability.json", "stability.png")),
        explain_out_of_memory("give smaller --images or --batch-views"),
    ):
        figures, picture = _measure(store, tokenizer.to(device), source, config)
        settings = {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(config).items()
        }
        atomic_write_json(
            out / "stability.json", {**figures, "tokenizer_sha256": store.tokenizer_hash, "settings": settings}
        )
        atomic_write_bytes(out / "stability.png", picture)
    lines = [
        f"{out}: stability.json, stability.png",
        f"codes that stay, of {figures['images']} images:",
        "  move                      same place  worst image  with the content",
    ]
    lines += [
        f"  {move['name']:24}  {100 * move['stay']:8.1f} %  {100 * move['worst_image']:9.1f} %"
        + (f"  {100 * move['follow']:14.1f} %" if move["follow"] is not None else "")
        for move in figures["moves"]
    ]
    lines.append(f"  {'another image instead':24}  {100 * figures['other_image']:8.1f} %")
    lines += [f"  left out: {each['key']}: {each['reason']}" for each in figures["skipped"]]
    return "\n".join(lines)


def _measure(
    store: CodeStore, tokenizer: VQTokenizer, source: ImageSource, config: StabilityConfig
) -> tuple[dict[str, Any], bytes]:
    views, side = stored_views(store), store.image_size
    grid, cell = store.grid, side // store.grid[0]
    shifts = sorted(set(config.shifts)) or _doubling(cell)
    wide = int(side * views.ranges[0]) if views.kind == "ten-crop" else side  # what the store's plain view is cut from
    ranged = [int(side * crop_range) for crop_range in CROP_RANGES]
    encoder = Encoder(tokenizer, "fp32", config.batch_views)
    rows: list[int] = []
    codes: list[np.ndarray] = []
    pixels: list[np.ndarray] = []
    skipped: list[dict[str, str]] = []
    for row, squares in tqdm(
        _squares(store, source, spread(store.judging().judge, config.images), [wide, *ranged], skipped),
        desc="stability",
        unit="image",
        total=min(config.images, len(store.judging().judge)),
        leave=False,
    ):
        crops = np.stack(
            [
                centre(squares[0], side, 0, 0),
                *(centre(squares[0], side, shift * x, shift * y) for shift in shifts for x, y in _DIRECTIONS),
                *(centre(square, side, 0, 0) for square in squares[1:]),
            ]
        )
        rows.append(row)
        codes.append(encoder(crops))
        if len(pixels) < config.shown:
            # Of the shifts the one to the right
            pixels.append(crops[[0, *range(1, 1 + 4 * len(shifts), 4), len(crops) - 2, len(crops) - 1]])
    if len(rows) < 2:
        raise UserError(
            f"{store.path}: expected at least two images that can be read, got {len(rows)}"
            + (f"; {skipped[0]['key']}: {skipped[0]['reason']}" if skipped else "")
        )
    codes_NMhw = np.stack(codes).reshape(len(rows), -1, *grid)
    plain = codes_NMhw[:, 0]
    moves = [
        _shift_move(
            plain, codes_NMhw[:, 1 + 4 * place : 5 + 4 * place], shift, cell, max(0, shift - (wide - side) // 2)
        )
        for place, shift in enumerate(shifts)
    ]
    ranges = ranged[0] != ranged[1]  # not of images so small that both are the same
    if ranges:
        same = (codes_NMhw[:, -2] == codes_NMhw[:, -1]).mean((1, 2))
        moves.append(
            Move(
                f"crop range {CROP_RANGES[0]:g} -> {CROP_RANGES[1]:g}",
                0,
                float(same.mean()),
                float(same.min()),
                None,
                0,
            )
        )
    stored = codes_of(store, torch.tensor(rows), store.plain_view).numpy().reshape(plain.shape)
    figures = {
        "images": len(rows),
        "grid": list(grid),
        "cell_pixels": cell,
        "moves": [dataclasses.asdict(move) for move in moves],
        "other_image": float((plain == np.roll(plain, 1, axis=0)).mean()),
        "unmoved_as_stored": float((plain == stored).mean()),
        "skipped": skipped,
    }
    shown = [
        MovedImage(
            store.class_names[int(store.labels[rows[place]])], _tiles(codes_NMhw[place], crops, len(shifts), ranges)
        )
        for place, crops in enumerate(pixels)
    ]
    return figures, draw_moves(shown, [move.name for move in moves], [move.stay for move in moves], dark=False)


def _squares(
    store: CodeStore, source: ImageSource, rows: Tensor, sizes: Sequence[int], skipped: list[dict[str, str]]
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Row and squares (C, S, S) uint8 of each image that can be read; the others go to `skipped`."""
    indices, channels = store.source_indices(), store.manifest.get("image_channels", 3)
    for row in rows.tolist():
        try:
            yield row, make_squares(source[int(indices[row])].image, sizes, channels)
        except UnreadableImage as error:
            skipped.append({"key": error.key, "reason": error.reason})


def centre(square: np.ndarray, side: int, right: int, down: int) -> np.ndarray:
    """The crop (C, side, side) of a square (C, S, S), moved from its middle (the store's plain view) by pixels; beyond
    the edge the edge is repeated.
    """
    start = round((square.shape[-1] - side) / 2)
    x, y = (np.clip(np.arange(start + move, start + move + side), 0, square.shape[-1] - 1) for move in (right, down))
    return square[:, y[:, None], x]


def followed(plain: np.ndarray, moved: np.ndarray, right: int, down: int) -> float:
    """Share of codes (N, h, w) that are the same after the crop went whole cells to the right or down: new cell (r, c)
    shows what (r + down, c + right) did.
    """
    height, width = plain.shape[1:]
    new_rows, old_rows = (slice(max(0, -sign * down), height - max(0, sign * down)) for sign in (1, -1))
    new_columns, old_columns = (slice(max(0, -sign * right), width - max(0, sign * right)) for sign in (1, -1))
    return float((moved[:, new_rows, new_columns] == plain[:, old_rows, old_columns]).mean())


def _shift_move(plain: np.ndarray, moved_N4hw: np.ndarray, shift: int, cell: int, repeated: int) -> Move:
    same = (moved_N4hw == plain[:, None]).mean((1, 2, 3))
    follow, cells = None, shift // cell
    if shift % cell == 0 and cells < min(plain.shape[1:]):
        follow = float(
            np.mean(
                [
                    followed(plain, moved_N4hw[:, place], cells * x, cells * y)
                    for place, (x, y) in enumerate(_DIRECTIONS)
                ]
            )
        )
    return Move(
        f"shift by {shift} pixel{'s' * (shift > 1)}", shift, float(same.mean()), float(same.min()), follow, repeated
    )


def _doubling(cell: int) -> list[int]:
    """1, 2, 4 ... and the cell itself."""
    return sorted({min(2**power, cell) for power in range(cell.bit_length() + 1)})


def _tiles(codes_Mhw: np.ndarray, crops: np.ndarray, shifts: int, ranges: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """(pixels (C, S, S), changed cells (h, w) bool) of the image as it is, of each shift to the right, and of the other
    crop range.
    """
    tiles = [(crops[0], np.zeros(codes_Mhw.shape[1:], dtype=bool))]
    tiles += [(crops[1 + place], codes_Mhw[1 + 4 * place] != codes_Mhw[0]) for place in range(shifts)]
    return [*tiles, (crops[-1], codes_Mhw[-1] != codes_Mhw[-2])] if ranges else tiles

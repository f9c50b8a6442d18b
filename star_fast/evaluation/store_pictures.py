"""The codes of a store as pictures, beside the images that they were made of: one look tells whether images, views,
labels and tokenizer belong together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from star_fast.data.codes import CodeStore
from star_fast.data.sources import ImageSource
from star_fast.errors import UserError
from star_fast.evaluation.real_images import RealImages
from star_fast.evaluation.runs import spread
from star_fast.evaluation.samples import psnr_db
from star_fast.generation.fonts import write_with
from star_fast.model.tokenizer import VQTokenizer, to_uint8

_LEAST_TILE, _GAP, _LINE = 96, 6, 18  # pixels
_ROWS = 8  # images shown where none are named
_MOST_PICTURES = 4096
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def draw_store(
    store: CodeStore,
    tokenizer: VQTokenizer,
    source: ImageSource | None,
    rows: Sequence[int] = (),
    views: Sequence[str] = (),
) -> tuple[Image.Image, str]:
    """A sheet with a line for each row: its class and key, then for each view the image as it was cut (where it is
    known) and what its codes decode to.

    Args:
        rows: of the store; none: 8, evenly spaced. views: names; none: the plain one and the last.

    Returns:
        The picture, and a line that says what it shows.

    Raises:
        UserError: a row or a view that the store does not have, or too many pictures; other images than the store's;
            one that can no longer be read.
    """
    if wrong := [row for row in rows if not 0 <= row < len(store)]:
        raise UserError(f"rows: expected rows of {store.path}, 0 ... {len(store) - 1}, got {wrong[0]}")
    if unknown := [name for name in views if name not in store.views]:
        raise UserError(f"views: {store.path} has no view {unknown[0]!r}; it has {', '.join(store.views)}")
    chosen = torch.tensor(rows) if rows else spread(torch.arange(len(store)), _ROWS)
    columns = [store.views.index(name) for name in views] if views else sorted({store.plain_view, len(store.views) - 1})
    if len(chosen) * len(columns) > _MOST_PICTURES:
        raise UserError(
            f"rows: expected at most {_MOST_PICTURES // len(columns)} for {len(columns)} views, got {len(chosen)}"
        )
    decoded = _decoded(store, tokenizer, chosen, columns)
    real = _real(store, source, chosen, columns) if source is not None else None
    told = f"{len(chosen)} images x {len(columns)} views" + (
        f", PSNR {psnr_db(decoded, real):.1f} dB" if real is not None else ", decoded from their codes"
    )
    return _sheet(store, chosen, columns, decoded, real), told


@torch.inference_mode()
def _decoded(store: CodeStore, tokenizer: VQTokenizer, rows: Tensor, columns: Sequence[int]) -> Tensor:
    """(N, M, C, H, W) uint8."""
    device = next(tokenizer.parameters()).device
    codes = store.codes(rows, columns)
    parts = [to_uint8(tokenizer.decode(part.to(device))).cpu() for part in codes.flatten(0, 1).split(16)]
    return torch.cat(parts).unflatten(0, (len(rows), len(columns)))


def _real(store: CodeStore, source: ImageSource, rows: Tensor, columns: Sequence[int]) -> Tensor:
    images, parts = RealImages(store, source), []
    for images.view in columns:
        parts.append(images.read(rows))
    return torch.stack(parts, 1)


def _sheet(store: CodeStore, rows: Tensor, columns: Sequence[int], decoded: Tensor, real: Tensor | None) -> Image.Image:
    factor = max(1, -(-_LEAST_TILE // store.image_size))
    tile = store.image_size * factor
    kinds = [decoded] if real is None else [real, decoded]
    block = len(kinds) * tile + (len(kinds) - 1) * 2 + _GAP  # an image and its reconstruction lie close together
    keys = store.keys()
    captions = write_with(
        [f"{row}: {store.class_names[int(store.labels[row])]}, {keys[row]}" for row in rows.tolist()],
        size=13,
        longest=60,
    )
    heads = write_with([store.views[column] for column in columns], size=13, longest=40)
    width = max(len(columns) * block + _GAP, *(int(font.getlength(text)) + 2 * _GAP for text, font in captions))
    picture = Image.new("RGB", (width, _LINE + len(rows) * (tile + _LINE + _GAP)), _PAPER)
    draw = ImageDraw.Draw(picture)
    for place, (text, font) in enumerate(heads):
        draw.text((_GAP + place * block, 2), text, _INK, font)
    for line, (text, font) in enumerate(captions):
        top = _LINE + line * (tile + _LINE + _GAP)
        draw.text((_GAP, top + 2), text, _INK, font)
        for place in range(len(columns)):
            for kind, images in enumerate(kinds):
                pixels = images[line, place].expand(3, -1, -1).permute(1, 2, 0).numpy()
                picture.paste(
                    Image.fromarray(np.ascontiguousarray(pixels)).resize((tile, tile), Image.Resampling.NEAREST),
                    (_GAP + place * block + kind * (tile + 2), top + _LINE),
                )
    return picture

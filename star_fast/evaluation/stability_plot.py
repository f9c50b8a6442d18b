"""The picture of token stability: images as they are and moved, the cells whose code changed marked. Nothing here
computes a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from star_fast.evaluation.plots import FAINT, INK, STYLE, legend_name, to_png
from star_fast.evaluation.wording import percent

_TILE = 1.35  # inches
_CHANGED = "#f97316"


@dataclass(frozen=True)
class MovedImage:
    """A line of the picture."""

    name: str
    # (pixels (C, S, S) uint8, changed cells (h, w) bool): as it is, then one for each move
    tiles: list[tuple[np.ndarray, np.ndarray]]


def draw_moves(images: Sequence[MovedImage], moves: Sequence[str], stay: Sequence[float], *, dark: bool) -> bytes:
    """A line for each image; above each move its name and the share of codes that stay over all images measured,
    beneath each tile its own share.
    """
    with matplotlib.rc_context(STYLE):
        columns = len(moves) + 1
        figure = Figure(
            figsize=(_TILE * columns + 0.4, (_TILE + 0.2) * len(images) + 0.8), dpi=140, layout="constrained"
        )
        figure.suptitle(
            "Codes that change (orange) when the image moves a little",
            color=INK[dark],
            fontsize=10,
            x=0.01,
            ha="left",
            fontweight="bold",
        )
        grid = figure.subplots(len(images), columns, squeeze=False)
        for line, image in zip(grid, images, strict=True):
            for axes, (pixels, changed) in zip(line, image.tiles, strict=True):
                height, width = changed.shape
                shown = np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0)
                axes.imshow(shown, extent=(0, width, height, 0), interpolation="nearest")
                for row, column in np.argwhere(changed):
                    axes.add_patch(
                        Rectangle(
                            (column, row),
                            1,
                            1,
                            facecolor=(*matplotlib.colors.to_rgb(_CHANGED), 0.35),
                            edgecolor=_CHANGED,
                            linewidth=0.6,
                        )
                    )
                axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
                for spine in axes.spines.values():
                    spine.set_visible(False)
                if axes is not line[0]:
                    axes.set_xlabel(f"{percent(1 - changed.mean())} stay", color=FAINT[dark], fontsize=7)
            line[0].set_ylabel(legend_name(image.name), color=INK[dark], fontsize=8)
        for axes, move, share in zip(grid[0, 1:], moves, stay, strict=True):
            axes.set_title(
                f"{move}\nall images: {percent(share)} stay",
                color=INK[dark],
                fontsize=7.5,
                loc="center",
                fontweight="normal",
            )
        grid[0, 0].set_title("as it is", color=INK[dark], fontsize=7.5, loc="center", fontweight="normal")
        return to_png(figure)

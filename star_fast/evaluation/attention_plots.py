"""Pictures of attention: what it is over the blocks as curves, and maps of chosen positions over their images. Nothing
here computes a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from star_fast.evaluation.attention_maps import BlockAttention, grid_map
from star_fast.evaluation.plots import COLOURS, FAINT, INK, STYLE, draw_overlay, dress, legend_name, to_png
from star_fast.evaluation.wording import percent

_MARKS = ("o", "s", "^", "D")  # beside the colours, for eyes and printers that see none
_TILE = 1.25  # inches of a map


@dataclass(frozen=True)
class MapRow:
    """An image and the maps over it."""

    name: str  # what stands in front
    image: Tensor  # (C, H, W) uint8
    probs: Tensor  # (T, T) of one block, averaged over heads


def block_curves(series: Mapping[str, Sequence[BlockAttention]], even: BlockAttention, *, dark: bool) -> bytes:
    """Four panels over the blocks, a line for each name; dotted: attention that is the same everywhere (`even`)."""
    panels = (
        ("Mean distance of the attention", "cells of the grid", lambda b: b.shares.mean_distance),
        ("Entropy", "nats", lambda b: b.entropy),
        ("On the 8 neighbouring cells", "share of the attention, %", lambda b: 100 * b.shares.near),
        ("On the class position", "share of the attention, %", lambda b: 100 * b.shares.to_class),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.2), dpi=170, layout="constrained")
        for axes, (title, unit, pick) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            for index, (name, blocks) in enumerate(series.items()):
                axes.plot(
                    [block.block for block in blocks],
                    [pick(block) for block in blocks],
                    color=COLOURS[dark][index % 4],
                    linewidth=1.6,
                    marker=_MARKS[index % 4],
                    markersize=4,
                    label=legend_name(name),
                    zorder=3,
                )
            axes.axhline(pick(even), color=FAINT[dark], linewidth=1, linestyle=":", label="even attention")
            dress(axes, title, "block", unit, dark=dark)
            axes.set_ylim(0, 1.08 * max(pick(block) for blocks in (*series.values(), [even]) for block in blocks))
            axes.xaxis.get_major_locator().set_params(integer=True)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3, frameon=False, labelcolor=INK[dark], fontsize=8
        )
        return to_png(figure)


def map_sheet(rows: Sequence[MapRow], queries: Sequence[int], block: str, *, dark: bool) -> bytes:
    """A line for each row: the image, then the map of each query position, its share of the class position beneath."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(_TILE * (len(queries) + 1) + 0.9, (_TILE + 0.24) * len(rows) + 0.75), dpi=140, layout="constrained"
        )
        figure.suptitle(
            f"Attention of {block}, mean of its heads",
            color=INK[dark],
            fontsize=10,
            x=0.01,
            ha="left",
            fontweight="bold",
        )
        grid = figure.subplots(len(rows), len(queries) + 1, squeeze=False)
        for line, row in zip(grid, rows, strict=True):
            side = int(row.probs.shape[-1] ** 0.5)
            line[0].imshow(
                row.image.expand(3, -1, -1).permute(1, 2, 0).numpy(), extent=(0, side, side, 0), interpolation="nearest"
            )
            line[0].set(xticks=[], yticks=[])
            line[0].set_ylabel(legend_name(row.name), color=INK[dark], fontsize=8)
            for axes, query in zip(line[1:], queries, strict=True):
                draw_overlay(axes, row.image, grid_map(row.probs, query), query)
                axes.set_title(
                    f"class {percent(row.probs[query, 0].item())}",
                    color=FAINT[dark],
                    fontsize=7,
                    loc="center",
                    y=-0.17,
                    fontweight="normal",
                )
        for axes, query in zip(grid[0, 1:], queries, strict=True):
            axes.text(
                0.5, 1.05, f"position {query}", transform=axes.transAxes, ha="center", color=INK[dark], fontsize=8
            )
        return to_png(figure)

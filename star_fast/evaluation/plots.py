"""Pictures as PNG bytes: curves for a light and a dark page, strips of small images, attention maps. Nothing here
computes a result.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.patches
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from PIL import Image
from torch import Tensor

from star_fast.errors import printable

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

COLOURS = {False: ("#2563eb", "#d97706", "#059669", "#9333ea"), True: ("#7aa8ff", "#fbbf5c", "#4ade9f", "#c9a2ff")}
INK = {False: "#3f4650", True: "#c8ced8"}
FAINT = {False: "#6b7280", True: "#9ca3af"}  # of what is not ours
_RULE = {False: "#e2e6ec", True: "#343b46"}
STYLE: dict[RcKeyType, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.family": "sans-serif",
    "text.parse_math": False,  # a name with dollar signs is a name
}
_POSITIONS = tuple(range(31, 256, 32))
# Top-1 accuracies of the paper's Figure 4 (LlamaGen-B on ImageNet), read from its picture by eye.
PAPER_FIGURE_4 = {
    name: (_POSITIONS, tuple(percent / 100 for percent in row))
    for name, row in {
        "ST-AR, 300 epochs": (11, 24, 36, 45, 51, 54, 55, 55),
        "ST-AR, 50 epochs": (9, 18, 28, 37, 42, 44, 45, 45),
        "LlamaGen, 300 epochs": (6, 12, 18, 24, 26, 27, 24, 21),
        "LlamaGen, 50 epochs": (6, 10, 16, 20, 23, 23, 21, 19),
    }.items()
}
_LEAST_STEP = 0.055  # of the height of a panel between two names at its right edge
_GAP = 2  # pixels between the tiles of a strip
_MOST_LABEL = 40  # characters of a name in a legend
_MOST_VALUE = 1e30  # beyond it matplotlib's own arithmetic overflows


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float | None]]],
    *,
    title: str,
    x_label: str,
    dark: bool,
    y_label: str = "",
    markers: bool = False,
    level: tuple[float, str] | None = None,
    percent: bool = False,
    behind: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> bytes:
    """One panel of named lines {name: (x, y)}, broken where y is None or not finite; `level` draws a dotted horizontal
    line with a name, `behind` thin dashed lines of others, named at their right ends.

    Transparent ground, inks for a light or a dark page.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.4) if behind else (3.9, 2.7), dpi=170, layout="constrained")
        axes = figure.add_subplot()
        for there, beside in (behind or {}).values():
            axes.plot(there, beside, color=FAINT[dark], linewidth=1, linestyle=(0, (4, 2.5)), zorder=2)
        for index, (name, (x, y)) in enumerate(lines.items()):
            colour = COLOURS[dark][index % 4]
            values = np.array([value if plottable(value) else np.nan for value in y])
            alone = markers or np.isfinite(values).sum() < 3
            axes.plot(
                x,
                values,
                color=colour,
                linewidth=1.6,
                marker="o" if alone else None,
                markersize=4,
                label=legend_name(name),
                zorder=3,
            )
        if level is not None:
            axes.axhline(level[0], color=INK[dark], linewidth=1, linestyle=":", label=level[1])
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        dress(axes, title, x_label, y_label, dark=dark)
        if len(lines) > 1 or level is not None:
            axes.legend(frameon=False, labelcolor=INK[dark], fontsize=8)
        if behind:
            axes.set_ylim(bottom=0)
            _name_ends(axes, {f"{name} (paper)": (x[-1], y[-1]) for name, (x, y) in behind.items()}, FAINT[dark])
        return to_png(figure)


def dress(axes: Axes, title: str, x_label: str, y_label: str, *, dark: bool) -> None:
    """What all panels of curves have in common: title and names of the axes, faint horizontal rules, no frame."""
    axes.set_title(title, color=INK[dark])
    axes.set_xlabel(x_label, color=INK[dark])
    axes.set_ylabel(y_label, color=INK[dark])
    axes.tick_params(colors=INK[dark], length=0)
    axes.grid(axis="y", color=_RULE[dark], linewidth=0.8)
    axes.margins(x=0.02)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE[dark])


def _name_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], colour: str) -> None:
    """Names right of the panel at the height of their lines' ends, moved apart where they would touch."""
    bottom, top = axes.get_ylim()
    least, below = _LEAST_STEP * (top - bottom), -np.inf
    for name, (_, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        below = max(y, below + least)
        axes.annotate(
            name,
            (1.01, below),
            xycoords=("axes fraction", "data"),
            color=colour,
            fontsize=7,
            va="center",
            annotation_clip=False,
        )


def plottable(value: float | None) -> bool:
    """Whether a value has a place on an axis."""
    return value is not None and abs(value) <= _MOST_VALUE


def probe_curves(results: Mapping[str, Mapping[str, Any]], *, dark: bool) -> bytes:
    """Top-1 accuracy over positions of one or more runs: {name: ProbeResult.to_dict()}.

    The paper's four curves are drawn behind them where every run has its setting: 1000 classes, 256 codes an image.
    """
    lines = {name: (result["positions"], result["held_out"]) for name, result in results.items()}
    chance = max(result["chance"] for result in results.values())
    as_paper = all(result.get("classes") == 1000 and result.get("sequence") == 256 for result in results.values())
    return curves(
        lines,
        title="Linear probe, held-out top-1",
        x_label="position in the sequence",
        y_label="top-1 accuracy",
        dark=dark,
        markers=True,
        level=(chance, "chance"),
        percent=True,
        behind=PAPER_FIGURE_4 if as_paper else None,
    )


def loss_panels(
    training: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], *, dark: bool
) -> dict[str, bytes]:
    """One picture for each kind of loss that the run had: {what it shows: PNG}. A loss of None, one that was not
    finite, is a gap.
    """
    panels = {
        "Next-token loss (nats)": {"training": "ar"},
        "Masked-feature loss (1 - cosine)": {"L_MIM": "mim"},
        "Contrastive losses (nats)": {"between positions": "step_contrast", "between views": "view_contrast"},
    }
    pictures = {}
    for title, names in panels.items():
        lines = {
            name: ([row["step"] for row in training if key in row], [row[key] for row in training if key in row])
            for name, key in names.items()
        }
        # A loss that is off is logged as zeros: leave it out.
        lines = {name: line for name, line in lines.items() if any(plottable(value) and value for value in line[1])}
        if "training" in names and any(plottable(row["val_ar"]) for row in validation):
            lines["held out, nothing masked"] = (
                [row["step"] for row in validation],
                [row["val_ar"] for row in validation],
            )
        if lines:
            pictures[title] = curves(lines, title=title, x_label="step", dark=dark)
    return pictures


def strip(images: Tensor, columns: int, least_side: int = 56, most_side: int = 128) -> bytes:
    """uint8 images (N, C, H, W), C 1 or 3, in rows of `columns`, on a transparent ground; small ones enlarged by a
    whole factor, large ones reduced.
    """
    if max(images.shape[-2:]) > most_side:
        share = most_side / max(images.shape[-2:])
        size = [max(1, round(side * share)) for side in images.shape[-2:]]
        images = (
            F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
        )
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 4), dtype=np.uint8)
    for index, image in enumerate(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        sheet[top : top + height, left : left + width, :3] = image
        sheet[top : top + height, left : left + width, 3] = 255
    factor = max(1, -(-least_side // height))
    picture = Image.fromarray(sheet, "RGBA").resize(
        (sheet.shape[1] * factor, sheet.shape[0] * factor), Image.Resampling.NEAREST
    )
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def attention_overlay(image: Tensor, cells: Tensor, query: int) -> bytes:
    """One map over its image: see draw_overlay."""
    figure = Figure(figsize=(1.6, 1.6), dpi=120)
    draw_overlay(figure.add_axes((0, 0, 1, 1)), image, cells, query)
    return to_png(figure)


def draw_overlay(axes: Axes, image: Tensor, cells: Tensor, query: int) -> None:
    """A map over its image: heat where attention goes, dim where nothing is known yet, an outline around the cell being
    predicted.

    Args:
        image: (C, H, W) uint8. cells: (g, g) attention, NaN where unknown. query: the query position, which predicts
            cell number `query`.
    """
    side = cells.shape[-1]
    grey = image.float().mean(0).cpu().numpy() / 255
    heat = cells.cpu().numpy()
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, side, side, 0), interpolation="nearest")
    axes.imshow(
        np.where(np.isnan(heat), 1.0, np.nan),
        cmap="bone",
        vmin=0,
        vmax=2,
        alpha=0.82,
        extent=(0, side, side, 0),
        interpolation="nearest",
    )
    peak = max(float(np.nanmax(heat)), 1e-12)
    strength = np.nan_to_num(heat / peak)
    colours = matplotlib.colormaps["inferno"](0.25 + 0.75 * strength)
    colours[..., 3] = np.where(np.isnan(heat), 0, 0.85 * np.sqrt(strength))
    axes.imshow(colours, extent=(0, side, side, 0), interpolation="nearest")
    axes.add_patch(
        matplotlib.patches.Rectangle(
            (query % side + 0.06, query // side + 0.06), 0.88, 0.88, fill=False, edgecolor="#4ade80", linewidth=2
        )
    )
    axes.set_axis_off()


def legend_name(name: str) -> str:
    """A name for a legend: what the font lacks as escapes; an underscore in front would hide the whole entry from
    matplotlib.
    """
    known = get_font(findfont(FontProperties())).get_charmap()
    name = "".join(
        char if ord(char) in known else char.encode("unicode_escape", "surrogatepass").decode()
        for char in printable(name)
    )
    name = name if len(name) <= _MOST_LABEL else name[: _MOST_LABEL - 1] + "…"
    return f" {name}" if name.startswith("_") else name


def to_png(figure: Figure) -> bytes:
    """The figure on a transparent ground."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", transparent=True, metadata={"Software": None})
    return stream.getvalue()

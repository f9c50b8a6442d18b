"""`star-fast attention`: where every block of a model looks, in numbers, curves and maps (the paper's Figures 1a, 2, 5
and 7).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.data.codes import CodeStore
from star_fast.errors import UserError
from star_fast.evaluation.attention_maps import (
    BlockAttention,
    attention_by_block,
    block_attention,
    even_attention,
    query_positions,
)
from star_fast.evaluation.attention_plots import MapRow, block_curves, map_sheet
from star_fast.evaluation.limits import MOST_COUNT, explain_out_of_memory, option, require_ranges
from star_fast.evaluation.runs import Run, codes_of, only_report, open_run, spread
from star_fast.evaluation.samples import decode
from star_fast.generation.device import take_device
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.weights import Weights
from star_fast.records import require
from star_fast.storage import atomic_write_bytes, atomic_write_json

_FILES = ("attention.json", "attention.png", "maps.png")
_MOST_MAPS = 400  # of one picture


@dataclass(frozen=True)
class AttentionConfig:
    """Write attention.json, attention.png (curves over the blocks) and maps.png into a run's folder: where the model
    looks.
    """

    run: Path  # the run folder
    against: str = ""  # another run folder, drawn beside
    # which weights of the models; the maps of both are the student's
    weights: Literal["student", "teacher", "both"] = "student"
    codes: str = ""  # the code store; empty: the one that the run was trained on
    images: int = 32  # held-out images that the numbers are averaged over, evenly spaced
    block: int = 0  # whose maps are drawn, counted from 1; 0: the last
    rows: tuple[int, ...] = ()  # images of the maps, by their rows in the store; empty: 4 held-out ones, evenly spaced
    queries: tuple[int, ...] = ()  # positions of the maps, 1 ... T - 1; empty: 4, evenly spaced
    batch_images: int = 8  # images of one forward pass
    device: str = ""  # "cpu", "cuda"; empty: a GPU where there is one

    def __post_init__(self) -> None:
        require_ranges(self, {"images": (1, MOST_COUNT), "block": (0, 2**10), "batch_images": (1, 2**16)})
        require("\0" not in self.against, option("against"), self.against, "the name of a folder")


@dataclass(frozen=True)
class Looked:
    """Where one model of one run looks."""

    name: str  # for legends: the run's, and which weights if both were asked for
    weights: str
    run: Run
    blocks: list[BlockAttention]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "run": self.run.name,
            "weights": self.weights,
            "weights_sha256": self.run.model.weights_sha256,
            "step": self.run.record.step,
            "images_seen": self.run.record.images_seen,
            "blocks": [as_row(block) for block in self.blocks],
        }


def as_row(block: BlockAttention) -> dict[str, float]:
    """One line of the table."""
    return {"block": block.block, **dataclasses.asdict(block.shares), "entropy": block.entropy}


def run_attention(config: AttentionConfig) -> list[Looked]:
    """Measure and draw; one result for each run and kind of weights.

    Raises:
        UserError: the two runs do not read the same codes, the images are no squares of codes, or there is no such
            block, row or position.
    """
    device = take_device(config.device)
    kinds: tuple[Weights, ...] = ("student", "teacher") if config.weights == "both" else (config.weights,)
    opened = [
        (kind, open_run(folder, codes=config.codes, weights=kind))
        for folder in (config.run, *([config.against] if config.against else ()))
        for kind in kinds
    ]
    store = opened[0][1].store
    _require_alike([run for _, run in opened], config)
    rows = torch.tensor(config.rows) if config.rows else spread(store.judging().judge, 4)
    queries = list(config.queries) or query_positions(store.positions, 4)
    mapped = [run for kind, run in opened if kind == kinds[0]]
    for row in rows.tolist():
        require(0 <= row < len(store), option("rows"), row, f"rows of {store.path}, 0 ... {len(store) - 1}")
    for query in queries:
        require(1 <= query < store.positions, option("queries"), query, f"positions 1 ... {store.positions - 1}")
    require(
        len(rows) * len(queries) * len(mapped) <= _MOST_MAPS,
        option("rows"),
        len(rows),
        f"at most {_MOST_MAPS} maps of all rows and positions",
    )
    tokenizer = _tokenizer(opened[0][1])
    with (
        only_report(config.run, "looking at attention", _FILES),
        explain_out_of_memory("give a smaller --batch-images"),
    ):
        judged = spread(store.judging().judge, config.images)
        looked = []
        for kind, run in tqdm(opened, desc="attention", unit="model", leave=False):
            blocks = attention_by_block(
                run.model.transformer.to(device).eval(), *_inputs(store, judged, device), config.batch_images
            )
            looked.append(Looked(_name(run, kind, opened), kind, run, blocks))
        images = decode(tokenizer.to(device), codes_of(store, rows, store.plain_view))
        maps = []
        for place, row in enumerate(rows.tolist()):
            for run in mapped:
                probs = block_attention(
                    run.model.transformer,
                    *_inputs(store, rows[place : place + 1], device),
                    config.block or run.config.model.blocks,
                )
                name = store.class_names[int(store.labels[row])]
                maps.append(
                    MapRow(f"{name}, {run.name}" if len(mapped) > 1 else name, images[place], probs[0].mean(0).cpu())
                )
        even = even_attention(store.positions)
        settings = {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(config).items()
        }
        atomic_write_json(
            config.run / "attention.json",
            {
                "models": {each.name: each.to_dict() for each in looked},
                "even": as_row(even),
                "images": len(judged),
                "positions": store.positions,
                "maps": {"block": config.block or "last", "rows": rows.tolist(), "queries": queries},
                "settings": settings,
            },
        )
        atomic_write_bytes(
            config.run / "attention.png", block_curves({each.name: each.blocks for each in looked}, even, dark=False)
        )
        atomic_write_bytes(
            config.run / "maps.png",
            map_sheet(maps, queries, f"block {config.block}" if config.block else "the last block", dark=False),
        )
    return looked


def table(looked: Sequence[Looked]) -> str:
    """The numbers for a terminal; last the ends of the scale."""
    lines, even = [], even_attention(looked[0].run.store.positions)
    for each in looked:
        lines += [f"{each.name}:", "  block  distance, cells  entropy, nats  class position  8 neighbours  other cells"]
        lines += [_line(block, str(block.block)) for block in each.blocks]
    return "\n".join([*lines, "if all earlier positions were looked at alike:", _line(even, "")])


def _line(block: BlockAttention, name: str) -> str:
    shares = block.shares
    return (
        f"  {name:>5}  {shares.mean_distance:15.2f}  {block.entropy:13.2f}  {100 * shares.to_class:12.1f} %  "
        f"{100 * shares.near:10.1f} %  "
        f"{100 * shares.far:9.1f} %"
    )


def _require_alike(runs: Sequence[Run], config: AttentionConfig) -> None:
    """All read the same codes, in squares, and have the block."""
    store = runs[0].store
    if other := next((run.store for run in runs if run.store.manifest["files"] != store.manifest["files"]), None):
        raise UserError(
            f"{option('against')}: expected a run on the same codes, {store.path}, got one on {other.path}; give "
            "--codes"
        )
    if math.isqrt(store.positions) ** 2 != store.positions or store.positions < 4:
        raise UserError(
            f"{store.path}: expected images of a square of at least 4 codes, got {store.positions}; there is no "
            "map between them"
        )
    least = min(run.config.model.blocks for run in runs)
    require(config.block <= least, option("block"), config.block, f"1 ... {least}, or 0: the last")


def _tokenizer(run: Run) -> VQTokenizer:
    if run.model.tokenizer_folder is None:
        raise UserError(
            f"{run.folder}/model: holds no tokenizer, so there are no images to draw over; train again from a "
            "code store with its tokenizer"
        )
    tokenizer = VQTokenizer.load(run.model.tokenizer_folder)
    run.store.require_tokenizer(tokenizer.weights_hash())
    return tokenizer


def _name(run: Run, kind: str, opened: Sequence[tuple[str, Run]]) -> str:
    """One that no other has: of two runs whose folders are called the same the folder itself."""
    alike = len({other.folder for _, other in opened if other.name == run.name}) > 1
    name = str(run.folder) if alike else run.name
    return f"{name}, {kind}" if len({other for other, _ in opened}) > 1 else name


def _inputs(store: CodeStore, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes (N, T) of the plain view and labels (N,)."""
    return codes_of(store, rows, store.plain_view).to(device), store.labels[rows].to(device)

"""What a run says while it trains: a progress bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

TERMS = ("loss", "ar", "mim", "step_contrast", "view_contrast")


class Telemetry:
    """Collects losses without reading them back each step; every `log_every` steps averages them over steps and ranks and writes.

    metrics.jsonl is cut back to the resumed step first, so that a resumed run's file reads like an unbroken one's.
    """

    def __init__(self, folder: Path, first_step: int, total_steps: int, images_per_step: int, *, log_every: int, main: bool, tensorboard: bool) -> None:
        self.folder, self.images_per_step, self.log_every, self.main = folder, images_per_step, log_every, main
        self.pending: list[Tensor] = []
        self.grad_norm: Tensor | float = 0.0
        self.since = self.begun = time.perf_counter()
        self.earlier_s = 0.0
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", desc="training", disable=not main, dynamic_ncols=True)
        self.board = None
        if not main:
            return
        self.file = folder / "metrics.jsonl"
        self.earlier_s = _cut_back(self.file, first_step)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)
            except ImportError:
                tqdm.write("TensorBoard is not installed: metrics go to metrics.jsonl only (pip install 'star_fast[train]')")

    def step(self, step: int, losses: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Note one step: `losses` (5,) in the order of TERMS, this rank's; `step` counts from 0."""
        self.pending.append(losses)
        self.grad_norm = grad_norm
        if (step + 1) % self.log_every and step + 1 < self.bar.total:
            self.bar.update(1)
            return
        mean = torch.stack(self.pending).mean(0)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        now, steps = time.perf_counter(), len(self.pending)
        self.pending.clear()
        values = dict(zip(TERMS, mean.tolist(), strict=True))  # the one host sync of the interval
        images_per_s = steps * self.images_per_step / (now - self.since)
        self.since = now
        self.bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in values.items()) + f" | {images_per_s:.0f} images/s", refresh=False)
        self.bar.update(1)
        self._write({"step": step + 1, "images": (step + 1) * self.images_per_step, **values, "lr": lr, "grad_norm": float(self.grad_norm),
                     "images_per_s": images_per_s, "time_s": self.earlier_s + now - self.begun})

    def validation(self, step: int, loss: float) -> None:
        """Note the held-out next-token loss (nats) after `step` steps."""
        self._write({"step": step, "images": step * self.images_per_step, "val_ar": loss})
        self.since = time.perf_counter()  # validation is not training time

    def _write(self, line: dict[str, Any]) -> None:
        if not self.main:
            return
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in line.items():
                if name not in ("step", "images"):
                    self.board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Finish the bar and the files."""
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _cut_back(file: Path, step: int) -> float:
    """Keep the lines up to `step`; returns the training time they record, in seconds."""
    lines = []
    if file.exists() and step:
        for text in file.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # a line cut off by a kill
                continue
            if line["step"] <= step:
                lines.append(line)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return max((line.get("time_s", 0.0) for line in lines), default=0.0)

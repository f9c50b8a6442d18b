"""What a run says while it trains: a progress bar, metrics.jsonl, TensorBoard; and where it reads the losses it sees
whether they are sound.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from star_fast.storage import atomic_write_bytes, explain_write_errors, json_bytes, parse_json
from star_fast.training.watch import Diverged, LossWatch

_MOST_LINE_BYTES = 2**16
Batch = TypeVar("Batch")
TERMS = ("loss", "ar", "mim", "step_contrast", "view_contrast")


class Telemetry:
    """Collects losses without reading them back each step; every `log_every` steps averages them over steps and ranks
    and writes.

    metrics.jsonl is cut back to the resumed step first, so that a resumed run's file reads like an unbroken one's.

    Args:
        folder: the run's. first_step, total_steps: where the run begins and ends. main: whether this rank writes.
        watch: judges every loss that is read. rows: losses of the steps since the last log line, of a checkpoint that
            is resumed.
        stop_on_spike: whether a jump of the loss ends the run.
        background: seconds spent so far, by name, on what is made in the background; each line says how many a step
            took.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        total_steps: int,
        images_per_step: int,
        *,
        log_every: int,
        main: bool,
        tensorboard: bool,
        watch: LossWatch,
        rows: list[list[float]] | None = None,
        stop_on_spike: bool = False,
        background: Mapping[str, float] | None = None,
    ) -> None:
        self.folder, self.images_per_step, self.log_every, self.main = folder, images_per_step, log_every, main
        self.watch, self.stop_on_spike, self.spike = watch, stop_on_spike, 0.0
        self.rows, self.done = list(rows or []), first_step
        self.pending: list[Tensor] = []  # losses of the steps since the last row
        self.norms: list[Tensor] = []
        self.grad_norm: Tensor | float = 0.0
        self.since = self.begun = time.perf_counter()
        self.timed = 0  # steps since `since`
        self.waited_s = 0.0  # for batches, since `since`
        self.background, self.told = background or {}, dict(background or {})
        self.earlier_s = 0.0
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", desc="training", disable=not main, dynamic_ncols=True
        )
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
                tqdm.write(
                    "TensorBoard is not installed: metrics go to metrics.jsonl only (pip install 'star_fast[train]')",
                    file=sys.stderr,
                )

    def step(self, step: int, losses: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Note one step: `losses` (5,) in the order of TERMS, this rank's; `step` counts from 0.

        Raises:
            Diverged: at a log line, of any step since the last: a loss or the gradient's norm was not finite, or the
                loss has jumped and the run is set to stop.
        """
        self.pending.append(losses)
        self.norms.append(torch.as_tensor(grad_norm))
        self.grad_norm, self.done = grad_norm, step + 1
        self.timed += 1
        if self.done % self.log_every and self.done < self.bar.total:
            self.bar.update(1)
            return
        self.read()
        values = {
            name: statistics.fmean(column) for name, column in zip(TERMS, zip(*self.rows, strict=True), strict=True)
        }
        self.rows.clear()
        now = time.perf_counter()
        images_per_s = self.timed * self.images_per_step / (now - self.since)
        seconds = {"data_s": self.waited_s / self.timed} | {
            name: (value - self.told[name]) / self.timed for name, value in self.background.items()
        }
        share = self.waited_s / (now - self.since)
        waits = f", waits for data {share:.0%}" if share >= 0.01 else ""
        self._start_interval(now)
        self.bar.set_postfix_str(
            " ".join(f"{name} {value:.3f}" for name, value in values.items())
            + f" | {images_per_s:.0f} images/s{waits}",
            refresh=False,
        )
        self.bar.update(1)
        spike = {"spike_deviations": self.spike} if self.spike else {}
        self.spike = 0.0
        self._write(
            {
                "step": self.done,
                "images": self.done * self.images_per_step,
                **values,
                "lr": lr,
                "grad_norm": float(self.grad_norm),
                **spike,
                "images_per_s": images_per_s,
                **seconds,
                "time_s": self.earlier_s + now - self.begun,
            }
        )

    def waiting_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; counts the time that each is waited for."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(iterator, None)
            self.waited_s += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _start_interval(self, now: float) -> None:
        self.since, self.timed, self.waited_s, self.told = now, 0, 0.0, dict(self.background)

    def read(self) -> None:
        """Read the losses noted since the last time, averaged over ranks: a collective, and the one host sync of an
        interval. Raises Diverged.
        """
        if not self.pending:
            return
        means, norms = torch.stack(self.pending), torch.stack(self.norms)
        self.norms.clear()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(means)
            means /= dist.get_world_size()
        first = self.done - len(self.pending) + 1
        self.pending.clear()
        for step, row in enumerate(means.tolist(), first):
            above = self.watch.see(step, dict(zip(TERMS, row, strict=True)))
            self.rows.append(row)
            if above is not None:
                self._report_spike(step, row[0], above)
        for step, norm in enumerate(norms.tolist(), first):  # AdamW has skipped such a step
            if not math.isfinite(norm):
                raise Diverged(f"step {step}: the gradient's norm is not finite ({norm:.4g}), the losses are", step)

    def validation(self, step: int, loss: float) -> None:
        """Note the held-out next-token loss (nats) after `step` steps. Raises Diverged if it is not finite."""
        if not math.isfinite(loss):
            raise Diverged(f"step {step}: the loss on held-out images is not finite ({loss:.4g})", step)
        self._write({"step": step, "images": step * self.images_per_step, "val_ar": loss})
        self._start_interval(time.perf_counter())  # validation is not training time

    def _report_spike(self, step: int, loss: float, above: float) -> None:
        self.spike = above
        told = (
            f"step {step}: loss {loss:.4g} lies {above:.1f} standard deviations above the mean of the last "
            f"{len(self.watch.window)} steps"
        )
        if self.stop_on_spike:
            raise Diverged(f"{told}, and train.stop_on_spike is set", step)
        if self.main:
            tqdm.write(told, file=sys.stderr)

    def _write(self, line: dict[str, Any]) -> None:
        if not self.main:
            return
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}  # JSON knows no NaN
        with explain_write_errors(self.file), self.file.open("ab") as file:
            file.write(json_bytes(line, indent=None))
        if self.board is not None:
            for name, value in line.items():
                if name not in ("step", "images") and value is not None:
                    self.board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Finish the bar and the files."""
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _cut_back(file: Path, step: int) -> float:
    """Keep the lines up to `step`; returns the training time they record, in seconds."""
    kept, time_s = [], 0.0
    for text in _lines(file) if step else ():
        try:
            line = parse_json(text)
            if line["step"] > step:
                continue
            time_s = max(time_s, float(line.get("time_s", 0.0)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # a line cut off by a kill, or damaged
            continue
        kept.append(text)
    atomic_write_bytes(file, b"".join(kept))
    return time_s


def _lines(file: Path) -> Iterator[bytes]:
    """The whole lines of an ordinary file, none where there is none; what is too long to be one of ours is passed over
    without holding it.
    """
    if not file.is_file():
        return
    with file.open("rb") as stream:
        whole = True  # whether the next piece begins a line
        while piece := stream.readline(_MOST_LINE_BYTES):
            if whole and piece.endswith(b"\n"):
                yield piece
            whole = piece.endswith(b"\n")

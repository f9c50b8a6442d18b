"""The protocol of a sampling job: the plan that decides its bytes, and the record of how it was carried out, as JSON
beside the images.
"""

from __future__ import annotations

import platform
import re
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from star_fast.errors import UserError
from star_fast.records import require, to_dict
from star_fast.storage import atomic_write_json, read_json, read_record, to_record


@dataclass(frozen=True)
class JobPlan:
    """All that decides the bytes of the file. Two jobs with equal plans are the same job."""

    weights: str
    images: int
    labels: str
    guidance: float
    cfg_interval: int
    temperature: float
    top_k: int
    top_p: float
    seed: Any  # up to 2^63 - 1, which is more than other records may hold
    batch_images: int
    exact: bool
    pixels: int
    classes: Any  # labels in the order asked for, or "all"
    num_classes: int
    weights_sha256: str
    tokenizer_sha256: str
    image_shape: tuple[int, ...]
    precision: str
    products: str
    cache: str
    device: str
    torch: str
    # Of the VQ decoder; plans of versions that do not tell it are of those that decoded in float32 except on CUDA
    pixels_precision: str = ""

    def __post_init__(self) -> None:
        if not self.pixels_precision:
            object.__setattr__(self, "pixels_precision", "bf16" if self.device == "cuda" else "fp32")
        require(
            isinstance(self.seed, int) and 0 <= self.seed < 2**63, "seed", self.seed, "a whole number in 0 ... 2^63 - 1"
        )
        require(
            self.classes == "all"
            or (isinstance(self.classes, list) and all(isinstance(label, int) for label in self.classes)),
            "classes",
            self.classes,
            "'all' or a list of labels",
        )

    def require_same(self, there: JobPlan, path: Path, advice: str) -> None:
        """Raise UserError with `advice` unless the plan found at `path` is this one; it names what differs."""
        differing = [
            f"{field.name} {getattr(there, field.name)!r} there, {getattr(self, field.name)!r} asked for"
            for field in fields(self)
            if getattr(there, field.name) != getattr(self, field.name)
        ]
        if differing:
            raise UserError(f"{path}: of another sampling job ({'; '.join(differing)}); {advice}")


@dataclass(frozen=True)
class Checksums:
    """Of the finished file, as its record holds them: eight hexadecimal digits each."""

    images_crc32: str  # of arr_0.npy: header and pixels
    frame_crc32: str = ""  # of all bytes before and after it; files of earlier versions have none

    def __post_init__(self) -> None:
        for name, optional in (("images_crc32", False), ("frame_crc32", True)):
            told = getattr(self, name)
            require(
                re.fullmatch(r"[0-9a-f]{8}", told) is not None or (optional and not told),
                name,
                told,
                "eight hexadecimal digits",
            )

    @property
    def frame(self) -> int | None:
        """frame_crc32 as a number, where it is known."""
        return int(self.frame_crc32, 16) if self.frame_crc32 else None


def write_plan(plan: JobPlan, path: Path) -> None:
    """Write the plan of a job that begins."""
    atomic_write_json(path, to_dict(plan))


def read_plan(path: Path, hint: str) -> JobPlan:
    """The plan that write_plan wrote. Raises StorageError with `hint`."""
    return read_record(path, JobPlan, hint)


def write_finished(path: Path, plan: JobPlan, run: dict[str, Any], images_crc: int, frame_crc: int) -> None:
    """Write the record of a job that is done; `run` says what this run of it did."""
    run = run | {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        **to_dict(Checksums(f"{images_crc:08x}", f"{frame_crc:08x}")),
    }
    atomic_write_json(path, {"plan": to_dict(plan), "run": run})


def read_finished(path: Path, hint: str) -> tuple[JobPlan, Checksums]:
    """The plan and the checksums in a record. Raises StorageError with `hint`."""
    record = read_json(path, hint)
    return to_record(record.get("plan"), path, JobPlan, hint), to_record(
        record.get("run"), path, Checksums, hint, ignore_unknown=True
    )

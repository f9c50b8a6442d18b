"""What the plans of sampling and preparation assume of the machines: every number a setting, written out beside what is
predicted from it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from star_fast.records import require, require_finite


@dataclass(frozen=True)
class SamplingAssumptions:
    """What is assumed of the machines; the VQ decoder's share is that of an H100 (benchmarks/results/h100.md), the rest
    is not measured.
    """

    read_share: float = 0.8  # of the published memory bandwidth, that reads of weights and caches reach
    product_share: float = 0.5  # of the bf16 peak, that decoding's products reach
    convolution_share: float = 0.2  # of the bf16 peak, that the VQ decoder reaches (an H100: 0.22)
    fp32_share: float = 0.5  # of the float32 peak without tensor cores, that Inception reaches
    launch_us: float = 2.0  # the least that a kernel of a captured decoding step takes
    start_s: float = 60.0  # of every process: imports, weights, graph capture
    storage_gb_per_s: float = 1.0  # of the file system, all processes together

    def __post_init__(self) -> None:
        _check(
            self,
            shares=("read_share", "product_share", "convolution_share", "fp32_share"),
            positive=("launch_us", "storage_gb_per_s"),
            others=("start_s",),
        )


@dataclass(frozen=True)
class PreparationAssumptions:
    """What is assumed of the machines; the encoder's shares are those of an H100 (benchmarks/results/h100.md), the
    CPU's rate is of one core of another machine, the rest is not measured.
    """

    fp32_share: float = 0.45  # of the float32 peak without tensor cores, that the VQ encoder reaches in fp32
    convolution_share: float = 0.2  # of the bf16 peak, that it reaches in bf16
    # one core's time to decode and crop a file; 0: 1.4 + 2.8 for each crop range (measured,
    # benchmarks/results/loading.md)
    cpu_ms_per_image: float = 0.0
    cores_per_gpu: int = 12  # that decode and crop for it
    file_kb: float = 110.0  # of an image file
    start_s: float = 60.0  # of every process
    storage_gb_per_s: float = 1.0  # of the file system, all processes together

    def __post_init__(self) -> None:
        _check(
            self,
            shares=("fp32_share", "convolution_share"),
            positive=("cores_per_gpu", "file_kb", "storage_gb_per_s"),
            others=("cpu_ms_per_image", "start_s"),
        )


def _check(assumed: object, shares: tuple[str, ...], positive: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Raise ConfigError naming the first field of `assumed` that is no share in (0, 1], not above 0, or below 0."""
    require_finite(assumed, "assume")
    for name in shares:
        require(
            0 < getattr(assumed, name) <= 1,
            f"assume.{name}",
            getattr(assumed, name),
            "a share of the peak, more than 0 and at most 1",
        )
    for name in positive:
        require(
            1e-9 <= getattr(assumed, name) <= 1e12,
            f"assume.{name}",
            getattr(assumed, name),
            "a number from 1e-9 to 1e12",
        )
    for name in others:
        require(
            0 <= getattr(assumed, name) <= 1e12, f"assume.{name}", getattr(assumed, name), "a number from 0 to 1e12"
        )


def listed(assumed: Any) -> str:
    """The settings of an assumptions' dataclass with their values, as they are typed: --assume.read-share 0.8 ..."""
    return " ".join(
        f"--assume.{field.name.replace('_', '-')} {getattr(assumed, field.name):g}"
        for field in dataclasses.fields(assumed)
    )

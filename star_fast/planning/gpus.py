"""What the GPUs can do, as their maker publishes it: the denominators of every prediction."""

from __future__ import annotations

from typing import NamedTuple

from star_fast.errors import UserError

GIB = 2**30


class Gpu(NamedTuple):
    """Published peaks of one GPU (SXM boards, dense: without sparsity)."""

    name: str
    bf16_flops_per_s: float  # tensor cores
    bytes_per_s: float  # of its memory
    memory_gib: float  # what a job finds, about
    fp32_flops_per_s: float  # ordinary arithmetic: no tensor cores, no TF32
    nvlink_bytes_per_s: float  # to the other GPUs of its machine, in one direction


# NVIDIA's data sheets: A100 80GB (2021), H100 (2022), H200 (2023), DGX/HGX B200 (2024; an eighth of the eight-GPU
# figures).
GPUS = {gpu.name: gpu for gpu in (
    Gpu("a100", 312e12, 2.039e12, 79, 19.5e12, 300e9),
    Gpu("h100", 989e12, 3.35e12, 79, 67e12, 450e9),
    Gpu("h200", 989e12, 4.8e12, 139, 67e12, 450e9),
    Gpu("b200", 2250e12, 8.0e12, 178, 75e12, 900e9),
)}  # fmt: skip


COUNTS = (1, 8, 64, 256, 1024)  # GPUs that tables of sampling, preparation and training show


def gpu(name: str) -> Gpu:
    """The GPU of that name. Raises UserError listing the names for one that is not in the table."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: expected one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name.lower()]

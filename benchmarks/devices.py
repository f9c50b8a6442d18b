"""What GPUs can do, as their maker publishes it, and what follows for a kernel: its time floor and how many programs
fit on a multiprocessor.

Rates are peaks of the SXM boards, dense (without sparsity), from NVIDIA's data sheets: A100 80GB (2021), H100 (2022),
H200 (2023), and DGX/HGX B200 (2024; an eighth of the eight-GPU figures). Limits per multiprocessor are from the CUDA
C++ programming guide, "Compute Capabilities". No kernel reaches a peak: a floor is a time that nothing can beat, not a
prediction.
"""

from __future__ import annotations

from typing import NamedTuple

from star_fast.planning.gpus import GPUS


class Device(NamedTuple):
    """Published peaks of one GPU."""

    name: str
    capability: int  # 90: sm_90
    bytes_per_s: float
    bf16_flops_per_s: float  # tensor cores
    fp32_flops_per_s: float  # ordinary arithmetic units


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor that decide how many programs share it."""

    registers: int
    threads: int
    programs: int
    shared_bytes: int
    shared_bytes_a_program: int  # the most one program may take
    count: int  # multiprocessors of the GPU


_CAPABILITIES = {"a100": 80, "h100": 90, "h200": 90, "b200": 100}
# The peaks are planning's.
DEVICES = [
    Device(name.upper(), _CAPABILITIES[name], gpu.bytes_per_s, gpu.bf16_flops_per_s, gpu.fp32_flops_per_s)
    for name, gpu in GPUS.items()
]

MULTIPROCESSORS = {
    80: Multiprocessor(65536, 2048, 32, 164 * 1024, 163 * 1024, 108),
    90: Multiprocessor(65536, 2048, 32, 228 * 1024, 227 * 1024, 132),
    100: Multiprocessor(65536, 2048, 32, 228 * 1024, 227 * 1024, 148),
}

# FLOPs a byte that ordinary arithmetic can still serve at full memory bandwidth, on the device where that is least
# (B200: 75 / 8.0).
VECTOR_FLOPS_A_BYTE = min(device.fp32_flops_per_s / device.bytes_per_s for device in DEVICES)


def memory_bound(bytes_moved: int, flops: int) -> bool:
    """Whether memory, not arithmetic, sets the floor without tensor cores on every device; such a kernel needs wide
    accesses, others tensor cores.
    """
    return flops <= VECTOR_FLOPS_A_BYTE * bytes_moved


def floor_us(device: Device, bytes_moved: int, flops: int, tensor_cores: bool) -> float:
    """Microseconds that `device` needs at least: the longer of moving the bytes and doing the arithmetic, both at their
    peaks.
    """
    rate = device.bf16_flops_per_s if tensor_cores else device.fp32_flops_per_s
    return 1e6 * max(bytes_moved / device.bytes_per_s, flops / rate)


def occupancy(capability: int, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Predicted share of a multiprocessor's thread slots in use: registers are given to warps in pieces of 256, shared
    memory costs 1 KiB a program more.
    """
    limits = MULTIPROCESSORS[capability]
    warp_registers = -(-max(registers, 1) * 32 // 256) * 256
    warps = limits.registers // warp_registers // 4 * 4  # in each of the four partitions alike
    programs = min(
        limits.programs,
        limits.threads // (32 * num_warps),
        warps // num_warps,
        limits.shared_bytes // (shared_bytes + 1024),
    )
    return programs * num_warps * 32 / limits.threads

"""What every Triton kernel of this package shares: when it can run, how it is launched, how it is described for compiling.

Kernels run on CUDA tensors, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1, set before a kernel module is loaded).
Tile sizes come from tiles.py: no autotuning, which would need a driver and would change the numerics from machine to machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fused multiply-add is set explicitly: Triton's default differs between releases.
FP_FUSION = True


class Variant(NamedTuple):
    """One compilation of a kernel, enough for triton.compile without a driver (see benchmarks/kernel_resources.py)."""

    name: str  # e.g. "swiglu forward"
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32", "constexpr" ...
    constants: dict[str, Any]  # values of the constexpr arguments
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...]  # arguments that are multiples of 16 (pointers: 16-byte aligned) at these shapes
    cost: tuple[int, int]  # least (bytes, FLOPs) of this kernel at this shape
    grid: tuple[int, ...]


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter in this process."""
    return bool(triton.knobs.runtime.interpret)


def why_not_device(*tensors: Tensor | None) -> str | None:
    """None if Triton can run on these tensors' device, else the reason."""
    device = next(t.device for t in tensors if t is not None)
    if device.type == "cuda":
        return None
    if device.type == "cpu" and interpreting():
        return None
    return f"Triton needs CUDA tensors, got {device} (on a CPU only in the interpreter: TRITON_INTERPRET=1 before import)"


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype a kernel computes in for inputs of `dtype`: float64 for float64 (gradcheck), else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def operand(dtype: torch.dtype) -> tl.dtype:
    """The dtype of tl.dot's factors: the inputs' own; the interpreter multiplies bfloat16 as bit patterns, so there float32 (values rounded before)."""
    return {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16,
            torch.bfloat16: tl.float32 if interpreting() else tl.bfloat16}[dtype]


def pointer(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to `dtype`, for Variant.signature."""
    return "*" + {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64", torch.int32: "i32",
                  torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv"}[dtype]

"""Why backend "cpp" serves a call of add_rms_norm or swiglu, and the two operators: one pass each for the rows of a decoding step on the CPU.

Only (R, D) without gradients is served: training, whose tensors have three dimensions, computes the same with and without the extension, to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_fast import _C  # noqa: F401 (registers the operators; importing this module fails where they were not built)

LANES = 16  # widths are multiples of this

for _name in ("add_rms_norm", "swiglu"):
    if not hasattr(torch.ops.star_fast, _name):
        raise ImportError(f"star_fast._C is an older build without {_name}: build it again (python setup.py build_ext --inplace)")

    @torch.library.register_fake(f"star_fast::{_name}")
    def _(*arguments: Any) -> None:
        """Writes its outputs and returns nothing: no shape to tell."""


def why_not_decoding_rows(x: Tensor, width: int, *others: Tensor | None) -> str | None:
    """None if `x` is a decoding step's (R, ...) and nothing asks for a gradient, else the reason."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, the call is on {x.device}"
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.bfloat16) or width % LANES or not x.numel():
        return f"it takes the rows (R, D) of a decoding step in float32 or bfloat16, D a multiple of {LANES}, got {tuple(x.shape)} {x.dtype}"
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, *others)):
        return "it has no gradient"
    return None

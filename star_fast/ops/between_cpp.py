"""Which calls of add_rms_norm and swiglu backend "cpp" serves, and the operators behind it: one pass each way on the
CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_fast import _C  # noqa: F401 (registers the operators; importing this module fails where they were not built)

LANES = 16  # widths are multiples of this

for _name in ("add_rms_norm", "add_rms_norm_backward", "swiglu", "swiglu_backward"):
    if not hasattr(torch.ops.star_fast, _name):
        raise ImportError(
            f"star_fast._C is an older build without {_name}: build it again (python setup.py build_ext --inplace)"
        )

    @torch.library.register_fake(f"star_fast::{_name}")
    def _(*arguments: Any) -> None:
        """Writes its outputs and returns nothing: no shape to tell."""


def why_not_rows(x: Tensor, width: int) -> str | None:
    """None if the rows of `x` are on the CPU, of a dtype and a width that the extension has, else the reason."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, the call is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16) or width % LANES or not x.numel():
        return (
            f"it takes rows of float32 or bfloat16 whose width is a multiple of {LANES}, got {tuple(x.shape)} {x.dtype}"
        )
    return None

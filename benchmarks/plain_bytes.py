"""What each op costs in plain PyTorch (naive.py): torch operations and the bytes of their inputs and outputs, counted
on tensors without data.

    python benchmarks/plain_bytes.py [PRESET]        prints the table of docs/kernels/README.md; seconds, no GPU
"""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import naive

# Function in naive.py -> its file in star_fast/ops, arguments that get gradients. What is for
# inference alone is not counted.
SUBJECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "masked_attention_qkv": ("masked_attention", ("qkv",)),
    "feature_distance": ("feature_distance", ("student",)),
    "slot_contrast": ("slot_contrast", ("anchor",)),
    "linear_cross_entropy": ("linear_cross_entropy", ("hidden", "weight")),
    "ema_update": ("ema_update", ()),
    "add_rms_norm": ("add_rms_norm", ("x", "residual", "weight")),
    "swiglu": ("swiglu", ("w1w3",)),
    "decode_attention": ("decode_attention", ()),
}
_READS_VALUES = ("slot_contrast",)  # no use without data; it is small
# What moves nothing: views, memory that is not written yet, and questions.
_FREE = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "device",
    "empty",
    "empty_like",
    "expand",
    "new_empty",
    "permute",
    "scalar_tensor",
    "select",
    "slice",
    "split",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}


class Counted(NamedTuple):
    """Of one pass."""

    operations: int
    bytes_moved: int


class _Counter(TorchDispatchMode):
    """Operations, and bytes of the tensors that go in and come out, each once an operation; what is expanded (a stride
    of 0) is a number and counts none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes_moved = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _FREE:
            self.operations += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes_moved += sum(one.nbytes for one in tensors if 0 not in one.stride())
        return out


def counted(name: str, preset: str) -> tuple[Counted, Counted | None]:
    """Forward and, where there are gradients, backward, in bfloat16."""
    file, wanted = SUBJECTS[name]
    with contextlib.nullcontext() if name in _READS_VALUES else FakeTensorMode():
        call = import_module(f"star_fast.ops.{file}").inputs(preset, torch.bfloat16)
        leaves = [call[argument].requires_grad_() for argument in wanted]
        with _Counter() as forward:
            out = getattr(naive, name)(**call)
        if not wanted:
            return Counted(forward.operations, forward.bytes_moved), None
        outs = out if isinstance(out, tuple) else (out,)
        given = [torch.ones_like(one) for one in outs]
        with _Counter() as backward:
            torch.autograd.grad(outs, leaves, given)
    return Counted(forward.operations, forward.bytes_moved), Counted(backward.operations, backward.bytes_moved)


def table(preset: str) -> list[str]:
    """Lines of Markdown."""
    lines = ["| in plain PyTorch | operations | MB | backward: operations | MB |", "|---|--:|--:|--:|--:|"]
    for name in SUBJECTS:
        cells = [f"{one.operations} | {one.bytes_moved / 1e6:.0f}" if one else " | " for one in counted(name, preset)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(sys.argv[1] if len(sys.argv) > 1 else "B")))

"""ops.linear_cross_entropy as a GPU gets it: chunks, launches and aligned operands, seen on fake tensors."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from star_fast.ops import dispatch

op = import_module("star_fast.ops.linear_cross_entropy")
kernels = import_module("star_fast.ops.triton.linear_cross_entropy")


def test_fake_path_names_the_launches() -> None:
    with FakeTensorMode(), dispatch.record() as calls:
        hidden, weight = (torch.empty(n, 768, device="cuda", dtype=torch.bfloat16) for n in (8100, 16384))
        loss = op.linear_cross_entropy(hidden, weight, torch.empty(8100, device="cuda", dtype=torch.int64))
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"
    launches = [dispatch.Launch("cross_entropy_rows", (rows,)) for rows in (2816, 2816, 2468)]
    assert calls == [dispatch.Recorded("linear_cross_entropy", "triton", launches)]


NO_LAUNCH = {"t", "split", "slice", "alias", "empty", "new_empty", "promote_types", "device"}


class Operands(TorchDispatchMode):
    """On fake CUDA tensors: what launches, and which operand of a product starts, or has its rows start, off a multiple
    of 16 bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []
        self.askew: list[str] = []
        self.reduced: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.launched.append(name)
        if name in ("mm", "addmm", "addmm_"):
            flags = torch.backends.cuda.matmul
            self.reduced.append(
                flags.allow_bf16_reduced_precision_reduction or flags.allow_fp16_reduced_precision_reduction
            )
            for x in (x for x in (*args, (kwargs or {}).get("out")) if isinstance(x, Tensor)):
                bytes_off = [
                    number * x.element_size() % 16
                    for number in (x.storage_offset(), *(s for s in x.stride() if s != 1))
                ]
                if any(bytes_off) or 1 not in x.stride():
                    self.askew.append(
                        f"{name}: {tuple(x.shape)} {x.dtype} starts at {x.storage_offset()}, strides {x.stride()}"
                    )
        return func(*args, **(kwargs or {}))


def operands(rows: int, width: int, codes: int) -> Operands:
    """Forward with both gradients on fake CUDA tensors; the kernel of the rows counts as one launch."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, width, device="cuda", dtype=torch.bfloat16) for n in (rows, codes))
        target = torch.empty(rows, device="cuda", dtype=torch.int64)
        with Operands() as seen:
            op._chunk_by_chunk(
                hidden,
                weight,
                target,
                kernels._chunk_rows(rows, codes, 2),
                lambda *_: seen.launched.append("rows"),
                (True, True),
            )
    return seen


# 16384 rows are five chunks: 21 launches before the gradients are scaled, no operand off 16 bytes. With 16 chunks of
# 1024 rows and blocks of 2^24 bytes, as it was, the same counter gave (launches, askew operands) 178 48 (B), 178 0 (L),
# 242 48 (XL), 274 80 (XXL), 466 144 (3B).
PRESET_WIDTHS = {"B": 768, "L": 1024, "XL": 1280, "XXL": 1536, "3B": 3200}


@pytest.mark.parametrize("preset", PRESET_WIDTHS)
def test_four_launches_a_chunk_on_aligned_operands(preset: str) -> None:
    seen = operands(16384, PRESET_WIDTHS[preset], 16384)
    assert seen.launched == ["mm", "rows", "mm", "addmm"] * 5 + ["mean"]
    assert not seen.askew
    assert not any(seen.reduced), "cuBLAS may round partial sums"
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction, "the setting was not put back"


@pytest.mark.parametrize("preset", PRESET_WIDTHS)
def test_blocks_where_torch_cannot_accumulate(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_accumulates_wider", lambda: False)
    assert not operands(16384, PRESET_WIDTHS[preset], 16384).askew


def test_the_check_of_operands_sees_ragged_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks as they once were: 5461 codes of 16384 at width 768."""

    def ragged(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
        for part, columns in zip(total.split(5461), gradient.split(5461, dim=1), strict=True):
            part.add_(torch.mm(columns.t(), hidden, out_dtype=torch.float32))

    monkeypatch.setattr(op, "_add_product", ragged)
    seen = operands(16384, 768, 16384)
    assert len(seen.askew) == 15  # in each of five chunks the second, third and fourth block: the first starts at 0
    assert len(seen.launched) > 4 * 5 + 1


def test_any_number_of_codes_is_aligned() -> None:
    assert not operands(300, 768, 1001).askew


def test_chunks_are_even() -> None:
    """As few chunks as the bytes allow, in whole 128s, none much smaller than another."""
    for rows in (1, 100, 3968, 3969, 8100, 16384, 32768, 100_000):
        chunk = kernels._chunk_rows(rows, 16384, 2)
        assert chunk % 128 == 0 and chunk * 16384 * 2 <= kernels.LOGITS_CHUNK_BYTES
        assert -(-rows // chunk) == -(-rows // 3968)
    assert kernels._chunk_rows(100, 2**25, 2) == 15  # seven chunks, of at most 16

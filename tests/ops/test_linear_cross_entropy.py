"""ops.linear_cross_entropy: every backend against plain sums and torch's own cross_entropy in float64. (Chunks and
launches: test_linear_cross_entropy_launches.py.)
"""

from __future__ import annotations

import math
from collections import Counter
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from star_fast.ops import error_flag
from star_fast.ops.triton.tiles import Tile
from tests import contract
from tests.access_counting import count_accesses

op = import_module("star_fast.ops.linear_cross_entropy")
kernels = import_module("star_fast.ops.triton.linear_cross_entropy")
BACKENDS = ["reference", "triton"]
BOTH = ("hidden", "weight")


def call(rows: int, width: int, codes: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Arguments whose first targets are the ends of the vocabulary."""
    generator = torch.Generator().manual_seed(rows)
    target = torch.randint(codes, (rows,), generator=generator)
    target[:2] = torch.tensor([0, codes - 1])[:rows]
    return {
        "hidden": scale * torch.randn(rows, width, generator=generator),
        "weight": torch.randn(codes, width, generator=generator),
        "target": target,
    }


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows and, in the reference, blocks of one row and of 128 codes."""
    monkeypatch.setattr(op, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(op, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(op, "_PARTIAL_BYTES", 1)
    monkeypatch.setattr(kernels, "LOGITS_CHUNK_BYTES", 1)


class Operations(TorchDispatchMode):
    """Counts torch operations and remembers the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.counts[func.overloadpacket.__name__] += 1
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out

    @property
    def products(self) -> int:
        """Matrix products."""
        return sum(self.counts[name] for name in ("mm", "addmm", "addmm_"))


def plain_sums(hidden: Tensor, weight: Tensor, target: Tensor) -> float:
    """The formula with Python numbers."""
    losses = []
    for h, t in zip(hidden.tolist(), target.tolist(), strict=True):
        logits = [math.fsum(a * b for a, b in zip(h, row, strict=True)) for row in weight.tolist()]
        losses.append(math.log(math.fsum(math.exp(x - max(logits)) for x in logits)) + max(logits) - logits[t])
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_against_plain_sums_and_gradient_against_torch(backend: str, small_chunks: None) -> None:
    exact = {key: contract.cast(value, torch.float64) for key, value in call(37, 5, 37).items()}
    loss, gradients = contract.run_with_gradients(
        lambda **kw: op.linear_cross_entropy(**kw, backend=backend), exact, BOTH
    )
    _, truth = contract.run_with_gradients(
        lambda hidden, weight, target: F.cross_entropy(hidden @ weight.t(), target), exact, BOTH
    )
    assert loss.item() == pytest.approx(plain_sums(**exact), rel=1e-13)
    for key in BOTH:
        torch.testing.assert_close(gradients[key], truth[key], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(19, 8, 37), (1, 3, 1), (37, 20, 130)])
def test_error_rule(shape: tuple[int, int, int], dtype: torch.dtype, small_chunks: None) -> None:
    contract.check_op(op, "triton", call(*shape), BOTH, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_too_long_for_registers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_ROWS", Tile((16, 8, 1), num_warps=4, num_stages=1))
    contract.check_op(op, "triton", call(6, 8, 37), BOTH, dtype)
    first_block_empty = call(2, 2, 20)
    first_block_empty["hidden"][:], first_block_empty["weight"][:8], first_block_empty["target"][:] = (
        1.0,
        float("-inf"),
        19,
    )
    loss = op.linear_cross_entropy(
        **{key: contract.cast(value, dtype) for key, value in first_block_empty.items()}, backend="triton"
    )
    expected = F.cross_entropy(
        first_block_empty["weight"].to(dtype).double().sum(1).repeat(2, 1), first_block_empty["target"]
    )
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    contract.check_gradcheck(op, backend, call(4, 3, 7), BOTH)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, 1e-8])
def test_huge_and_tiny_logits(backend: str, scale: float) -> None:
    arguments = call(5, 4, 37, scale)
    loss, gradients = contract.run_with_gradients(
        lambda **kw: op.linear_cross_entropy(**kw, backend=backend), arguments, BOTH
    )
    exact = {key: contract.cast(value, torch.float64) for key, value in arguments.items()}
    truth, true_gradients = contract.run_with_gradients(
        lambda hidden, weight, target: F.cross_entropy(hidden @ weight.t(), target), exact, BOTH
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    for key in BOTH:
        largest = true_gradients[key].abs().max().item()
        torch.testing.assert_close(
            gradients[key].double(), true_gradients[key], rtol=0, atol=2e-3 * largest if scale > 1 else 1e-5 * largest
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_gives_the_same(backend: str) -> None:
    arguments = {key: value.requires_grad_() if key in BOTH else value for key, value in call(19, 4, 9).items()}
    loss = 2.5 * op.linear_cross_entropy(**arguments, backend=backend)
    leaves = [arguments[key] for key in BOTH]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    contract.check_same_bits(op, backend, call(19, 4, 9), BOTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_work_that_is_asked_for(backend: str, dtype: torch.dtype, small_chunks: None) -> None:
    """37 rows are 3 chunks: one product each for the loss, one more for each gradient; never the whole logits."""

    def products(wanted: tuple[str, ...], mode: Any = torch.enable_grad) -> int:
        arguments = {
            key: contract.cast(value, dtype).requires_grad_(key in wanted) for key, value in call(37, 3, 50).items()
        }
        with Operations() as seen, mode():
            loss = op.linear_cross_entropy(**arguments, backend=backend)
            assert loss.requires_grad == (bool(wanted) and mode is torch.enable_grad)
        if loss.requires_grad:
            with seen:
                loss.backward()
        assert seen.largest < 37 * 50 * dtype.itemsize
        return seen.products

    assert products(()) == 3
    assert products(BOTH, torch.no_grad) == 3
    assert products(("hidden",)) == 6
    assert products(("weight",)) == 6
    assert products(BOTH) == 9


def test_without_gradient_the_kernel_leaves_the_logits() -> None:
    logits, losses = torch.randn(3, 37), torch.empty(3)
    before, target = logits.clone(), torch.tensor([0, 36, 5])
    kernels.overwrite(logits, target, losses, False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses, F.cross_entropy(before, target, reduction="none"))


@pytest.mark.parametrize("longest", [64, 16])
@pytest.mark.parametrize("position", [0, 20, 36])
def test_nan_is_not_hidden(longest: int, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CROSS_ENTROPY_ROWS", Tile((longest, 8, 1), num_warps=4, num_stages=1))
    logits, losses = torch.randn(2, 37), torch.empty(2)
    logits[0, position] = float("nan")
    kernels.overwrite(logits, torch.tensor([5, 5]), losses, True)
    assert losses.isnan().tolist() == [True, False] and logits.isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codes", [37, 40])
def test_no_number_comes_from_memory_that_nothing_was_written_to(backend: str, codes: int) -> None:
    """Rows of logits that are filled up to 16 bytes: a CPU's product of bfloat16 pairs reads the column past the last
    one.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, 64, generator=generator, dtype=torch.float32).bfloat16().requires_grad_()
        for rows in (102, codes)
    )
    target = torch.randint(codes, (102,), generator=generator)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        assert torch.empty(3).isnan().all()
        loss = op.linear_cross_entropy(hidden, weight, target, backend=backend)
        gradients = torch.autograd.grad(loss, (hidden, weight))
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_strided_inputs() -> None:
    arguments = call(10, 16, 24)
    contract.check_op(
        op,
        "triton",
        {
            "hidden": arguments["hidden"][:, ::2],
            "weight": arguments["weight"].t().contiguous().t()[:, ::2],
            "target": arguments["target"].repeat(2)[::2],
        },
        BOTH,
        torch.float32,
    )


def test_triton_launches_one_kernel_a_chunk(small_chunks: None) -> None:
    arguments = call(37, 4, 9)
    with count_accesses() as launches:
        contract.run_with_gradients(lambda **kw: op.linear_cross_entropy(**kw, backend="triton"), arguments, BOTH)
    assert [launch.kernel for launch in launches] == ["cross_entropy_rows"] * 3


def test_a_target_out_of_range_sets_the_error_flag() -> None:
    """What a CUDA tensor meets, whose values the host does not read."""
    for bad in (-1, 9):
        logits, losses, target = torch.zeros(2, 9), torch.empty(2), torch.tensor([bad, 3])
        kernels.overwrite(logits, target, losses, True)
        assert losses[1].item() == pytest.approx(math.log(9))
        with pytest.raises(IndexError, match="target was outside"):
            error_flag.raise_if_set(logits.device)
    error_flag.raise_if_set(logits.device)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "hidden must be floating point, got torch.int64"),
        ({"hidden": torch.zeros(0, 4)}, ValueError, r"hidden must be \(N, D\) with N, D >= 1, got shape \(0, 4\)"),
        (
            {"weight": torch.zeros(9, 5)},
            ValueError,
            r"weight must be \(V, D\) with V >= 1 and D = 4 like hidden, got shape \(9, 5\)",
        ),
        (
            {"weight": torch.zeros(9, 4).double()},
            ValueError,
            "weight must be torch.float32 on cpu like hidden, got torch.float64",
        ),
        ({"weight": torch.zeros(9, 4, device="meta")}, ValueError, "like hidden, got torch.float32 on meta"),
        ({"target": torch.zeros(3)}, TypeError, "target must be int64 codes, got torch.float32"),
        (
            {"target": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            r"target must be \(3,\) on cpu like hidden, got \(2,\)",
        ),
        ({"target": torch.tensor([0, 9, 1])}, ValueError, r"target must be in 0 \.\.\. 8 .*, got values from 0 to 9"),
        ({"target": torch.tensor([0, -1, 1])}, ValueError, "got values from -1 to 1"),
    ],
)
def test_bad_input_says_what_came(change: dict[str, Tensor], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match="linear_cross_entropy: .*" + match):
        op.linear_cross_entropy(
            **{
                "hidden": torch.zeros(3, 4),
                "weight": torch.zeros(9, 4),
                "target": torch.zeros(3, dtype=torch.int64),
                **change,
            }
        )


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["tiny", "XL"])
def test_on_a_gpu(preset: str) -> None:
    contract.check_op(op, "triton", op.inputs(preset, torch.bfloat16, "cuda"), BOTH, torch.bfloat16)
    contract.check_same_bits(op, "triton", op.inputs(preset, torch.bfloat16, "cuda"), BOTH)
    error_flag.raise_if_set(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.gpu
@pytest.mark.parametrize("codes", [16384, 65536])
def test_memory_on_a_gpu(codes: int) -> None:
    """Beyond the returned gradients and one float32 weight gradient: at most 134 MB."""
    hidden, weight = (
        torch.randn(n, 1280, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (32768, codes)
    )
    target = torch.randint(codes, (32768,), device="cuda")
    op.linear_cross_entropy(hidden[:64], weight, target[:64]).backward()  # cuBLAS takes its workspace
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    op.linear_cross_entropy(hidden, weight, target).backward()
    beyond = torch.cuda.max_memory_allocated() - before - 2 * (hidden.numel() + weight.numel()) - 4 * weight.numel()
    assert beyond <= 134e6, f"{beyond / 1e6:.0f} MB"

"""Output matrix and cross-entropy in one, so that the (N, V) logits never exist whole: L_AR of the method."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from star_fast.ops import dispatch
from star_fast.ops.shapes import SHAPES

# overwrite(logits (n, V), target (n,), losses (n,), gradient): fills `losses`; with `gradient` puts softmax - one_hot
# in place of the logits.
Overwrite = Callable[[Tensor, Tensor, Tensor, bool], None]

_CHUNK_BYTES = 2**25  # logits of one chunk on the CPU: large enough that the three products run at full speed
_BLOCK_BYTES = 2**20  # float32 logits handled at once: they stay in a core's cache between the passes of the softmax
_PARTIAL_BYTES = 2**24  # one chunk's share of a block of the weight gradient, before it is added
_ALIGNED_BYTES = 16  # where rows of a product's operands must start for 16-byte loads and the bulk copy engine


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, *, backend: str | None = None) -> Tensor:
    """mean over n of -log softmax(weight hidden[n])[target[n]].

    Backward, with G[n, v] = dout / N * (softmax(weight hidden[n])[v] - [v = target[n]]): dhidden = G weight, dweight =
    G^T hidden. Where gradients are wanted they are computed chunk by chunk in the forward pass, while a chunk's logits
    exist: the three products of the plain form, nothing twice. Backward only scales them. A second backward through the
    same graph recomputes them.

    Args:
        hidden: (N, D) float, N >= 1: hidden states after the final norm.
        weight: (V, D), dtype and device of `hidden`: the output matrix, one row a code.
        target: (N,) int64, 0 <= target < V.
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        Scalar float32 (float64 for float64): the mean.

    Numerics:
        Logits and G are rounded to the dtype of `hidden` (what the matrix products take); softmax statistics, losses
        and the sum of the weight gradient over chunks are float32 (float64 for float64), on CUDA inside cuBLAS too. No
        small entry of G is dropped. Deterministic.

    Memory:
        Beyond the returned gradients: one weight gradient in float32 and at most 134 MB, whatever N (a chunk of logits,
        130 MB on CUDA and 34 on the CPU). Without gradients asked for (torch.no_grad, or inputs that require none) one
        chunk of logits, and no gradient work.

    Raises:
        TypeError: hidden not floating point, target not int64. ValueError: shapes, dtypes or devices that do not fit; a
        target outside 0 ... V-1 (checked on the CPU; on CUDA the kernel sets the error flag, see ops/error_flag.py).

    Source:
        Cut Cross-Entropy (arXiv 2411.09009) and Liger Kernel (arXiv 2410.10989) for the idea; ST-AR (arXiv 2509.15185),
        L_AR.
    """
    _check(hidden, weight, target)
    return dispatch.call("linear_cross_entropy", hidden.device, (hidden, weight, target), backend=backend)


def _check(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"linear_cross_entropy: hidden must be floating point, got {hidden.dtype}")
    if hidden.ndim != 2 or 0 in hidden.shape:
        raise ValueError(f"linear_cross_entropy: hidden must be (N, D) with N, D >= 1, got shape {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"linear_cross_entropy: weight must be (V, D) with V >= 1 and D = {hidden.shape[1]} like hidden, got "
            f"shape {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"linear_cross_entropy: weight must be {hidden.dtype} on {hidden.device} like hidden, got "
            f"{weight.dtype} on {weight.device}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: target must be int64 codes, got {target.dtype}")
    if target.shape != hidden.shape[:1] or target.device != hidden.device:
        raise ValueError(
            f"linear_cross_entropy: target must be ({hidden.shape[0]},) on {hidden.device} like hidden, "
            f"got {tuple(target.shape)} on {target.device}"
        )
    if target.device.type == "cpu" and not isinstance(target, FakeTensor):
        low, high = (int(value) for value in torch.aminmax(target))
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"linear_cross_entropy: target must be in 0 ... {weight.shape[0] - 1} (rows of weight), got "
                f"values from {low} to {high}"
            )


def reference(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The op in torch's own operations: chunks of rows, products by torch.mm, the softmax of a chunk in cache-sized
    blocks.
    """
    return in_chunks(
        hidden,
        weight,
        target,
        max(16, _CHUNK_BYTES // (weight.shape[0] * weight.element_size())),
        softmax_minus_one_hot,
    )


def softmax_minus_one_hot(logits: Tensor, target: Tensor, losses: Tensor, gradient: bool) -> None:
    """An `Overwrite`: losses[n] = -log softmax(logits[n])[target[n]]; with `gradient`, logits[n] becomes
    softmax(logits[n]) - one_hot(target[n]).
    """
    rows = max(1, _BLOCK_BYTES // (4 * logits.shape[1]))
    for x, t, loss in zip(logits.split(rows), target[:, None].split(rows), losses[:, None].split(rows), strict=True):
        logp = torch.log_softmax(x, dim=1, dtype=losses.dtype)
        torch.neg(logp.gather(1, t), out=loss)
        if gradient:
            probs = logp.exp_()
            x.copy_(probs.scatter_add_(1, t, torch.full_like(loss, -1.0)))


def in_chunks(hidden: Tensor, weight: Tensor, target: Tensor, chunk_rows: int, overwrite: Overwrite) -> Tensor:
    """The mean loss, with its gradients where they are wanted; `overwrite` turns a chunk of logits into losses and
    their gradient.
    """
    wanted_hidden, wanted_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    wanted = (wanted_hidden, wanted_weight)
    if any(wanted):
        return _InChunks.apply(hidden, weight, target, chunk_rows, overwrite, wanted)
    return _chunk_by_chunk(hidden, weight, target, chunk_rows, overwrite, wanted)[0]


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        chunk_rows: int,
        overwrite: Overwrite,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        loss, *ctx.gradients = _chunk_by_chunk(hidden, weight, target, chunk_rows, overwrite, wanted)
        ctx.save_for_backward(hidden, weight, target)
        ctx.how = chunk_rows, overwrite, wanted
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target = ctx.saved_tensors
        # Scaled in place and handed over, so that no second copy exists; hence gone at a second backward.
        dhidden, dweight = ctx.gradients or _chunk_by_chunk(hidden, weight, target, *ctx.how)[1:]
        ctx.gradients = None
        scale = (dout / hidden.shape[0]).view(1, 1)
        return _scaled(dhidden, scale, hidden.dtype), _scaled(dweight, scale, weight.dtype), None, None, None, None


def _chunk_by_chunk(
    hidden: Tensor, weight: Tensor, target: Tensor, chunk_rows: int, overwrite: Overwrite, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The mean loss, and where wanted N times its gradients: by hidden in the dtype of `hidden`, by weight in float32
    or float64.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(hidden.shape[0], dtype=exact)
    logits = _aligned(hidden, min(chunk_rows, hidden.shape[0]), weight.shape[0])
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if wanted[0] else None
    dweight = torch.empty(weight.shape, dtype=exact, device=weight.device) if wanted[1] else None
    with _full_precision_sums(hidden.device):
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            chunk = logits[: len(target[rows])]
            torch.mm(hidden[rows], weight.t(), out=chunk)
            overwrite(chunk, target[rows], losses[rows], any(wanted))
            if dhidden is not None:
                torch.mm(chunk, weight, out=dhidden[rows])
            if dweight is not None:
                _add_product(dweight, chunk, hidden[rows], first=start == 0)
    return losses.mean(), dhidden, dweight


def _aligned(like: Tensor, rows: int, columns: int) -> Tensor:
    """An empty (rows, columns) tensor whose rows all start at a multiple of 16 bytes. What fills them up is zero:
    products of bfloat16 on a CPU multiply pairs of columns, the one past the last by 0, which a NaN lying there would
    survive."""
    step = _ALIGNED_BYTES // like.element_size()
    whole = like.new_empty(rows, -(-columns // step) * step)
    if whole.shape[1] > columns:
        whole[:, columns:].zero_()
    return whole[:, :columns]


@contextlib.contextmanager
def _full_precision_sums(device: torch.device) -> Iterator[None]:
    """On CUDA, products of 16-bit factors sum in float32 throughout: by default cuBLAS may add the parts of a split sum
    in 16 bits.
    """
    if device.type != "cuda":
        yield
        return
    flags = torch.backends.cuda.matmul
    allowed = [
        name
        for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
        if getattr(flags, name)
    ]
    try:
        for name in allowed:
            setattr(flags, name, False)
        yield
    finally:
        for name in allowed:
            setattr(flags, name, True)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """total += gradient^T hidden, where `total` may be wider (float32) than the factors; the `first` product finds it
    empty and sets it.
    """
    beta = 0 if first else 1  # with 0 nothing is read, whatever lies there
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden, beta=beta)
    elif total.is_cuda and _accumulates_wider():
        torch.addmm(total, gradient.t(), hidden, beta=beta, out_dtype=total.dtype, out=total)
    else:
        # By blocks of codes, so that the product waits for its addition in cache; by whole 128s, so that every block
        # stays aligned. On the CPU torch.mm cannot return float32 for bfloat16 factors: there a chunk's share is
        # rounded once, and the shares are added in float32.
        product = functools.partial(torch.mm, out_dtype=total.dtype) if total.is_cuda else torch.mm
        codes = max(1, _PARTIAL_BYTES // (4 * hidden.shape[1] * 128)) * 128
        for part, columns in zip(total.split(codes), gradient.split(codes, dim=1), strict=True):
            share = product(columns.t(), hidden)
            part.copy_(share) if first else part.add_(share)


def _accumulates_wider() -> bool:
    """Whether this torch has the product of 16-bit factors that accumulates in place into float32."""
    return "dtype_out" in torch.ops.aten.addmm.overloads()


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * scale in `dtype`, computed in the dtype of `scale` and rounded once; in place where the gradient has
    that dtype already.
    """
    if gradient is None:
        return None
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    # On CUDA one launch; the CPU computes with float32 copies, which blocks keep small.
    rows = gradient.shape[0] if gradient.is_cuda else 4096
    for block, scaled in zip(gradient.split(rows), out.split(rows), strict=True):
        torch.mul(block, scale, out=scaled)
    return out


def inputs(preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Arguments for one call at a preset's training shape: unit-variance hidden states, weights of the initial scale,
    uniform targets.
    """
    shape = SHAPES[preset]
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(shape.rows, shape.D, generator=generator).to(device, dtype),
        "weight": (0.02 * torch.randn(shape.V, shape.D, generator=generator)).to(device, dtype),
        "target": torch.randint(shape.V, (shape.rows,), generator=generator).to(device),
    }


def cost(call: dict[str, Tensor], backward: bool = False) -> dispatch.Cost:
    """Least bytes and FLOPs of one call: of the loss alone, or if `backward` of the gradients alone (which the forward
    pass computes).

    The softmax counts 4 FLOPs a logit. Logits count no bytes: they are neither input nor output.
    """
    hidden, weight, target = call["hidden"], call["weight"], call["target"]
    size, logits = hidden.element_size(), hidden.shape[0] * weight.shape[0]
    read = (hidden.numel() + weight.numel()) * size
    if backward:  # writes both gradients; two products
        return dispatch.Cost(2 * read, logits * (4 * hidden.shape[1] + 2))
    return dispatch.Cost(read + target.numel() * 8 + 4, logits * (2 * hidden.shape[1] + 4))


dispatch.register(
    "linear_cross_entropy",
    reference,
    modules={"triton": "star_fast.ops.triton.linear_cross_entropy"},
    order={"cuda": ("triton",)},
)

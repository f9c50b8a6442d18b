"""Causal self-attention whose keys may be hidden per sequence: the student's attention (docs/method.md, the key mask)
and the teacher's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from star_fast.ops import dispatch
from star_fast.ops.rotary import check_table, random_table, rotate
from star_fast.ops.shapes import SHAPES


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """`masked_attention_qkv` for separate q, k and v, each (B, T, H, E); they are packed first, which copies them once.

    Args:
        q, k, v: (B, T, H, E) float, same shape, dtype and device.
        keep: (B, T) bool, True = visible as a key; None: all are. Position 0 must be visible.
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        (B, T, H, E), dtype and device of `q`.

    Raises:
        TypeError, ValueError: as `masked_attention_qkv`; also where q, k and v differ in shape, dtype or device.
    """
    for name, other in (("k", k), ("v", v)):
        if other.shape != q.shape or other.dtype != q.dtype or other.device != q.device:
            raise ValueError(
                f"masked_attention: {name} must be like q, {tuple(q.shape)} {q.dtype} on {q.device}, "
                f"got {tuple(other.shape)} {other.dtype} on {other.device}"
            )
    if q.ndim != 4:
        raise ValueError(f"masked_attention: q must be (B, T, H, E), got shape {tuple(q.shape)}")
    return _checked_call("masked_attention", torch.stack((q, k, v), dim=2), keep, None, False, backend)


def masked_attention_qkv(
    qkv: Tensor,
    keep: Tensor | None = None,
    *,
    rotary: Tensor | None = None,
    overwrite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """out[t] = sum over visible s <= t of softmax_s(q'[t] . k'[s] / sqrt(E)) v[s], per sequence and head; q', k' =
    rotary applied to q, k.

    A hidden key has no influence on any other position (its score is -inf for every query, its own included); its
    position still runs as a query. Backward, with P the softmax and D[t] = dout[t] . out[t]: dv[s] = sum_t P[t,s]
    dout[t]; dS[t,s] = P[t,s] (dout[t] . v[s] - D[t]) / sqrt(E); dq' = dS k', dk' = dS^T q'; then the rotary turned
    back.

    Args:
        qkv: (B, T, 3, H, E) float: q, k, v of each position. Any strides. E even where `rotary` is given.
        keep: (B, T) bool, True = visible as a key; None: all are. Position 0 must be visible, so that every query has a
            key.
        rotary: (T or more, E/2, 2) float32 = (cos, sin) of each pair (x[2p], x[2p+1]), applied to q and k; None:
            applied already. An all-zero entry makes q and k vanish there (LlamaGen's class position).
        overwrite: the caller reads `qkv` no more, so q and k in it may be overwritten by their rotated form (Triton
            does; it copies qkv otherwise). Its gradient is the same.
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        (B, T, H, E), dtype and device of `qkv`.

    Numerics:
        Softmax statistics and sums in float32 (float64 for float64). Rotary is computed in float32 and rounded to the
        dtype of `qkv` before the products. Deterministic, the gradient too; only the sdpa backend's backward on CUDA
        follows torch.use_deterministic_algorithms.

    Memory:
        Triton saves qkv (q and k rotated in place), out, one float32 per (sequence, head, position) and a bit a key;
        the score matrix is never stored.

    Raises:
        TypeError: qkv not floating point, keep not bool. ValueError: shapes or devices that do not fit; keep[:, 0] not
        all True (checked on the CPU; on CUDA position 0 counts as visible).

    Source:
        ST-AR (arXiv 2509.15185), the masked self-attention of L_MIM; LlamaGen (arXiv 2406.06525), Attention;
        FlashAttention-2 (arXiv 2307.08691).
    """
    return _checked_call("masked_attention_qkv", qkv, keep, rotary, overwrite, backend)


def _checked_call(
    op: str, qkv: Tensor, keep: Tensor | None, rotary: Tensor | None, overwrite: bool, backend: str | None
) -> Tensor:
    """`masked_attention_qkv`, whose errors bear the name of the function that was called."""
    if not qkv.is_floating_point():
        raise TypeError(f"{op}: qkv must be floating point, got {qkv.dtype}")
    if qkv.ndim != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[1:]:
        raise ValueError(f"{op}: qkv must be (B, T, 3, H, E) with T, H, E >= 1, got shape {tuple(qkv.shape)}")
    if rotary is not None:
        check_table(op, rotary, qkv.shape[1], qkv.shape[4], qkv.device)
    if keep is not None:
        _check_keep(op, keep, qkv)
    return dispatch.call(
        "masked_attention_qkv", qkv.device, (qkv, keep), {"rotary": rotary, "overwrite": overwrite}, backend=backend
    )


def _check_keep(op: str, keep: Tensor, qkv: Tensor) -> None:
    if keep.dtype != torch.bool:
        raise TypeError(f"{op}: keep must be bool (True = visible), got {keep.dtype}")
    if keep.shape != qkv.shape[:2]:
        raise ValueError(f"{op}: keep must be (B, T) = {tuple(qkv.shape[:2])} like qkv, got shape {tuple(keep.shape)}")
    if keep.device != qkv.device:
        raise ValueError(f"{op}: keep must be on {qkv.device} like qkv, got {keep.device}")
    if keep.device.type == "cpu" and not isinstance(keep, FakeTensor) and not keep[:, 0].all():
        raise ValueError(
            f"{op}: keep[:, 0] must be True (the class position is never hidden), got False in "
            f"{int((~keep[:, 0]).sum())} rows"
        )


def reference(
    qkv: Tensor, keep: Tensor | None = None, *, rotary: Tensor | None = None, overwrite: bool = False
) -> Tensor:
    """The formula, in plain torch: scaled_dot_product_attention, causal or with one boolean mask
    that all heads share.
    """
    q, k, v = qkv.unbind(2)
    if rotary is not None:
        table = rotary[: qkv.shape[1], None]
        q, k = rotate(q, table), rotate(k, table)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if keep is None else visible_pairs(keep)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=keep is None).transpose(1, 2)


def visible_pairs(keep: Tensor) -> Tensor:
    """(B, T) -> (B, T, T) bool: whether query t attends to key s, that is s <= t and s visible;
    position 0 always is.
    """
    positions = keep.shape[1]
    causal = torch.ones(positions, positions, dtype=torch.bool, device=keep.device).tril()
    first = torch.arange(positions, device=keep.device) == 0
    return causal & (keep | first)[:, None]


def inputs(preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `masked_attention_qkv` at a preset's training shape, a quarter of the image positions hidden in each
    sequence.
    """
    shape = SHAPES[preset]
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(shape.sequences, shape.T, 3, shape.H, shape.E, generator=generator).to(device, dtype)
    order = torch.rand(shape.sequences, shape.T - 1, generator=generator).argsort(dim=1)
    keep = torch.ones(shape.sequences, shape.T, dtype=torch.bool)
    keep[:, 1:] = order >= (shape.T - 1) // 4
    return {"qkv": qkv, "keep": keep.to(device), "rotary": random_table(shape.T, shape.E, generator).to(device)}


def cost(call: dict[str, Tensor], backward: bool = False) -> dispatch.Cost:
    """Least bytes and FLOPs of one call with these arguments, of the backward pass if `backward`; only visible pairs
    are counted.
    """
    qkv, keep = call["qkv"], call.get("keep")
    batch, positions, _, heads, size = qkv.shape
    if keep is None:
        pairs = batch * positions * (positions + 1) // 2
    else:  # key s is seen by the queries s ... T-1
        pairs = int((keep.sum(0) * (positions - torch.arange(positions, device=keep.device))).sum())
    tensor_bytes = batch * positions * heads * size * qkv.element_size()
    side_bytes = (0 if keep is None else keep.numel()) + (0 if call.get("rotary") is None else 4 * positions * size)
    if backward:  # reads q, k, v, out, dout; writes dq, dk, dv; products S, dP, dV, dQ, dK
        return dispatch.Cost(8 * tensor_bytes + side_bytes, 10 * pairs * heads * size)
    return dispatch.Cost(4 * tensor_bytes + side_bytes, 4 * pairs * heads * size)


dispatch.register(
    "masked_attention_qkv",
    reference,
    modules={
        "flash": "star_fast.ops.attention_by_flash",
        "sdpa": "star_fast.ops.attention_by_sdpa",
        "triton": "star_fast.ops.triton.masked_attention",
    },
    order={"cuda": ("flash", "sdpa", "triton")},
)

"""One decoding step of attention: append this position's key and value to the cache and attend over what is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from star_fast.ops import dispatch, error_flag
from star_fast.ops.kv_cache import LARGEST_CODE, KVCache, blocked_shapes, in_blocks, in_rows, new_rows, refuse_blocks
from star_fast.ops.rotary import check_table, random_table, rotate
from star_fast.ops.shapes import SHAPES


def new_cache(
    rows: int,
    heads: int,
    positions: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    qkv_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> KVCache:
    """A cache of zeros, laid out for the backend that will serve the calls with it.

    Args:
        rows, heads, positions, head_size: R, H, T, E.
        dtype: of the model, or int8 or float8_e4m3fn: an 8-bit cache with its scales.
        qkv_dtype: of the calls; None: `dtype`, and of an 8-bit cache float32 or bfloat16.
        backend: as the calls will name it; None chooses (see dispatch).

    Returns:
        A KVCache in the layout that the backend's `new_cache` gives it; a backend without one, or that will not serve
        such calls, gets rows.
    """
    chosen = dispatch.module_for("decode_attention", torch.device(device), backend=backend)
    make = getattr(chosen, "new_cache", None)
    cache = None if make is None else make(rows, heads, positions, head_size, dtype, device, qkv_dtype)
    return new_rows(rows, heads, positions, head_size, dtype, device) if cache is None else cache


def laid_out(cache: KVCache, backend: str | None) -> KVCache:
    """A cache with the same contents in the layout that `backend` (None: the chosen one) reads; the cache itself if it
    is in that layout.
    """
    like = new_cache(
        0,
        cache.k.shape[1],
        cache.positions,
        cache.layout.size if cache.layout else cache.k.shape[3],
        cache.k.dtype,
        cache.k.device,
        backend=backend,
    )
    return in_rows(cache) if like.layout is None else in_blocks(cache)


def decode_attention(
    qkv: Tensor, cache: KVCache, position: int | Tensor, *, rotary: Tensor | None, backend: str | None = None
) -> Tensor:
    """Append k' and v at `position`, then out = sum over s <= position of softmax_s(q' . k'[s] / sqrt(E)) v[s]; k', q'
    = rotary applied.

    Args:
        qkv: (R, 3, H, E) float: q, k, v of the current position of each row. Any strides. No gradient.
        cache: k and v in the dtype of `qkv`, or int8 or float8_e4m3fn with float32 scales; changed in place. In rows (k
            and v (R, H, T, E), scales (R, H, T)) for the reference and Triton; in blocks (ops/kv_cache.py) for "cpp".
            `new_cache` makes what the chosen backend reads.
        position: 0 ... T-1; an int, or a 0-d int64 tensor on the device of `qkv` (read there, so that one CUDA graph
            serves every step).
        rotary: (T or more, E/2, 2) float32 = (cos, sin), as in `masked_attention_qkv`; None: applied already.
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        (R, H, E), dtype and device of `qkv`.

    Numerics:
        Rotary in float32, rounded to the cache's dtype. An 8-bit cache stores each (row, head, position) as codes times
        max|x| / 127 (int8, rounded half up: error at most half a code) or max|x| / 448 (float8_e4m3fn: 2^-4 relative);
        the current position is attended to as stored. Triton sums in float32 (float64 for float64); the reference
        rounds the scores to the dtype of `qkv`, as its matrix product does. "cpp" sums in float32 and gives the same
        bits on every instruction set and any number of threads; with an int8 cache it multiplies whole numbers,
        exactly: the query rounded to max|q| / 32767, the probabilities times the values' scales to their largest /
        32767 (an error of at most n / 65534 of the largest value at n positions; measured up to 2e-4 of it at 300).
        Deterministic.

    Memory:
        Only positions 0 ... position of the cache are read ("cpp": to the end of a block of 16); nothing the size of
        the cache is made on CUDA or by "cpp". Blocks pad T to 16 and E of the values to 16, E of int8 keys to 4.

    Raises:
        TypeError, ValueError: dtypes, shapes, layouts or devices that do not fit. IndexError: position out of range (a
        device tensor on CUDA sets the error flag instead: `error_flag.raise_if_set`). RuntimeError: `qkv` asks for a
        gradient.

    Source:
        LlamaGen (arXiv 2406.06525), Attention with KVCache; per-row 8-bit scales as in KIVI's per-token values (arXiv
        2402.02750).
    """
    _check(qkv, cache)
    rows, _, heads, size = qkv.shape
    positions = cache.positions
    if rotary is not None:
        check_table("decode_attention", rotary, positions, size, qkv.device)
    if isinstance(position, Tensor):
        if position.ndim != 0 or position.dtype != torch.int64 or position.device != qkv.device:
            raise TypeError(
                f"decode_attention: position must be an int or a 0-d int64 tensor on {qkv.device}, "
                f"got {position.dtype} of shape {tuple(position.shape)} on {position.device}"
            )
        if position.device.type == "cpu" and not isinstance(position, FakeTensor):
            position = int(position)
    elif not isinstance(position, int):
        raise TypeError(
            f"decode_attention: position must be an int or a 0-d int64 tensor on {qkv.device}, got "
            f"{type(position).__name__}"
        )
    if isinstance(position, int) and not 0 <= position < positions:
        raise IndexError(
            f"decode_attention: position must be in 0 ... {positions - 1} (the cache holds {positions}), got {position}"
        )
    return dispatch.call("decode_attention", qkv.device, (qkv, cache, position), {"rotary": rotary}, backend=backend)


def _check(qkv: Tensor, cache: KVCache) -> None:
    if not qkv.is_floating_point() or qkv.dtype in LARGEST_CODE:
        raise TypeError(f"decode_attention: qkv must be floating point of 16 bits or more, got {qkv.dtype}")
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"decode_attention: qkv must be (R, 3, H, E), got shape {tuple(qkv.shape)}")
    if qkv.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("decode_attention: it has no gradient; call it under torch.no_grad()")
    rows, _, heads, size = qkv.shape
    k, v, k_scale, v_scale, layout = cache
    scale_shape: tuple[int, ...] = k.shape[:3]
    if layout is None:
        if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (rows, heads, size) or v.shape != k.shape:
            raise ValueError(
                f"decode_attention: cache k and v must be ({rows}, {heads}, T, {size}) for this qkv, got "
                f"{tuple(k.shape)} and {tuple(v.shape)}"
            )
    else:
        k_shape, v_shape, scale_shape = blocked_shapes(rows, heads, layout, k.dtype)
        if layout.size != size or k.shape != k_shape or v.shape != v_shape:
            raise ValueError(
                f"decode_attention: cache k and v in blocks must be {k_shape} and {v_shape}, E {size}, for this "
                f"qkv, got {tuple(k.shape)} and "
                f"{tuple(v.shape)}, E {layout.size}"
            )
    if k.dtype != v.dtype or (k.dtype != qkv.dtype and k.dtype not in LARGEST_CODE):
        raise TypeError(
            f"decode_attention: cache k and v must both be {qkv.dtype} like qkv, int8 or float8_e4m3fn, got "
            f"{k.dtype} and {v.dtype}"
        )
    for name, x in (("k", k), ("v", v), ("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None and (x.device != qkv.device or not x.is_contiguous()):
            raise ValueError(
                f"decode_attention: cache {name} must be contiguous on {qkv.device} like qkv, got strides "
                f"{x.stride()} on {x.device}"
            )
        if x is not None and name.endswith("scale") and (x.dtype != torch.float32 or x.shape != scale_shape):
            raise ValueError(
                f"decode_attention: cache {name} must be {tuple(scale_shape)} float32, got {tuple(x.shape)} {x.dtype}"
            )
    if (k.dtype in LARGEST_CODE) != (k_scale is not None) or (k.dtype in LARGEST_CODE) != (v_scale is not None):
        raise ValueError(
            "decode_attention: an int8 or float8_e4m3fn cache needs k_scale and v_scale, another has none; got "
            f"{k.dtype} with "
            f"k_scale {'given' if k_scale is not None else 'None'}, v_scale "
            f"{'given' if v_scale is not None else 'None'}"
        )


def reference(qkv: Tensor, cache: KVCache, position: int | Tensor, *, rotary: Tensor | None) -> Tensor:
    """The formula, in plain torch: two batched products over the rows 0 ... position (all rows, masked, if `position`
    is on a device).
    """
    refuse_blocks(cache)
    compute = torch.promote_types(qkv.dtype, torch.float32)
    qk, v = qkv[:, :2], qkv[:, 2]
    positions = cache.k.shape[2]
    bad: Tensor | None = None
    if isinstance(position, Tensor):
        # Nothing here may wait for the device: a bad position is noted, and position 0 stands in for it
        bad = (position < 0) | (position >= positions)
        error_flag.note(bad, error_flag.POSITION_OUT_OF_RANGE)
        position, n = position.masked_fill(bad, 0).view(1), positions
    else:
        n = position + 1
    eight_bit = cache.k_scale is not None
    if rotary is not None:
        qk = rotate(qk.to(compute) if eight_bit else qk, rotary[position])
    q, k = qk.unbind(1)
    _append(cache.k, cache.k_scale, k, position, bad)
    _append(cache.v, cache.v_scale, v, position, bad)
    keys, values = (_rows(x, scale, n, qkv.dtype) for x, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)))
    scores = torch.bmm(q.to(qkv.dtype).reshape(-1, 1, q.shape[-1]), keys.transpose(1, 2)) * q.shape[-1] ** -0.5
    if bad is not None:
        scores = scores.masked_fill(torch.arange(n, device=qkv.device) > position, float("-inf"))
    return torch.bmm(torch.softmax(scores, dim=-1), values).view(q.shape)


def _append(store: Tensor, scale: Tensor | None, x: Tensor, position: int | Tensor, bad: Tensor | None) -> None:
    if scale is not None:
        x, row_scale = quantise(x, store.dtype)
        _put(scale, row_scale, position, bad)
    _put(store, x, position, bad)


def _put(store: Tensor, x: Tensor, position: int | Tensor, bad: Tensor | None) -> None:
    if bad is None or isinstance(position, int):
        store[:, :, position] = x
        return
    place = store.view(torch.uint8) if store.dtype == torch.float8_e4m3fn else store  # index_copy_ knows no 8-bit float
    x = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x.to(store.dtype)
    place.index_copy_(2, position, torch.where(bad, place.index_select(2, position), x.unsqueeze(2)))


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., E) float -> codes (..., E) of `dtype` (int8 or float8_e4m3fn) and scales (...) float32, x = codes * scale
    up to rounding.

    A row of zeros gets scale 0.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1) / LARGEST_CODE[dtype]
    codes = x / scale.masked_fill(scale == 0, 1.0)[..., None]
    return (torch.floor(codes + 0.5) if dtype == torch.int8 else codes).to(dtype), scale


def _rows(store: Tensor, scale: Tensor | None, n: int, dtype: torch.dtype) -> Tensor:
    """The first n cached rows as (R*H, n, E) of `dtype`."""
    rows = store.flatten(0, 1)[:, :n]
    if scale is not None:
        rows = rows.to(torch.promote_types(dtype, torch.float32)) * scale.flatten(0, 1)[:, :n, None]
    # The CPU's 16-bit product is several times slower on a strided transpose than this copy
    if dtype in (torch.bfloat16, torch.float16):
        rows = rows.contiguous()
    return rows.to(dtype)


def inputs(
    preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0, cache_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Arguments for the last step of a preset: rows = its sequences, the cache full and in rows, `position` T-1.
    `cache_dtype`: int8 or float8_e4m3fn.
    """
    shape = SHAPES[preset]
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(shape.sequences, 3, shape.H, shape.E, generator=generator).to(device, dtype)
    k, v = (torch.randn(shape.sequences, shape.H, shape.T, shape.E, generator=generator) for _ in range(2))
    if cache_dtype is None:
        cache = KVCache(k.to(device, dtype), v.to(device, dtype))
    else:
        (k, k_scale), (v, v_scale) = quantise(k, cache_dtype), quantise(v, cache_dtype)
        cache = KVCache(k.to(device), v.to(device), k_scale.to(device), v_scale.to(device))
    return {
        "qkv": qkv,
        "cache": cache,
        "position": shape.T - 1,
        "rotary": random_table(shape.T, shape.E, generator).to(device),
    }


def cost(call: dict[str, Any]) -> dispatch.Cost:
    """Least bytes and FLOPs of one call: qkv and cached rows 0 ... position-1 read, one row of k and v and the output
    written.
    """
    qkv, cache, position = call["qkv"], call["cache"], int(call["position"])
    rows, _, heads, size = qkv.shape
    row_bytes = 2 * rows * heads * (size * cache.k.element_size() + (4 if cache.k_scale is not None else 0))
    table_bytes = 0 if call.get("rotary") is None else 4 * size
    return dispatch.Cost(
        (position + 1) * row_bytes + 4 * rows * heads * size * qkv.element_size() + table_bytes,
        4 * rows * heads * size * (position + 1),
    )


dispatch.register(
    "decode_attention",
    reference,
    modules={"triton": "star_fast.ops.triton.decode_attention", "cpp": "star_fast.ops.decode_attention_cpp"},
    order={"cuda": ("triton",), "cpu": ("cpp",)},
)

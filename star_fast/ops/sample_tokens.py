"""Token sampling: guidance, temperature, top-k, top-p and one draw per row of logits, the same token bit for bit on
every backend.
"""

from __future__ import annotations

import math
import struct
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from star_fast.ops import dispatch
from star_fast.ops.shapes import SHAPES

MAX_VOCAB = 65536  # 2^16 weights of at most 2^40 each: every sum stays below 2^57
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-5, 1e5

_WEIGHT_BITS = 40  # the largest logit weighs 2^40
# See weights()
_EXP2 = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
_MASK32 = 0xFFFFFFFF
_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_bad_rows: dict[torch.device, Tensor] = {}


def sample_tokens(
    logits: Tensor,
    *,
    seed: int | Tensor,
    image_index: Tensor,
    position: int | Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token a row: draw from softmax(guided / temperature), restricted to the top-k and then to the top-p tokens.

    In this order, for each row:

    1. guided g = uncond + guidance * (logits - uncond) if `uncond` is given and guidance > 1 (a token of logit -inf
       stays -inf), else g = logits;
    2. weight w = round(2^40 * e^((g - max g) / temperature)), an integer;
    3. top-k: keep every token with fewer than k tokens of strictly greater g (ties at the k-th stay);
    4. top-p, on what is left: keep every token for which the kept tokens of strictly greater g weigh at most
       floor(p * total weight). So the token that crosses p stays, as do all tokens with the same g, and the largest
       always;
    5. draw: u = 64 random bits of (seed, image_index, position); the token is the first, by index, whose running sum of
       kept weights exceeds floor(u * total weight / 2^64).

    Sums of integers have no order and steps 3 and 4 look at values only: batch size, thread count and device cannot
    change a token. A token more than 28.4 temperatures below the largest weighs 0 (probability under 2^-41) and is
    never drawn, nor is one of logit -inf.

    Args:
        logits: (B, V) float32, bfloat16 or float16, natural-log scale; 1 <= V <= 65536; any row stride. -inf marks a
            token that cannot be drawn.
        seed: of the whole run, 0 ... 2^63 - 1: an int, or a 0-d int64 tensor on the device of `logits` (read there: no
            host sync).
        image_index: (B,) int64, device of `logits`: names each row's random stream.
        position: of the token in its image, 0 or more: an int, or a 0-d int64 tensor on the device of `logits`.
        temperature: 0 (the largest logit; lowest index among equals) or 1e-5 ... 1e5.
        top_k: tokens kept, 0 = all.
        top_p: share of the probability kept, 0 ... 1; 1 = all.
        uncond: (B, V) logits without the condition, dtype and device of `logits`, or None.
        guidance: scale of classifier-free guidance; acts above 1 only.
        out: (B,) int64 contiguous, device of `logits`: written in place and returned; None allocates.
        backend: name of a backend; None chooses (see dispatch).

    Returns:
        (B,) int64 tokens, 0 ... V - 1. No gradient.

    Numerics:
        Logits are converted to float32 first; guidance and weights are computed in float32 with one rounding per
        operation (no fused multiply-add) and a fixed polynomial of relative error 2e-7; sums and the draw are integer.
        Deterministic, equal bit for bit on all backends.

    Memory:
        "cpp" on CPU: a few rows of scratch per thread. "cpp" on CUDA: none. The reference sorts copies of the logits.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number. On the CPU also a row that holds NaN or +inf
        after guidance, or nothing but -inf; on CUDA such a row gets token 0 and sets a flag on the device, which
        `raise_on_bad_rows` reads.

    Source:
        LlamaGen (arXiv 2406.06525), autoregressive/models/generate.py; Philox4x32-10: Salmon et al., SC 2011.
    """
    _check(logits, seed, image_index, position, temperature, top_k, top_p, uncond, guidance, out)
    if guidance <= 1:
        uncond = None
    settings = {
        "seed": seed,
        "image_index": image_index,
        "position": position,
        "temperature": float(temperature),
        "top_k": top_k,
        "top_p": float(top_p),
        "uncond": uncond,
        "guidance": float(guidance),
        "out": out,
    }
    return dispatch.call("sample_tokens", logits.device, (logits,), settings, backend=backend)


def raise_on_bad_rows(device: torch.device | str) -> None:
    """Raise ValueError if a call on this CUDA device met a bad row since the last look (reads the device's flag: one
    host sync). Once per batch is enough.
    """
    flag = _bad_rows.get(_indexed(torch.device(device)))
    if flag is not None and int(flag):
        flag.zero_()
        raise ValueError(
            "sample_tokens: a row of logits held NaN or +inf, or nothing but -inf; its token was set to 0: "
            "discard this batch"
        )


def bad_rows_flag(device: torch.device) -> Tensor:
    """The device's flag, (1,) int32, 0 while all rows were good. Allocated once, so that CUDA graphs can hold its
    address: call once before capture.
    """
    device = _indexed(device)
    if device not in _bad_rows:
        _bad_rows[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _bad_rows[device]


def _indexed(device: torch.device) -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device
    )


def _check(
    logits: Tensor,
    seed: int | Tensor,
    image_index: Tensor,
    position: int | Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    uncond: Tensor | None,
    guidance: float,
    out: Tensor | None,
) -> None:
    if logits.dtype not in _LOGITS_DTYPES:
        raise TypeError(f"sample_tokens: logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= MAX_VOCAB:
        raise ValueError(
            f"sample_tokens: logits must be (B, V) with 1 <= V <= {MAX_VOCAB}, got shape {tuple(logits.shape)}"
        )
    rows = logits.shape[0]
    for name, tensor in (("image_index", image_index), ("out", out)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            raise TypeError(
                f"sample_tokens: {name} must be an int64 tensor, got "
                f"{tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__}"
            )
        if tensor.shape != (rows,) or tensor.device != logits.device:
            raise ValueError(
                f"sample_tokens: {name} must be ({rows},) on {logits.device}, got {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
    if out is not None and not out.is_contiguous():
        raise ValueError(f"sample_tokens: out must be contiguous, got strides {out.stride()}")
    for name, number in (("seed", seed), ("position", position)):
        if isinstance(number, Tensor):
            if number.dtype != torch.int64 or number.ndim or number.device != logits.device:
                raise ValueError(
                    f"sample_tokens: {name} must be an int or a 0-d int64 tensor on {logits.device}, "
                    f"got {number.dtype} of shape {tuple(number.shape)} on {number.device}"
                )
        elif isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"sample_tokens: {name} must be an int or a 0-d int64 tensor, got {type(number).__name__}")
        elif not 0 <= number < (2**63 if name == "seed" else 2**32):
            raise ValueError(
                f"sample_tokens: {name} must be 0 or more and below 2^{63 if name == 'seed' else 32}, got {number}"
            )
    if not (temperature == 0 or MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE):
        raise ValueError(
            f"sample_tokens: temperature must be 0 (argmax) or in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}], got "
            f"{temperature}"
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"sample_tokens: top_k must be an int, 0 (all) or more, got {top_k!r}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"sample_tokens: top_p must be in [0, 1], got {top_p}")
    if not 0 <= guidance <= 1e6:
        raise ValueError(f"sample_tokens: guidance must be in [0, 1e6], got {guidance}")
    if uncond is None and guidance > 1:
        raise ValueError(
            f"sample_tokens: guidance {guidance} needs uncond, got None (leave guidance at 1 when it was applied "
            "before)"
        )
    if uncond is not None and (
        uncond.shape != logits.shape or uncond.dtype != logits.dtype or uncond.device != logits.device
    ):
        raise ValueError(
            f"sample_tokens: uncond must match logits ({logits.dtype} {tuple(logits.shape)} on {logits.device}), "
            f"got {uncond.dtype} {tuple(uncond.shape)} on {uncond.device}"
        )


def reference(
    logits: Tensor,
    *,
    seed: int | Tensor,
    image_index: Tensor,
    position: int | Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    uncond: Tensor | None,
    guidance: float,
    out: Tensor | None,
) -> Tensor:
    """The five steps, in plain torch, by sorting."""
    g = guided(logits, uncond, guidance)
    largest = g.amax(1, keepdim=True)
    good = (g < math.inf).all(1, keepdim=True) & (largest > -math.inf)  # NaN < inf is false
    _note_bad_rows(g, good)
    vocab = torch.arange(g.shape[1], device=g.device)
    if temperature == 0:
        tokens = torch.where(g == largest, vocab, g.shape[1]).amin(1)
    else:
        if 0 < top_k < g.shape[1]:
            g = torch.where(g >= g.topk(top_k).values[:, -1:], g, -math.inf)
        w = weights(g - largest, temperature)
        if top_p < 1:
            ordered, order = g.sort(1, descending=True)
            w_ordered = w.gather(1, order)
            heavier = w_ordered.cumsum(1) - w_ordered  # weight of what stands before, equal values included ...
            new_value = torch.ones_like(ordered, dtype=torch.bool)
            new_value[:, 1:] = ordered[:, 1:] < ordered[:, :-1]
            heavier = torch.where(new_value, heavier, 0).cummax(1).values  # ... and of strictly greater values only
            limit = multiply_high(_signed64(int(top_p * 2.0**64)), w.sum(1, keepdim=True))
            smallest_kept = torch.where(heavier <= limit, ordered, math.inf).amin(1, keepdim=True)
            w = torch.where(g >= smallest_kept, w, 0)
        running = w.cumsum(1)
        threshold = multiply_high(uniform64(seed, image_index, position), running[:, -1])
        tokens = torch.searchsorted(running, threshold[:, None], right=True)[:, 0]
    tokens = torch.where(good[:, 0], tokens, 0)
    return tokens if out is None else out.copy_(tokens)


def guided(logits: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """Step 1, in float32: uncond + guidance * (logits - uncond), each operation rounded; -inf where
    `logits` is -inf.
    """
    cond = logits.float()
    if uncond is None:
        return cond
    uncond = uncond.float()
    return torch.where(cond == -math.inf, cond, uncond + _float32(guidance) * (cond - uncond))


def weights(below: Tensor, temperature: float) -> Tensor:
    """Step 2: round(2^40 * e^(below / temperature)) as int64, for `below` = g - max g <= 0 in float32.

    With z = below * log2(e) / temperature = n + f, n the nearest integer: 2^z = 2^n * 2^f, and 2^f is the polynomial 1
    + f * (c1 + f * (c2 + ...)) of least relative error on [-1/2, 1/2] (9e-8 in exact arithmetic, 1.9e-7 with float32
    rounding). Every operation is rounded to float32; scaling by 2^(n + 40) is exact.
    """
    z = (below * _float32(1.4426950408889634 / temperature)).clamp(min=-64.0)
    n = z.round()
    f = z - n
    power = torch.full_like(f, _EXP2[4])
    for coefficient in (*_EXP2[3::-1], 1.0):
        power = power * f
        power = power + coefficient
    # 2^(n + 40) from its exponent bits: torch.exp2 need not be exact
    scale = ((n.int() + _WEIGHT_BITS + 127) << 23).view(torch.float32)
    return (power * scale).round().long()


def uniform64(seed: int | Tensor, image_index: Tensor, position: int | Tensor) -> Tensor:
    """64 random bits for each image, (B,) int64 in two's complement: words 0 (high) and 1 of Philox4x32-10.

    Key: seed low, seed high. Counter: position, 0, image_index low, image_index high.
    """
    counter = (position & _MASK32, 0, image_index & _MASK32, (image_index >> 32) & _MASK32)
    words = philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    return cast(Tensor, (words[0] << 32) | words[1])  # as image_index is one


def philox4x32(
    counter: tuple[int | Tensor, ...], key: tuple[int | Tensor, ...], rounds: int = 10
) -> tuple[int | Tensor, ...]:
    """Philox4x32 (Salmon et al. 2011): four random 32-bit words, held in ints or int64 tensors, from four counter words
    and two key words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products; int64 overflow keeps their bits
        c0, c1, c2, c3 = (
            ((odd >> 32) & _MASK32) ^ c1 ^ k0,
            odd & _MASK32,
            ((even >> 32) & _MASK32) ^ c3 ^ k1,
            even & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def multiply_high(fraction: int | Tensor, total: Tensor) -> Tensor:
    """floor(fraction * total / 2^64), exactly; `fraction` is an unsigned 64-bit number in two's complement, 0 <= total
    < 2^57.
    """
    low, high = fraction & _MASK32, (fraction >> 32) & _MASK32
    total_low, total_high = total & _MASK32, total >> 32
    low_low, high_low, low_high = low * total_low, high * total_low, low * total_high
    carry = (((low_low >> 32) & _MASK32) + (high_low & _MASK32) + (low_high & _MASK32)) >> 32
    return high * total_high + ((high_low >> 32) & _MASK32) + ((low_high >> 32) & _MASK32) + carry


def _note_bad_rows(g: Tensor, good: Tensor) -> None:
    if isinstance(g, FakeTensor):
        return
    if g.device.type != "cpu":
        bad_rows_flag(g.device).logical_or_(~good.all())
    elif not bool(good.all()):
        row = int((~good[:, 0]).nonzero()[0])
        raise ValueError(bad_row_message(row))


def bad_row_message(row: int) -> str:
    """What every CPU backend says of a row that cannot be drawn from."""
    return (
        f"sample_tokens: row {row} of the (guided) logits holds NaN or +inf, or nothing but -inf; "
        "every row needs a finite logit, and -inf only for excluded tokens"
    )


def _signed64(unsigned: int) -> int:
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


def _float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def inputs(preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments for one call at a preset's sampling shape: logits (B, V), image_index (B,), seed and position."""
    shape = SHAPES[preset]
    logits = 2 * torch.randn(shape.B, shape.V, generator=torch.Generator().manual_seed(seed))
    return {
        "logits": logits.to(device, dtype),
        "image_index": torch.arange(shape.B, device=device),
        "seed": seed,
        "position": shape.T // 2,
    }


def cost(call: dict[str, Any]) -> dispatch.Cost:
    """Least bytes (each logit once, tokens and stream names) and FLOPs (18 for a weight, 3 for guidance) of one call
    with these arguments.
    """
    logits, fused = call["logits"], call.get("uncond") is not None and call.get("guidance", 1.0) > 1
    return dispatch.Cost(
        logits.numel() * logits.element_size() * (2 if fused else 1) + 16 * logits.shape[0],
        logits.numel() * (21 if fused else 18),
    )


dispatch.register(
    "sample_tokens", reference, modules={"cpp": "star_fast.ops.extension"}, order={"cpu": ("cpp",), "cuda": ("cpp",)}
)

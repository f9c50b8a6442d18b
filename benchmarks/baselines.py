"""What others offer for the same op, where it is installed: the rows beside ours and the naive composition. None of it
is required.

- "compiled naive": torch.compile of the naive composition, every op.
- "FlexAttention": torch.nn.attention.flex_attention, compiled together with rotary, the key mask as a BlockMask. The
  named baseline of masked attention.
- "cuDNN SDPA": scaled_dot_product_attention by cuDNN, rotary compiled, the mask as a (B, 1, T, T) tensor.
- "Liger": liger-kernel's functions, where it has one for the op; its norm has no dropout, so torch's comes before.

Masks are made beforehand and cost nothing here: a training step makes them once for all its blocks. A baseline that is
not there, cannot serve the call or does not compute the same becomes a row without figures that says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import naive
from star_fast.ops.masked_attention import visible_pairs

Function = Callable[..., Any]
# Relative distance (norm) from the naive result in 16 bits; a wrong mask is tens of percent away
_LEAST_AGREEMENT = 0.02
_CUDNN = SDPBackend.CUDNN_ATTENTION


class NotHere(Exception):
    """Why a baseline has no figures."""


def beside(
    op: str, call: dict[str, Any], runner: Callable[[Function], Callable[[], object]]
) -> Iterator[tuple[str, Callable[[], object] | str]]:
    """The baselines of an op for this call: (name, what `runner` makes of its function, run once), or (name, why there
    is none).
    """
    for name, make in {"compiled naive": compiled_naive, **_OF_OP.get(op, {})}.items():
        try:
            if not torch.cuda.is_available():
                raise NotHere("needs a CUDA device")
            function = make(op, call)
            _check_agreement(getattr(naive, op), function, call)
            run = runner(function)
            run()  # its backward may be what it lacks
        except NotHere as error:
            yield name, f"skipped: {error}"
        except Exception as error:  # a baseline that breaks must not cost the other figures
            first = str(error).strip().splitlines() or [""]
            yield name, f"skipped: {type(error).__name__}: {first[0]}"
        else:
            yield name, run


def _check_agreement(plain: Function, function: Function, call: dict[str, Any]) -> None:
    if call.get("dropout"):  # each draws masks of its own
        call = {**call, "dropout": 0.0}
    with torch.no_grad():
        expected, found = ((out[0] if isinstance(out, tuple) else out) for out in (plain(**call), function(**call)))
    if expected is None:
        return
    apart = float((found.float() - expected.float()).norm() / expected.float().norm())
    if not apart < _LEAST_AGREEMENT:
        raise NotHere(f"its result is {apart:.1%} away from the naive one")


def compiled_naive(op: str, call: dict[str, Any]) -> Function:
    """torch.compile, shapes as they are."""
    return torch.compile(getattr(naive, op), dynamic=False)


def by_flex_attention(op: str, call: dict[str, Any]) -> Function:
    """Rotary and FlexAttention as one compiled function; hidden blocks are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    keep = call["keep"]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & keep[b, key]

    mask = create_block_mask(visible, keep.shape[0], None, keep.shape[1], keep.shape[1], device=str(keep.device))

    def attend(qkv: Tensor, rotary: Tensor, mask: Any) -> Tensor:
        q, k, v = qkv.unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (naive.rotate(q, rotary), naive.rotate(k, rotary), v))
        return flex_attention(q, k, v, block_mask=mask).transpose(1, 2)

    compiled = torch.compile(attend, dynamic=False)
    return lambda qkv, keep, rotary: compiled(qkv, rotary, mask)


def by_cudnn(op: str, call: dict[str, Any]) -> Function:
    """cuDNN's fused attention under a mask from memory; torch raises where cuDNN cannot."""
    mask, rotate = visible_pairs(call["keep"])[:, None], torch.compile(naive.rotate, dynamic=False)

    def attend(qkv: Tensor, keep: Tensor, rotary: Tensor) -> Tensor:
        q, k, v = qkv.unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, rotary), rotate(k, rotary), v))
        with sdpa_kernel(_CUDNN):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attend


def by_liger(op: str, call: dict[str, Any]) -> Function:
    """liger-kernel's function for the op."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise NotHere("liger-kernel is not installed")
    from liger_kernel.transformers import functional as liger

    def swiglu(w1w3: Tensor) -> Tensor:
        return liger.liger_swiglu(*w1w3.chunk(2, dim=-1))

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, dropout: float, seed: int) -> tuple[Tensor, Tensor]:
        return liger.liger_fused_add_rms_norm(F.dropout(x, dropout), residual, weight, 1e-5, in_place=False)

    def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return liger.liger_fused_linear_cross_entropy(hidden, weight, target)

    return {"swiglu": swiglu, "add_rms_norm": add_rms_norm, "linear_cross_entropy": linear_cross_entropy}[op]


_OF_OP: dict[str, dict[str, Callable[[str, dict[str, Any]], Function]]] = {
    "masked_attention_qkv": {"FlexAttention": by_flex_attention, "cuDNN SDPA": by_cudnn},
    **{op: {"Liger": by_liger} for op in ("swiglu", "add_rms_norm", "linear_cross_entropy")},
}

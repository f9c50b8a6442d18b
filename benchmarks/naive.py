"""Each op as a reader of the paper would first write it in PyTorch: the baseline of every speed and memory figure."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.ops.int8_linear import Int8Weight, rotated


def swiglu(w1w3: Tensor) -> Tensor:
    """The gate as in LlamaGen's FeedForward."""
    a, b = w1w3.chunk(2, dim=-1)
    return F.silu(a) * b


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, dropout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Residual add, dropout and norm as in LlamaGen's TransformerBlock (its masks come from torch's generator)."""
    h = residual + F.dropout(x, dropout)
    normed = h.float() * torch.rsqrt(torch.mean(h.float() * h.float(), dim=-1, keepdim=True) + 1e-5)
    return normed.type_as(h) * weight, h


@torch.no_grad()
def ema_update(teacher: list[Tensor], student: list[Tensor], decay: float, copy_to: list[Tensor]) -> None:
    """One parameter after another, as in most training scripts."""
    for t, s, c in zip(teacher, student, copy_to, strict=True):
        t.mul_(decay).add_(s, alpha=1 - decay)
        c.copy_(t)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """LlamaGen's apply_rotary_emb: x (B, T, H, E), table (T, E/2, 2)."""
    pairs, angles = x.float().unflatten(-1, (-1, 2)), table[None, :, None]
    turned = torch.stack(
        [
            pairs[..., 0] * angles[..., 0] - pairs[..., 1] * angles[..., 1],
            pairs[..., 1] * angles[..., 0] + pairs[..., 0] * angles[..., 1],
        ],
        dim=-1,
    )
    return turned.flatten(3).type_as(x)


def masked_attention_qkv(qkv: Tensor, keep: Tensor, rotary: Tensor) -> Tensor:
    """Scores, mask, softmax and product written out."""
    q, k, v = qkv.unbind(2)
    q, k, v = (x.transpose(1, 2) for x in (rotate(q, rotary), rotate(k, rotary), v))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~(causal & keep[:, None, None, :]), float("-inf"))
    return (scores.float().softmax(-1).type_as(q) @ v).transpose(1, 2)


@torch.no_grad()
def decode_attention(qkv: Tensor, cache: Any, position: int, rotary: Tensor) -> Tensor:
    """LlamaGen's decoding step: the whole padded cache under a mask, by SDPA."""
    q, k, v = (x[:, None] for x in qkv.unbind(1))
    table = rotary[position : position + 1]
    q, k = rotate(q, table), rotate(k, table)
    cache.k[:, :, position], cache.v[:, :, position] = k[:, 0], v[:, 0]
    mask = torch.arange(cache.k.shape[2], device=qkv.device) <= position
    return F.scaled_dot_product_attention(q.transpose(1, 2), cache.k, cache.v, attn_mask=mask[None, None, None])[
        :, :, 0
    ]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits in float32, as LlamaGen computes them, then the loss."""
    return F.cross_entropy((hidden @ weight.T).float(), target)


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos, averaged."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """What stands before every convolution of LlamaGen's tokenizer, by torch's operators."""
    return F.silu(F.group_norm(x, groups, weight, bias, 1e-6))


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The same product in x's own dtype, by torch: what decoding does without 8-bit weights."""
    return F.linear(x, weight)


def in_floats(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """(N, K): the matrix that 8-bit weights stand for. Their rotation turns back by being done again."""
    rows, columns = weight.shape
    return rotated(weight.codes() * weight.scale[:rows, None])[:, :columns].to(dtype)


def slot_contrast(anchor: Tensor, key: Tensor, pairs: Tensor, temperature: float) -> Tensor:
    """One InfoNCE a pair of slots, as in MoCo v3's code."""
    z, k = F.normalize(anchor.float(), dim=-1), F.normalize(key.float(), dim=-1)
    label = torch.arange(anchor.shape[1], device=anchor.device)
    return torch.stack([F.cross_entropy(z[a] @ k[b].T / temperature, label) for a, b in pairs.tolist()]).mean()

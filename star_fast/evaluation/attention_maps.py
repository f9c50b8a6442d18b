"""What a block looks at: attention probabilities of chosen query positions, laid over the image, and where they go in
numbers.

Training and sampling never hold these probabilities; here a block's queries and keys are computed again, in float32,
and the softmax is written out. Position 0 is the class; position t >= 1 holds image token t - 1 and predicts token t,
so its map covers the grid cells 0 ... t - 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from star_fast.model.transformer import Block, Transformer


@dataclass(frozen=True)
class AttentionShares:
    """Where attention goes, averaged over images, heads and the query positions 1 ... T-1; the
    three shares sum to 1.
    """

    to_class: float  # on the class position
    near: float  # on the cells that touch the cell being predicted (up to four come before it), corners included
    far: float  # on all other image cells
    mean_distance: float  # of the attention on image cells, in cells, to the cell being predicted


@dataclass(frozen=True)
class BlockAttention:
    """Where one block's attention goes."""

    block: int  # counted from 1
    shares: AttentionShares
    # Nats, of a head's probabilities over all earlier positions, the class's and its own included; averaged as the
    # shares are
    entropy: float


def last_block_attention(model: Transformer, codes: Tensor, label: Tensor) -> Tensor:
    """`block_attention` of the last block."""
    return block_attention(model, codes, label, model.config.blocks)


def block_attention(model: Transformer, codes: Tensor, label: Tensor, block: int) -> Tensor:
    """Attention probabilities of one block, counted from 1, no key hidden.

    Args:
        codes: (B, T) int64; the last code is not fed. label: (B,) int64, the null class allowed. Both on the model's
            device.

    Returns:
        (B, H, T, T) float32: [b, h, query, key]; rows sum to 1 and are 0 above the diagonal.

    Raises:
        ValueError: codes that are not (B, T), or no such block.
    """
    return next(all_attention(model, codes, label, first=block))


@torch.inference_mode()
def all_attention(model: Transformer, codes: Tensor, label: Tensor, first: int = 1) -> Iterator[Tensor]:
    """`block_attention` of the blocks from number `first` on, one after the other, from one pass through the model."""
    config = model.config
    if codes.ndim != 2 or codes.shape[1] != config.positions:
        raise ValueError(f"attention: codes must be (B, {config.positions}), got {tuple(codes.shape)}")
    if not 1 <= first <= config.blocks:
        raise ValueError(f"attention: blocks are numbered 1 ... {config.blocks}, got {first}")
    tokens_Bn = codes[:, :-1]
    entering = {1: model.embed(tokens_Bn, label)} if first == 1 else {}
    if config.blocks > 1:
        before = range(max(first - 1, 1), config.blocks)
        features = model(tokens_Bn, label, blocks=before, logits=False, last_block=config.blocks - 1).features
        entering |= {number + 1: residual_BTD for number, residual_BTD in features.items()}
    for number in range(first, config.blocks + 1):
        yield _probabilities(model, number, entering.pop(number))


def _probabilities(model: Transformer, number: int, residual_BTD: Tensor) -> Tensor:
    config, block = model.config, cast("Block", model.layers[number - 1])
    normed_BTD = block.attention_norm(residual_BTD)[0].float()
    B, T, D = normed_BTD.shape
    qk_weight = block.attention.wqkv.weight[: 2 * D].float()
    q_BTHE, k_BTHE = (normed_BTD @ qk_weight.t()).view(B, T, 2, config.heads, config.head_size).unbind(2)
    scores_BHTT = torch.einsum(
        "bqhe,bkhe->bhqk", rotate(q_BTHE, model.rotary), rotate(k_BTHE, model.rotary)
    ) / math.sqrt(config.head_size)
    later = torch.ones(T, T, dtype=torch.bool, device=residual_BTD.device).triu(1)
    return scores_BHTT.masked_fill(later, -math.inf).softmax(dim=-1)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """2-D rotary on interleaved pairs: x (B, T, H, E), rotary (T, E/2, 2) of (cos, sin) -> (B, T, H, E) float32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.float()[None, :, None].unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


def grid_map(probs: Tensor, query: int) -> Tensor:
    """One query's attention as a picture: (..., T, T) probabilities -> (..., g, g), g = sqrt(T).

    Cell c holds the attention on position c + 1, which carries image token c; cells that are not yet known are NaN. The
    class's share (position 0) is not in the picture: probs[..., query, 0].
    """
    positions = probs.shape[-1]
    side = math.isqrt(positions)
    cells = torch.full((*probs.shape[:-2], positions), math.nan)
    cells[..., :query] = probs[..., query, 1 : query + 1].cpu()
    return cells.unflatten(-1, (side, side))


def query_positions(positions: int, count: int) -> list[int]:
    """`count` evenly spaced query positions, the last one included: floor(T j / count) - 1, at least 1."""
    return sorted({max(positions * j // count - 1, 1) for j in range(1, count + 1)})


def mean_attention(model: Transformer, codes: Tensor, label: Tensor, batch_images: int = 8) -> Tensor:
    """(T, T) float64 on the CPU: `last_block_attention` averaged over images (N, T), (N,) and heads, a few images at a
    time.
    """
    total = torch.zeros(model.config.positions, model.config.positions, dtype=torch.float64)
    for part, part_label in zip(codes.split(batch_images), label.split(batch_images), strict=True):
        total += last_block_attention(model, part, part_label).double().sum(dim=(0, 1)).cpu()
    return total / (len(codes) * model.config.heads)


def attention_by_block(model: Transformer, codes: Tensor, label: Tensor, batch_images: int = 8) -> list[BlockAttention]:
    """Where each block's attention goes, over images (N, T), (N,), a few at a time."""
    config = model.config
    total_LTT = torch.zeros(config.blocks, config.positions, config.positions, dtype=torch.float64)
    entropy_L = torch.zeros(config.blocks, dtype=torch.float64)
    for part, part_label in zip(codes.split(batch_images), label.split(batch_images), strict=True):
        for index, probs_BHTT in enumerate(all_attention(model, part, part_label)):
            total_LTT[index] += probs_BHTT.sum(dim=(0, 1), dtype=torch.float64).cpu()
            entropy_L[index] += torch.special.entr(probs_BHTT[:, :, 1:]).sum(dtype=torch.float64).cpu()
    rows = len(codes) * config.heads
    return [
        BlockAttention(index + 1, attention_shares(total / rows), entropy.item() / (rows * (config.positions - 1)))
        for index, (total, entropy) in enumerate(zip(total_LTT, entropy_L, strict=True))
    ]


def even_attention(positions: int) -> BlockAttention:
    """What attention that is the same on every earlier position would give: the other end of the
    scale. `block` is 0.
    """
    seen = torch.arange(1, positions + 1, dtype=torch.float64)
    return BlockAttention(
        0, attention_shares((1 / seen)[:, None].expand(positions, positions).tril()), seen[1:].log().mean().item()
    )


def attention_shares(mean: Tensor) -> AttentionShares:
    """Where (T, T) attention probabilities, averaged over images and heads, go; T >= 2."""
    positions = mean.shape[-1]
    side = math.isqrt(positions)
    cell = torch.arange(positions)
    row, column = cell // side, cell % side
    mean_TT = mean.double()[1:]  # queries 1 ... T-1
    on_cells = mean_TT[:, 1:]  # key position s carries cell s - 1
    down, across = row[1:, None] - row[None, :-1], column[1:, None] - column[None, :-1]  # query t predicts cell t
    near = (down.abs() <= 1) & (across.abs() <= 1)
    distance = (down.double() ** 2 + across.double() ** 2).sqrt()
    near_share = (on_cells * near).sum(1).mean().item()
    image_share = on_cells.sum(1).mean().item()
    weighted = (on_cells * distance).sum() / on_cells.sum()
    return AttentionShares(mean_TT[:, 0].mean().item(), near_share, image_share - near_share, weighted.item())

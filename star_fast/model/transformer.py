"""The LlamaGen decoder (arXiv 2406.06525): one forward pass for training, one step for decoding, released state-dict
names.

Letters: B images, M views, T positions, D width, H heads, E head size, F feed-forward width, V codebook, K sampled
positions, L blocks, N flattened rows, R rows of a decoding batch, n image tokens given. A tensor wears its letters:
x_BTD.

Position 0 holds the class embedding, position t >= 1 holds image token t - 1; the hidden state at t predicts image
token t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from star_fast.config import ModelConfig
from star_fast.model.features import Features
from star_fast.ops.add_rms_norm import add_rms_norm
from star_fast.ops.decode_attention import KVCache, decode_attention
from star_fast.ops.dispatch import same_choice_again
from star_fast.ops.masked_attention import masked_attention_qkv
from star_fast.ops.swiglu import swiglu

NORM_EPS = 1e-5
INIT_STD = 0.02


class TransformerOutput(NamedTuple):
    """What a forward pass gives."""

    logits: Tensor | None  # (B, n+1, V) float32, unnormalised; None unless asked for
    last: Tensor  # (B, n+1, D) output of the last block, before the final norm
    hidden: Tensor  # (B, n+1, D) after the final norm: what the output matrix multiplies
    features: dict[int, Tensor]  # {block number counted from 1: its output (B, n+1, D)}


def rotary_table(
    positions: int, head_size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """2-D rotary angles as (T, E/2, 2): (cos, sin) of each frequency pair at each position, computed in float64.

    Codes fill a square grid row by row; where T is no square number, the last rows in part.

    Pairs 0 ... E/4-1 turn with the row, the others with the column, base 10000. The class position's entries are all
    zero (cos = 0 too), as in the released LlamaGen code: its query and key vanish.
    """
    quarter, grid = head_size // 4, math.isqrt(positions - 1) + 1
    freqs = 10000.0 ** (-2.0 * torch.arange(quarter, dtype=torch.float64, device=device) / (head_size // 2))
    angles_GQ = torch.arange(grid, dtype=torch.float64, device=device)[:, None] * freqs
    rows = angles_GQ[:, None, :].expand(grid, grid, quarter)
    columns = angles_GQ[None, :, :].expand(grid, grid, quarter)
    angles = torch.cat([rows, columns], dim=-1).reshape(grid * grid, 2 * quarter)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    # The class position comes first and the last code is predicted, never fed: T entries in all.
    return torch.cat([table.new_zeros(1, 2 * quarter, 2), table])[:positions].to(dtype)


class RMSNorm(nn.Module):
    """Adds a branch (with dropout) to the residual stream and normalises the sum: ops.add_rms_norm with this weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(
        self, branch: Tensor, residual: Tensor | None = None, dropout: float = 0.0, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(..., D) twice -> (normed sum, sum), both (..., D); without a residual the branch alone starts the stream."""
        return add_rms_norm(branch, residual, self.weight, NORM_EPS, dropout=dropout, seed=seed)


class LabelEmbedding(nn.Module):
    """Class embeddings, the null class last: (num_classes + 1, D)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)


class Attention(nn.Module):
    """The fused q, k, v matrix (rows: q, then k, then v) and the output matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x). w1 and w3 live in one matrix (one product, packed rows for ops.swiglu); state dicts keep
    the two names.
    """

    def __init__(self, width: int, feed_forward: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(width, 2 * feed_forward, bias=False)
        self.w2 = nn.Linear(feed_forward, width, bias=False)
        self.register_state_dict_post_hook(_split_w13)
        self.register_load_state_dict_pre_hook(_join_w13)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.w2(swiglu(self.w13(x)))


def _split_w13(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: dict) -> None:
    packed = state.pop(prefix + "w13.weight")
    state[prefix + "w1.weight"], state[prefix + "w3.weight"] = packed.chunk(2, dim=0)


def _join_w13(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    if prefix + "w1.weight" in state and prefix + "w3.weight" in state:
        state[prefix + "w13.weight"] = torch.cat([state.pop(prefix + "w1.weight"), state.pop(prefix + "w3.weight")])


class Block(nn.Module):
    """x + Attn(RMSNorm(x)), then x + FFN(RMSNorm(x)). The norm that opens a block runs in the caller, fused with the
    addition that closes the block before: so a block takes its normed input and returns its last branch, not yet
    added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config.width)
        self.feed_forward = FeedForward(config.width, config.feed_forward)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)
        self.heads = config.heads

    def forward(
        self,
        normed_BTD: Tensor,
        residual_BTD: Tensor,
        keep_BT: Tensor | None,
        rotary: Tensor,
        dropout: float = 0.0,
        seed: int = 0,
        recompute_rest: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """-> (what the feed-forward adds, the residual stream it is added to), both (B, T, D).

        With `recompute_rest` backward computes anew all but attention, whose input and output are kept.
        """
        B, T, D = normed_BTD.shape
        qkv = self.attention.wqkv(normed_BTD).view(B, T, 3, self.heads, D // self.heads)
        attended_BTD = masked_attention_qkv(qkv, keep_BT, rotary=rotary, overwrite=True).reshape(B, T, D)
        if recompute_rest:
            return checkpoint(
                self._rest,
                attended_BTD,
                residual_BTD,
                dropout,
                seed,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=same_choice_again,
            )
        return self._rest(attended_BTD, residual_BTD, dropout, seed)

    def _rest(self, attended_BTD: Tensor, residual_BTD: Tensor, dropout: float, seed: int) -> tuple[Tensor, Tensor]:
        normed_BTD, residual_BTD = self.ffn_norm(self.attention.wo(attended_BTD), residual_BTD, dropout, seed)
        return self.feed_forward(normed_BTD), residual_BTD

    def step(
        self, normed_RD: Tensor, residual_RD: Tensor, cache: KVCache, position: int | Tensor, rotary: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward` at one position of R rows, reading and extending the block's cache."""
        R, D = normed_RD.shape
        qkv = self.attention.wqkv(normed_RD).view(R, 3, self.heads, D // self.heads)
        attended_RD = self.attention.wo(decode_attention(qkv, cache, position, rotary=rotary).reshape(R, D))
        normed_RD, residual_RD = self.ffn_norm(attended_RD, residual_RD)
        return self.feed_forward(normed_RD), residual_RD


class Transformer(nn.Module):
    """LlamaGen's class-conditional decoder. Sizes left at 0 in `config` must be filled in before
    (training.batches.resolve).
    """

    rotary: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if min(config.vocab, config.positions, config.num_classes) < 1:
            raise ValueError(
                f"Transformer: vocab, positions and num_classes must be set, got {config.vocab}, "
                f"{config.positions}, {config.num_classes}"
            )
        self.config = config
        self.block_checkpointing = False  # recompute blocks in backward
        self.keep_attention = False  # but not their attention
        self.cls_embedding = LabelEmbedding(config.num_classes, config.width)
        self.tok_embeddings = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab, bias=False)
        self.register_buffer("rotary", rotary_table(config.positions, config.head_size), persistent=False)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class": num_classes."""
        return self.config.num_classes

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, 0.02) matrices and embeddings, output matrix zero, norms one (LlamaGen)."""
        for name, parameter in self.named_parameters():
            if name == "output.weight":
                parameter.zero_()
            elif parameter.ndim >= 2:
                parameter.normal_(0.0, INIT_STD, generator=generator)
            else:
                parameter.fill_(1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as nn.Module does, but the rotary table is computed anew in float32 or float64: its angles
        survive no other dtype.
        """
        before = self.rotary
        super()._apply(fn, recurse)
        if self.rotary.dtype != before.dtype or before.is_meta:
            dtype = torch.float64 if self.rotary.dtype == torch.float64 else torch.float32
            self.rotary = rotary_table(self.config.positions, self.config.head_size, self.rotary.device, dtype)
        return self

    def _blocks(self) -> Sequence[Block]:
        return cast("Sequence[Block]", self.layers)  # ModuleList's type does not say of what

    def embed(self, tokens: Tensor, label: Tensor) -> Tensor:
        """Class and token embeddings: (B, n) and (B,) int64 -> (B, n+1, D)."""
        return torch.cat([self.cls_embedding.embedding_table(label)[:, None], self.tok_embeddings(tokens)], dim=1)

    def forward(
        self,
        tokens: Tensor,
        label: Tensor,
        keep: Tensor | None = None,
        *,
        blocks: Collection[int] = (),
        logits: bool = True,
        last_block: int = 0,
    ) -> TransformerOutput:
        """Features and, if asked, logits of image tokens 0 ... n.

        Args:
            tokens: (B, n) int64 image tokens 0 ... n-1, 0 <= n < T.
            label: (B,) int64 in 0 ... num_classes; num_classes is the null class.
            keep: (B, n+1) bool, False where a position is hidden as attention key; None hides nothing. keep[:, 0] is
                True.
            blocks: numbers (from 1) of the blocks whose outputs to return.
            logits: whether to multiply by the output matrix; training never does (ops.linear_cross_entropy does it in
                chunks).
            last_block: number of the block to stop after, 0: the last. After an earlier one `last` is its output, and
                `hidden` is no model's.

        Raises:
            ValueError: too many tokens, rows of `label` and `tokens` differ, a block number that does not exist.
        """
        B, n = tokens.shape
        if n >= self.config.positions:
            raise ValueError(f"Transformer: at most T - 1 = {self.config.positions - 1} tokens, got {n}")
        if label.shape != (B,):
            raise ValueError(f"Transformer: label must be ({B},) as tokens has {B} rows, got {tuple(label.shape)}")
        if any(not 1 <= number <= self.config.blocks for number in blocks):
            raise ValueError(f"Transformer: blocks are numbered 1 ... {self.config.blocks}, got {sorted(blocks)}")
        dropout = self.config.dropout if self.training else 0.0
        seeds = _dropout_seeds(2 * self.config.blocks + 1) if dropout else [0] * (2 * self.config.blocks + 1)
        rotary = self.rotary[: n + 1]
        recompute = self.block_checkpointing and self.training and torch.is_grad_enabled()
        layers = self._blocks()
        norms = [*(block.attention_norm for block in layers[1:]), self.norm]
        normed_BTD, residual_BTD = layers[0].attention_norm(self.embed(tokens, label), None, dropout, seeds[-1])
        features = {}
        for index, (block, closing_norm) in enumerate(
            zip(layers[: last_block or None], norms[: last_block or None], strict=True)
        ):
            arguments = (normed_BTD, residual_BTD, keep, rotary, dropout, seeds[2 * index])
            if recompute and not self.keep_attention:
                branch_BTD, residual_BTD = checkpoint(
                    block, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=same_choice_again
                )
            else:
                branch_BTD, residual_BTD = block(*arguments, recompute_rest=recompute)
            normed_BTD, residual_BTD = closing_norm(branch_BTD, residual_BTD, dropout, seeds[2 * index + 1])
            if index + 1 in blocks:
                features[index + 1] = residual_BTD
        return TransformerOutput(
            self.output(normed_BTD).float() if logits else None, residual_BTD, normed_BTD, features
        )

    def features(
        self, tokens: Tensor, label: Tensor, keep: Tensor | None = None, *, block: int = 0, last: bool = True
    ) -> Features:
        """What the method asks of a model (model/features.py): `forward` without logits; with `last` False the blocks
        after `block` do not run.
        """
        out = self(tokens, label, keep, blocks=(block,) if block else (), logits=False, last_block=0 if last else block)
        return Features(out.hidden, out.last, out.features.get(block))

    def step(self, embedded: Tensor, caches: Sequence[KVCache], position: int | Tensor) -> Tensor:
        """One position of R rows: embedding in, final hidden state out; every block's cache is extended at `position`.

        Args:
            embedded: (R, D) class embedding at position 0, token embedding after.
            caches: one KVCache a block.
            position: int, or 0-d int64 tensor on the model's device (nothing is read back to the host).

        Returns:
            (R, D) after the final norm. The caller combines guided rows, then multiplies by `output`.
        """
        layers = self._blocks()
        normed_RD, residual_RD = layers[0].attention_norm(embedded)
        norms = [*(block.attention_norm for block in layers[1:]), self.norm]
        for block, closing_norm, cache in zip(layers, norms, caches, strict=True):
            branch_RD, residual_RD = block.step(normed_RD, residual_RD, cache, position, self.rotary)
            normed_RD, residual_RD = closing_norm(branch_RD, residual_RD)
        return normed_RD


def _dropout_seeds(count: int) -> list[int]:
    """One seed a dropout site, from torch's host generator, which the training loop reseeds each step."""
    return torch.randint(0, 2**62, (count,), dtype=torch.int64, device="cpu").tolist()

"""The named baselines of benchmarks/training.py: LlamaGen's training step, and ST-AR composed on it, as a careful
reader would first write them in PyTorch.

What they share with LlamaGen's released trainer (autoregressive/models/gpt.py, autoregressive/train/train_c2i.py): a
model of float32 weights under bfloat16 autocast, separate w1 and w3 products, dropout modules,
scaled_dot_product_attention, all logits in float32 before F.cross_entropy, clip_grad_norm_, AdamW, and an average of
the weights taken one parameter after another. ST-AR adds the teacher's forward pass, the key mask as an attention mask,
the projector on every position, cosine similarity, and one InfoNCE a pair of slots. All of it is the method of
docs/method.md; only the way is the plain one.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import naive
from star_fast.config import RunConfig
from star_fast.method.batch import Batch
from star_fast.method.student import Student
from star_fast.method.teacher import ema_decay
from star_fast.model.transformer import NORM_EPS, rotary_table


class RMSNorm(nn.Module):
    """LlamaGen's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        h = x.float()
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + NORM_EPS)).type_as(x) * self.weight


class Block(nn.Module):
    """LlamaGen's TransformerBlock."""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = RMSNorm(width), RMSNorm(width)
        self.wqkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.w1, self.w3 = nn.Linear(width, feed_forward, bias=False), nn.Linear(width, feed_forward, bias=False)
        self.w2 = nn.Linear(feed_forward, width, bias=False)
        self.drop_attention, self.drop_ffn = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: Tensor, visible: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D); visible (B, 1, T, T) bool, None: causal alone."""
        B, T, D = x.shape
        q, k, v = self.wqkv(self.attention_norm(x)).view(B, T, 3, self.heads, -1).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (naive.rotate(q, rotary), naive.rotate(k, rotary), v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        h = x + self.drop_attention(self.wo(attended.transpose(1, 2).reshape(B, T, D)))
        normed = self.ffn_norm(h)
        return h + self.drop_ffn(self.w2(F.silu(self.w1(normed)) * self.w3(normed)))


class LlamaGen(nn.Module):
    """The decoder: logits (B, T, V) float32, output of the last block, output of the block `depth`."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        model = config.model
        self.cls_embedding, self.tok_embeddings = (
            nn.Embedding(model.num_classes + 1, model.width),
            nn.Embedding(model.vocab, model.width),
        )
        self.drop = nn.Dropout(model.dropout)
        self.layers = nn.ModuleList(
            Block(model.width, model.heads, model.feed_forward, model.dropout) for _ in range(model.blocks)
        )
        self.norm, self.output = RMSNorm(model.width), nn.Linear(model.width, model.vocab, bias=False)
        self.register_buffer("rotary", rotary_table(model.positions, model.head_size), persistent=False)
        self.depth = config.contrast_depth

    def forward(
        self, tokens: Tensor, label: Tensor, keep: Tensor | None = None, logits: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """tokens (B, T-1), label (B,), keep (B, T)."""
        x = self.drop(torch.cat([self.cls_embedding(label)[:, None], self.tok_embeddings(tokens)], dim=1))
        visible = None
        if keep is not None:
            T = x.shape[1]
            visible = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() & keep[:, None, None, :]
        middle = x
        for number, block in enumerate(self.layers, 1):
            x = block(x, self.rotary, visible)
            middle = x if number == self.depth else middle
        return self.output(self.norm(x)).float() if logits else None, x, middle


class PlainTraining:
    """One optimizer step at a time, in the plain way.

    Args:
        config: its method decides whether there is a teacher (ST-AR) or not (LlamaGen's own training).
        student: gives the initial weights; not kept.
        dtype: of autocast; float32: none.
    """

    def __init__(
        self, config: RunConfig, student: Student, device: torch.device, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.config, self.method, self.device, self.dtype = config, config.method, device, dtype
        self.model = LlamaGen(config)
        self.model.load_state_dict(_names(student.transformer.state_dict()))
        self.projector = None
        if student.projector is not None:
            sizes = [
                config.model.width,
                *[config.method.projector_width] * (config.method.projector_layers - 1),
                config.model.width,
            ]
            self.projector = nn.Sequential(
                *[part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.SiLU())][:-1]
            )
            self.projector.load_state_dict(student.projector.state_dict())
            self.projector.to(device)
        self.model.to(device)
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False) if config.method.has_teacher else None
        self.parameters = [
            *self.model.parameters(),
            *(self.projector.parameters() if self.projector is not None else ()),
        ]
        optim = config.optim
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True if device.type == "cuda" else None,
        )

    def step(self, batches: list[Batch], step: int) -> Tensor:
        """The total loss of one step."""
        (batch,) = batches
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None:
            decay = ema_decay(self.method, step)
            with torch.no_grad():
                for mean, value in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                    mean.mul_(decay).add_(value, alpha=1 - decay)
        return loss.detach()

    def state_bytes(self) -> int:
        """Weights, AdamW's moments and the teacher: what stays between two steps."""
        moments = [
            value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        return sum(
            t.numel() * t.element_size()
            for t in [*self.parameters, *moments, *(self.teacher.parameters() if self.teacher is not None else ())]
        )

    def loss(self, batch: Batch) -> Tensor:
        """All terms of one micro-batch."""
        method = self.method
        logits, last, middle = self.model(batch.tokens, batch.label, batch.keep)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        if self.teacher is None:
            return loss
        with torch.no_grad():
            _, teacher_last, teacher_middle = self.teacher(batch.tokens, batch.label, logits=False)
        mim = (1 - F.cosine_similarity(last.float(), teacher_last.float(), dim=-1)).mean()
        z, k = (
            F.normalize(x.float(), dim=-1)[:, batch.positions].unflatten(0, (-1, method.views))
            for x in (self.projector(middle), teacher_middle)
        )

        def nce(m: int, i: int, n: int, j: int) -> Tensor:
            return F.cross_entropy(
                z[:, m, i] @ k[:, n, j].T / method.temperature, torch.arange(len(z), device=z.device)
            )

        M, K = method.views, len(batch.positions)
        step = torch.stack([nce(m, i, m, j) for m in range(M) for i in range(K) for j in range(K) if i != j]).mean()
        view = torch.stack([nce(m, i, n, i) for i in range(K) for m in range(M) for n in range(M) if m != n]).mean()
        return loss + method.mim_weight * mim + method.contrast_weight * (step + view) / 2


def _names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict (LlamaGen's names) with the names of the modules above."""
    shorter = (("attention.w", "w"), ("feed_forward.w", "w"), ("cls_embedding.embedding_table", "cls_embedding"))
    found = {}
    for name, value in state.items():
        for long, short in shorter:
            name = name.replace(long, short)
        found[name] = value
    return found

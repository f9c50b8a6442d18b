"""The sampling loop: a static key-value cache, one position a step, guidance on the final hidden states, no host sync
on CUDA.

The class position is the whole prompt, so prefill is the first step. A batch of B images takes B rows of the caches, or
2B while it is guided: rows 0 ... B-1 with the class, rows B ... 2B-1 with the null class. When guidance ends before the
image does (`cfg_interval`), the second half is simply left out of the views that later steps get.

Letters: B images, R rows, T positions, D width, V codebook.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from star_fast.generation.products import Products, with_products
from star_fast.generation.sampling import Sampling, draw, is_int, is_number
from star_fast.generation.step_graph import DeviceState, StepGraphs
from star_fast.model.transformer import Transformer
from star_fast.ops import error_flag
from star_fast.ops.decode_attention import new_cache
from star_fast.ops.kv_cache import KVCache
from star_fast.ops.sample_tokens import raise_on_bad_rows


class Decoder:
    """Decoding caches (and, on CUDA, step graphs) of one model, allocated once and used for any number of batches.

    Args:
        model: a Transformer; its weights are read, never changed. With products other than "plain" they are copied:
            make a new Decoder after training on.
        rows: the most cache rows a batch may take: images, or twice the images where guidance is used.
        cache_dtype: of the key-value cache; None: the model's. torch.int8 or torch.float8_e4m3fn: 8 bits and one
            float32 scale a row and head.
        products: how matrix products run, see generation/products.py: "auto" chooses what gives the same numbers
            fastest.

    Memory:
        2 * L * rows * T * D cache entries.

    Raises:
        ValueError: rows < 1, or a cache or product kind that the model's device and dtype cannot have.
    """

    def __init__(
        self, model: Transformer, rows: int, cache_dtype: torch.dtype | None = None, products: Products = "auto"
    ) -> None:
        if not is_int(rows) or rows < 1:
            raise ValueError(f"Decoder: rows must be at least 1, got {rows!r}")
        self.config, self.rows = model.config, rows
        self.model = with_products(model, products, rows)
        self.device, dtype = model.output.weight.device, model.output.weight.dtype
        self.caches = [
            new_cache(
                rows,
                self.config.heads,
                self.config.positions,
                self.config.head_size,
                cache_dtype or dtype,
                self.device,
                qkv_dtype=dtype,
            )
            for _ in range(self.config.blocks)
        ]
        self._views: dict[int, list[KVCache]] = {rows: self.caches}
        self._graphs = StepGraphs() if self.device.type == "cuda" else None

    @torch.no_grad()
    def generate(
        self,
        label: Tensor,
        *,
        guidance: float = 1.0,
        cfg_interval: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Draw one image's codes for each label; arguments, result and errors as `generate` below. At most `rows` cache
        rows.
        """
        sampling = Sampling(guidance, cfg_interval, temperature, top_k, top_p, seed)
        label, image_index = self._checked(label, image_index, sampling)
        if self.device.type == "cuda":
            codes_TB = self._generate_on_device(label, image_index, sampling)
            error_flag.raise_if_set(self.device)
            raise_on_bad_rows(self.device)
        else:
            codes_TB = torch.empty(self.config.positions, len(label), dtype=torch.int64)
            embedded_RD = self.embed_label(label, sampling.guided)
            for position, tokens_B in enumerate(codes_TB):
                if position:
                    embedded_RD = self.embed_tokens(codes_TB[position - 1], sampling.guided_at(position))
                logits_BV = self.logits(
                    embedded_RD, position, sampling.guidance if sampling.guided_at(position) else 1.0
                )
                draw(logits_BV, sampling, sampling.seed, image_index, position, tokens_B)
        return codes_TB.t().contiguous()

    def embed_label(self, label: Tensor, guided: bool) -> Tensor:
        """Input rows of position 0: labels (B,) -> (B, D), or (2B, D) with the null class below."""
        if guided:
            label = torch.cat([label, torch.full_like(label, self.config.num_classes)])
        return self.model.cls_embedding.embedding_table(label)

    def embed_tokens(self, tokens: Tensor, guided: bool) -> Tensor:
        """Input rows of a later position: image tokens (B,) -> (B, D), or (2B, D): both halves see the same image."""
        embedded_BD = self.model.tok_embeddings(tokens)
        return embedded_BD.repeat(2, 1) if guided else embedded_BD

    def logits(self, embedded: Tensor, position: int | Tensor, guidance: float = 1.0) -> Tensor:
        """One decoding step: extend the caches of rows 0 ... R-1 at `position` and return the (guided) logits of the
        image token there.

        Args:
            embedded: (R, D), R at most `rows`; for guidance > 1 the second half are the null-class rows.
            position: int, or 0-d int64 tensor on the model's device. Positions before it must have been decoded for
                these rows.
            guidance: scale; above 1 the final hidden states h = hu + s (hc - hu) go into the output matrix, which is
                linear: guided logits at half the work.

        Returns:
            (B, V) float32; B = R, or R / 2 for guidance > 1.
        """
        hidden_RD = self.model.step(embedded, self._rows(len(embedded)), position)
        if guidance > 1:
            with_class_BD, without_BD = hidden_RD.chunk(2)
            hidden_RD = torch.lerp(without_BD, with_class_BD, guidance)
        return self.model.output(hidden_RD).float()

    def advance(self, state: DeviceState, sampling: Sampling, guided: bool, first: bool = False) -> None:
        """One step of the loop on the device: embed the class (`first`: position 0) or the last tokens, decode, draw,
        store. Reads nothing back to the host.
        """
        embedded_RD = self.embed_label(state.label, guided) if first else self.embed_tokens(state.tokens, guided)
        logits_BV = self.logits(embedded_RD, state.position, sampling.guidance if guided else 1.0)
        draw(logits_BV, sampling, state.seed, state.image_index, state.position, state.tokens)
        state.keep_tokens()

    def _rows(self, count: int) -> Sequence[KVCache]:
        """Every block's cache, cut to its first `count` rows."""
        if count not in self._views:
            self._views[count] = [cache.first_rows(count) for cache in self.caches]
        return self._views[count]

    def _generate_on_device(self, label: Tensor, image_index: Tensor, sampling: Sampling) -> Tensor:
        """The same loop with everything that changes held on the device: each position replays a captured graph."""
        assert self._graphs is not None, "on CUDA only"
        state = self._graphs.state(len(label), self.config.positions, self.device)
        kinds = [(sampling.guided_at(position), position == 0) for position in range(self.config.positions)]
        replay = {kind: self._graphs.step(self.advance, state, sampling, *kind) for kind in dict.fromkeys(kinds)}
        state.begin(label, image_index, sampling.seed)
        for kind in kinds:
            replay[kind]()
        return state.codes_TB.clone()

    def _checked(self, label: Tensor, image_index: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Labels and image indices as (B,) int64 tensors on the model's device."""
        if not isinstance(label, Tensor) or label.dtype != torch.int64 or label.ndim != 1 or not len(label):
            raise ValueError(f"generate: label must be a (B,) int64 tensor with B >= 1, got {_described(label)}")
        rows = len(label) * (2 if sampling.guided else 1)
        if rows > self.rows:
            raise ValueError(
                f"generate: {len(label)} images{' with guidance' if sampling.guided else ''} take {rows} cache "
                f"rows, this Decoder has {self.rows}"
            )
        if label.device.type == "cpu" and not 0 <= int(label.min()) <= int(label.max()) <= self.config.num_classes:
            raise ValueError(
                f"generate: labels must lie in 0 ... {self.config.num_classes} (the last is the null class), "
                f"got {int(label.min())} ... {int(label.max())}"
            )
        if image_index is None:
            image_index = torch.arange(len(label), dtype=torch.int64)
        if not isinstance(image_index, Tensor) or image_index.dtype != torch.int64 or image_index.shape != label.shape:
            raise ValueError(
                f"generate: image_index must be ({len(label)},) int64 as label is, got {_described(image_index)}"
            )
        return label.to(self.device), image_index.to(self.device)


def generate(
    model: Transformer,
    label: Tensor,
    *,
    guidance: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    image_index: Tensor | None = None,
) -> Tensor:
    """Draw the codes of one image for each label. For many batches make one `Decoder` and call its `generate`.

    Args:
        model: a Transformer, on any device, in any floating dtype.
        label: (B,) int64 classes, 0 ... num_classes - 1 (num_classes, the null class, draws without a class).
        guidance: scale s >= 1: logits = uncond + s (cond - uncond); 1 switches it off.
        cfg_interval: n >= 0: only image tokens 0 ... n+1 are guided; -1: all.
        temperature: 0 (the likeliest token) or 1e-5 ... 1e5.
        top_k, top_p: restrict the draw, in this order; 0 and 1.0 switch them off.
        seed: 0 ... 2^63 - 1.
        image_index: (B,) int64, names each image's random stream; None: 0 ... B-1. The same (seed, index) gets the same
            uniform numbers in any batch.

    Returns:
        (B, T) int64 codes in row order of the image, on the model's device.

    Numerics:
        Matrix products in the model's dtype; guidance and the draw as ops.sample_tokens. An image's codes can depend on
        the batch size only where the products' rounding moves a logit across a draw's boundary.

    Raises:
        ValueError: an argument that makes no sense, or logits that are not finite; the message says which.

    Source:
        LlamaGen (arXiv 2406.06525), autoregressive/models/generate.py.
    """
    guided = is_number(guidance) and guidance > 1
    rows = (len(label) if isinstance(label, Tensor) and label.ndim == 1 else 1) * (2 if guided else 1)
    return Decoder(model, max(rows, 1)).generate(
        label,
        guidance=guidance,
        cfg_interval=cfg_interval,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        image_index=image_index,
    )


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)

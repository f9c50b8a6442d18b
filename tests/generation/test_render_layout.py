"""Codes to pixels on CUDA, traced on fake tensors: images lie channels last from the first convolution to the bytes,
and nothing but the norms' own kernels touches them in between: no copy into another layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from star_fast.config import TokenizerConfig
from star_fast.model.tokenizer import VQTokenizer, to_uint8
from star_fast.model.tokenizer_blocks import AddingConv2d, Norm
from star_fast.ops import dispatch
from tests.generation.small_model import TOKENIZER

IMAGES = 8
COPIES = {torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class Operators(TorchDispatchMode):
    """Counts operators; what they make of images must lie channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen[func] += 1
        of_pictures = any(isinstance(x, Tensor) and x.ndim == 4 for x in args)
        for x in tree_leaves(result):
            if of_pictures and isinstance(x, Tensor) and x.ndim == 4:
                lies_so = x.is_contiguous(memory_format=torch.channels_last)
                assert lies_so, f"{func}: {tuple(x.shape)} lies in strides {x.stride()}"
        return result


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors are fake, on "cuda"; parameters are born bfloat16, since fake ones cannot be cast in place. Convolutions
    are cuDNN's, as on a GPU; in which layout they write is then torch's own rule.
    """
    monkeypatch.setattr(torch._C, "_select_conv_backend", lambda *given, **named: torch._C._ConvBackend.Cudnn)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def attention(*rows_BTC: Tensor) -> Tensor:
    """In place of torch's, whose kernels are its own affair: rows of pixels come as they lie, and leave so."""
    assert all(x.is_contiguous() for x in rows_BTC)
    return torch.empty_like(rows_BTC[0])


def channels_last(tokenizer: VQTokenizer) -> VQTokenizer:
    """What `to` with this memory format does, which cannot swap fake parameters."""
    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=torch.channels_last))
    return tokenizer


@pytest.mark.parametrize("config", [TokenizerConfig(), TOKENIZER], ids=["VQ-16", "small"])
def test_images_stay_channels_last(config: TokenizerConfig, fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    tokenizer = channels_last(VQTokenizer(config).eval())
    codes = torch.zeros(IMAGES, (config.image_size // config.downsampling) ** 2, dtype=torch.int64)
    latents = tokenizer.quantize.look_up(codes, (config.image_size // config.downsampling,) * 2).to(torch.bfloat16)
    with torch.no_grad(), dispatch.record() as calls, Operators() as operators:
        images = tokenizer.decoder(tokenizer.post_quant_conv(latents))
        assert not operators.seen.keys() & COPIES, operators.seen
        in_bytes = to_uint8(images)
    rows = in_bytes.permute(0, 2, 3, 1)
    assert images.device.type == "cuda" and images.dtype == torch.bfloat16
    assert rows.is_contiguous() and rows.shape == (IMAGES, config.image_size, config.image_size, config.image_channels)
    norms = [module for module in tokenizer.decoder.modules() if isinstance(module, Norm)]
    assert [(call.op, call.backend) for call in calls] == [("group_norm_silu", "triton")] * len(norms)
    assert all(len(call.launches) == 3 for call in calls)
    additions = sum(isinstance(module, AddingConv2d) for module in tokenizer.decoder.modules())
    assert operators.seen[torch.ops.aten.add_.Tensor] == additions  # in place: no new tensor

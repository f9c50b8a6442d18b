"""The VQ decoder for bfloat16 on a CPU: channels last, each convolution's weight laid out once for the matrix unit,
sums added while they are at hand.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from star_fast.config import TokenizerConfig
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.tokenizer_blocks import ResidualBlock


class PackedConv2d(nn.Module):
    """A convolution whose weight is reordered at the first call, for the size of that input, into the blocks that
    oneDNN's kernel reads; F.conv2d reorders at each call. The same kernel, so the same bits; but what is given beside
    the input is added before the only rounding.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.packed = convolution.weight.detach(), False
        self.bias = None if convolution.bias is None else convolution.bias.detach()
        self.geometry = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """(B, C, H, W) channels last, and perhaps a summand like the result -> (B, C', H', W') channels last."""
        if not self.packed:
            self.weight, self.packed = (
                torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, list(x.shape)),
                True,
            )
        if beside is None:
            return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            beside, x, self.weight, self.bias, *self.geometry, "add", 1.0, None, [], None
        )


def bfloat16_decoder(tokenizer: VQTokenizer) -> VQTokenizer:
    """A copy of `tokenizer` for decode() on the CPU: post_quant_conv and decoder in bfloat16, channels last and, where
    oneDNN has kernels for it, packed. The codebook stays float32; nothing else of the copy is of use."""
    decoding = copy.deepcopy(tokenizer).eval().requires_grad_(False)
    # The first decides VQTokenizer.dtype
    for part in (decoding.quant_conv, decoding.post_quant_conv, decoding.decoder):
        part.to(torch.bfloat16).to(memory_format=torch.channels_last)
    for module in decoding.decoder.modules():
        if isinstance(module, ResidualBlock):
            module.norm2.in_place = True
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        modules = [decoding, *decoding.decoder.modules()]
        children = [(module, *named) for module in modules for named in module.named_children()]
        for module, name, child in children:
            if isinstance(child, nn.Conv2d) and child is not decoding.quant_conv:
                setattr(module, name, PackedConv2d(child))
    return decoding


def largest_activation_bytes(config: TokenizerConfig, side: int, dtype: torch.dtype) -> int:
    """Of one image of side x side codes, the largest tensor between two of the decoder's layers."""
    widths = [config.base_channels * factor for factor in reversed(config.multipliers)]
    most = 0
    # A level's first input has the width before it
    for level, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        most = max(most, max(before, width) * (side << level) ** 2)
    return most * dtype.itemsize

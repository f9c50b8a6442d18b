"""How a decoder multiplies by its weights: as they are, with weights packed for the CPU's matrix unit, or with 8-bit
weights and inputs.

Decoding multiplies a few dozen rows by every weight at each step, so the layout and size of the weights decide its
speed on a CPU. The transformer stays as it is: `with_products` returns one of the same kind whose nn.Linear modules are
replaced; everything else is shared.

"int8" (ops/int8_linear.py): half the bytes of the weights, and sums by AMX, VNNI or narrower vectors with the same
bits. GPT-B's products, 64 rows, output matrix on 32, on two cores of a Xeon with AMX: 9.0 ms a step where packed
bfloat16 takes 15.9 in the same run, the pass that rounds each input included. What it costs, by the relative error of
guided logits against the float32 model:

                            bfloat16 alone   8 bits   8 bits, rows not rotated
    GPT-B, random weights       1.35 %       4.24 %        4.60 %
    the digits, trained         1.40 %       2.05 %        2.51 %

and, with GPT-B as it is in float32 and rows not rotated, if only this has 8 bits:

    everything 4.2 %     weights 3.2 %     inputs 3.0 %
    wo 2.4 %     wqkv 2.3 %     w2 2.1 %     w13 1.6 %     output matrix 1.1 %

No matrix stands out: keeping any one in bfloat16 leaves 3.7 ... 4.1 %. 16 bits for all inputs, at twice the products'
work, would leave 3.2 %.

8-bit weights on a GPU are not built; what they would bring, in us a block at position 128, counted for an H100 (80 % of
3.35 TB/s, 2 us a launch or more):

                                    16 rows, 8 images guided   128 rows
    XL: products, 40.6 MB           15.9 -> 9.4                15.9 -> 9.4
        attention, 0.66 MB a row     3.9                       31.3
        two norms and the gate       6.0                        6.0
        together                    25.8 -> 19.3, 25 % less    53.2 -> 46.7, 12 % less
    B:  products, 14.2 MB            8.3 -> 8.0                 8.3 -> 8.0: at the launches' floor already

It takes a product of our own that reads int8 and scales on store (cuBLAS has none for bfloat16 rows), and costs the
weights' rounding, half of 1/127 of a row's largest. The cache comes first: at 128 rows its 8 bits (`cache_dtype`) save
15 us of the 53, and are there.
"""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from star_fast.model.transformer import Transformer
from star_fast.ops.int8_linear import DTYPES, Int8Weight, int8_linear

Products = Literal["auto", "plain", "packed", "int8"]


class PackedLinear(nn.Module):
    """x W^T with W (N, K) bfloat16 reordered once into the blocks that oneDNN's kernel reads; F.linear reorders at each
    call. The same kernel, so the same bits."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        """(R, K) -> (R, N)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class Int8Linear(nn.Module):
    """x W^T in 8 bits, see ops/int8_linear.py: W (N, K) kept as int8, packed, with one scale for each of its rows."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight_int8 = Int8Weight(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(R, K) -> (R, N), dtype of x."""
        return int8_linear(x, self.weight_int8)


def why_not(products: Products, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if weights of this device and dtype can be multiplied in this way, else the reason."""
    if products not in get_args(Products):
        return f"there are {', '.join(get_args(Products))}"
    if products == "packed" and not (
        device.type == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return f"packed weights are for bfloat16 on a CPU with AVX-512, got {dtype} on {device}"
    if products == "int8" and (device.type != "cpu" or dtype not in DTYPES):
        return f"int8 weights are for float32 or bfloat16 models on the CPU, got {dtype} on {device}"
    return None


def resolve(products: Products, device: torch.device, dtype: torch.dtype) -> Products:
    """The way itself; "auto" becomes "packed" where that works, else "plain": the same numbers either way.

    Raises:
        ValueError: weights of this device and dtype cannot be multiplied so.
    """
    if products == "auto":
        return "packed" if why_not("packed", device, dtype) is None else "plain"
    reason = why_not(products, device, dtype)
    if reason is not None:
        raise ValueError(f"products {products!r} cannot be had: {reason}")
    return products


def with_products(model: Transformer, products: Products, rows: int) -> Transformer:
    """`model` for decoding: itself for "plain"; else a copy with every nn.Linear replaced, other parameters and buffers
    shared.

    `rows` is a hint for the packed layout.

    Raises:
        ValueError: this model cannot be multiplied so.
    """
    products = resolve(products, model.output.weight.device, model.output.weight.dtype)
    if products == "plain":
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    decoding = copy.deepcopy(model, shared)  # copies the modules, shares what `shared` lists
    for module in list(decoding.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(
                    module, name, PackedLinear(child.weight, rows) if products == "packed" else Int8Linear(child.weight)
                )
    return decoding

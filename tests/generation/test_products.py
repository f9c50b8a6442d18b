"""Decoding with replaced products: what is shared, what is let go, and that numbers which are none come out as such."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from star_fast.generation import Decoder
from star_fast.generation.products import Int8Linear, why_not, with_products
from star_fast.model.transformer import Transformer
from tests.generation.test_decoder import LABEL, small_model


def int8_copy(dtype: torch.dtype = torch.float32) -> tuple[Transformer, Transformer]:
    model = small_model(dtype)
    return model, with_products(model, "int8", 6)


def test_every_matrix_is_replaced_and_the_rest_shared() -> None:
    model, quantised = int8_copy()
    assert not any(isinstance(module, nn.Linear) for module in quantised.modules())
    assert sum(isinstance(module, Int8Linear) for module in quantised.modules()) == 4 * len(model.layers) + 1
    theirs = dict(model.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in quantised.named_parameters())
    assert len(list(quantised.parameters())) == len(theirs) - 4 * len(model.layers) - 1


def test_the_weights_as_they_were_are_let_go() -> None:
    model, quantised = int8_copy()
    kept = weakref.ref(model.layers[1].feed_forward.w13.weight)
    del model
    gc.collect()
    assert kept() is None and isinstance(quantised.output, Int8Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """Products keep rows apart to the last bit, attention too: the codes of one image are the same alone and among
    others.
    """
    decoder = Decoder(small_model(dtype), 6, products="int8")
    together = decoder.generate(LABEL, guidance=2.0, seed=3)
    for image in range(3):
        one = decoder.generate(LABEL[image : image + 1], guidance=2.0, seed=3, image_index=torch.tensor([image]))
        assert torch.equal(one[0], together[image])


def test_nan_in_the_model_is_an_error_and_no_picture() -> None:
    model = small_model()
    with torch.no_grad():
        model.tok_embeddings.weight[:, 3] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        Decoder(model, 3, products="int8").generate(LABEL)


def test_int8_is_for_dtypes_that_it_has() -> None:
    assert why_not("int8", torch.device("cpu"), torch.bfloat16) is None
    assert "float32 or bfloat16" in why_not("int8", torch.device("cpu"), torch.float64)
    assert "on cuda" in why_not("int8", torch.device("cuda"), torch.bfloat16)

"""The decoding loop against full forward passes: same hidden states, same logits, same tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from star_fast.config import ModelConfig
from star_fast.generation import Decoder, generate
from star_fast.generation.products import with_products
from star_fast.model.transformer import Transformer
from star_fast.ops.sample_tokens import sample_tokens

CONFIG = ModelConfig(blocks=3, heads=2, width=32, vocab=37, positions=25, num_classes=5)
LABEL = torch.tensor([0, 4, 2])


def small_model(dtype: torch.dtype = torch.float32, **changes: int) -> Transformer:
    """Random weights, large enough that logits differ clearly between tokens and classes."""
    model = Transformer(dataclasses.replace(CONFIG, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3 if "embed" in name or "output" in name else 0.15, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.to(dtype).eval()


def full_forward(model: Transformer, codes_Bn: Tensor, label: Tensor) -> Tensor:
    """(B, V) logits of the token after `codes_Bn`, by a whole forward pass in the model's own dtype (float64 stays
    float64).
    """
    with torch.no_grad():
        return model.output(model(codes_Bn, label, logits=False).hidden[:, -1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_cached_decoding_equals_the_full_forward_at_every_position(
    dtype: torch.dtype, tolerance: float, guidance: float
) -> None:
    model = small_model(dtype)
    codes = torch.randint(0, CONFIG.vocab, (3, CONFIG.positions), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(model, rows=6)
    seen = []
    # Decoder.logits rounds to float32
    model.output.register_forward_hook(lambda module, arguments, logits: seen.append(logits))
    guided = guidance > 1
    null = torch.full_like(LABEL, CONFIG.num_classes)
    for position in range(CONFIG.positions):
        with torch.no_grad():
            embedded = (
                decoder.embed_tokens(codes[:, position - 1], guided) if position else decoder.embed_label(LABEL, guided)
            )
            logits = decoder.logits(embedded, position, guidance)
        exact = seen.pop()
        expected = full_forward(model, codes[:, :position], LABEL)
        if guided:
            without = full_forward(model, codes[:, :position], null)
            expected = without + guidance * (expected - without)
        seen.clear()
        assert (exact - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1), position
        assert logits.dtype == torch.float32 and torch.equal(logits, exact.float())


def recomputed(
    model: Transformer, label: Tensor, guidance: float, cfg_interval: int, seed: int, index: Tensor, **draw: float
) -> Tensor:
    """method.md section 3, Sampling, without a cache: everything computed again for each token, guidance on logits."""
    codes = torch.empty(len(label), 0, dtype=torch.int64)
    null = torch.full_like(label, model.null_class)
    for token in range(CONFIG.positions):
        logits = full_forward(model, codes, label)
        if guidance > 1 and (cfg_interval < 0 or token in range(cfg_interval + 2)):
            without = full_forward(model, codes, null)
            logits = without + guidance * (logits - without)
        drawn = sample_tokens(logits.float(), seed=seed, image_index=index, position=token, backend="reference", **draw)
        codes = torch.cat([codes, drawn[:, None]], dim=1)
    return codes


@pytest.mark.parametrize(
    ("guidance", "cfg_interval", "draw"),
    [
        (1.0, -1, {}),
        (1.0, 3, {"top_k": 7}),
        (2.0, -1, {"top_k": 5, "temperature": 0.8}),
        (3.0, 0, {"top_p": 0.9}),
        (3.0, 7, {"temperature": 0.0}),
        (2.0, 23, {}),
        (2.0, 400, {"top_p": 0.5, "top_k": 20}),
    ],
)
def test_generate_equals_a_loop_that_recomputes_everything(
    guidance: float, cfg_interval: int, draw: dict[str, float]
) -> None:
    model = small_model(torch.float64)
    index = torch.tensor([7, 0, 10**10])
    expected = recomputed(model, LABEL, guidance, cfg_interval, 5, index, **draw)
    got = generate(model, LABEL, guidance=guidance, cfg_interval=cfg_interval, seed=5, image_index=index, **draw)
    assert got.dtype == torch.int64 and torch.equal(got, expected)


def test_unconditional_rows_are_dropped_after_the_interval() -> None:
    model = small_model()
    rows = []
    model.layers[1].attention.wqkv.register_forward_hook(lambda module, arguments, out: rows.append(len(out)))
    generate(model, LABEL, guidance=2.0, cfg_interval=4)
    assert rows == [6] * 6 + [3] * (CONFIG.positions - 6)
    rows.clear()
    generate(model, LABEL, guidance=1.0)
    assert rows == [3] * CONFIG.positions


def test_a_decoder_serves_batch_after_batch_of_any_size() -> None:
    model = small_model(torch.float64)
    decoder = Decoder(model, rows=8)
    for size, guidance in ((4, 2.0), (1, 2.0), (3, 1.0), (8, 1.0), (4, 2.0)):
        label = torch.arange(size) % 5
        assert torch.equal(
            decoder.generate(label, guidance=guidance, seed=3), generate(model, label, guidance=guidance, seed=3)
        )


def test_streams_belong_to_images_not_to_places_in_a_batch() -> None:
    model = small_model(torch.float64)
    label = torch.arange(64) % 5
    together = generate(model, label, guidance=2.0, seed=1)
    for start in range(0, 64, 16):
        chosen = torch.arange(start, start + 16).flip(0)
        assert torch.equal(generate(model, label[chosen], guidance=2.0, seed=1, image_index=chosen), together[chosen])
    assert not torch.equal(generate(model, label, guidance=2.0, seed=2), together)
    # No two images share a stream
    assert len({tuple(row) for row in together[label == 0].tolist()}) == int((label == 0).sum())


def test_temperature_zero_takes_the_likeliest_whatever_the_seed() -> None:
    model = small_model(torch.float64)
    first, second = (generate(model, LABEL, temperature=0.0, seed=seed) for seed in (0, 99))
    assert torch.equal(first, second)
    assert torch.equal(first[:, 10], full_forward(model, first[:, :10], LABEL).argmax(1))


def test_int8_cache_stays_close() -> None:
    model = small_model()
    codes = torch.randint(0, CONFIG.vocab, (3, CONFIG.positions), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(model, rows=3, cache_dtype=torch.int8)
    assert decoder.caches[0].k.dtype == torch.int8
    with torch.no_grad():
        for position in range(CONFIG.positions):
            embedded = (
                decoder.embed_tokens(codes[:, position - 1], False) if position else decoder.embed_label(LABEL, False)
            )
            logits = decoder.logits(embedded, position)
    exact = full_forward(model, codes[:, :-1], LABEL)
    error = (logits - exact).norm() / exact.norm()
    assert 0 < error < 0.03


def test_packed_products_give_the_bits_of_plain_ones() -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 products")
    model = small_model(torch.bfloat16)
    assert torch.equal(
        Decoder(model, 6, products="packed").generate(LABEL, guidance=2.0),
        Decoder(model, 6, products="plain").generate(LABEL, guidance=2.0),
    )
    x = torch.randn(64, 32).bfloat16()
    assert torch.equal(
        with_products(model, "packed", 64).layers[0].attention.wqkv(x), model.layers[0].attention.wqkv(x)
    )


def test_int8_products_are_within_their_error_and_keep_rows_apart() -> None:
    model = small_model()
    quantised = with_products(model, "int8", 6)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    exact, got = model.layers[0].feed_forward.w13(x), quantised.layers[0].feed_forward.w13(x)
    assert 0 < (got - exact).norm() / exact.norm() < 0.02
    x[1:] *= 1000
    assert torch.equal(quantised.layers[0].feed_forward.w13(x)[0], got[0])
    assert quantised.tok_embeddings.weight is model.tok_embeddings.weight  # shared, not copied
    assert model.layers[0].feed_forward.w13.weight.dtype == torch.float32  # the model itself is untouched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": 0.5}, "guidance must be"),
        ({"guidance": float("nan")}, "guidance must be"),
        ({"cfg_interval": -2}, "cfg_interval must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_k": 2.5}, "top_k must be"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"seed": -1}, "seed must be"),
        ({"label": torch.tensor([6])}, "labels must lie in 0 ... 5"),
        ({"label": torch.tensor([-1])}, "labels must lie in"),
        ({"label": torch.zeros(2)}, "label must be a"),
        ({"label": torch.zeros(0, dtype=torch.int64)}, "label must be a"),
        ({"label": 3}, "label must be a"),
        ({"image_index": torch.arange(2)}, "image_index must be"),
        ({"image_index": torch.zeros(3)}, "image_index must be"),
    ],
)
def test_arguments_that_make_no_sense_say_so(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(small_model(), **{"label": LABEL, **arguments})


def test_too_many_images_and_impossible_products_say_so() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="3 images with guidance take 6 cache rows, this Decoder has 5"):
        Decoder(model, 5).generate(LABEL, guidance=2.0)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        Decoder(model, 0)
    with pytest.raises(ValueError, match="'packed' cannot be had"):
        Decoder(model, 1, products="packed")
    with pytest.raises(ValueError, match="there are auto, plain, packed, int8"):
        Decoder(model, 1, products="fp4")

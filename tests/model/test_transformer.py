"""model.transformer against a float64 re-statement of the published architecture in plain loops
(tests/model/restated_transformer.py).
"""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch

from star_fast.config import ModelConfig
from star_fast.model.transformer import Transformer
from tests.model.restated_transformer import restated

transformer_module = importlib.import_module("star_fast.model.transformer")
decode_attention = importlib.import_module("star_fast.ops.decode_attention")

TINY = ModelConfig(blocks=6, heads=4, width=128, vocab=256, positions=49, num_classes=10)
SMALL = ModelConfig(blocks=2, heads=2, width=32, vocab=37, positions=16, num_classes=5)


def build(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model in eval mode with weights large enough that every part shows in the logits (initial ones would give zero
    logits).
    """
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.0 if "embedding" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * noise if parameter.ndim > 1 else 1 + 0.2 * noise)
    return model.to(dtype).eval()


def batch(
    config: ModelConfig, rows: int = 2, tokens: int | None = None, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (B, n), labels (B,) with the null class among them, and a key mask (B, n+1) that hides about a third."""
    generator = torch.Generator().manual_seed(seed)
    n = config.positions - 1 if tokens is None else tokens
    label = torch.randint(0, config.num_classes, (rows,), generator=generator)
    label[-1] = config.num_classes
    keep = torch.rand(rows, n + 1, generator=generator) > 0.33
    keep[:, 0] = True
    return torch.randint(0, config.vocab, (rows, n), generator=generator), label, keep


def as_numpy(model: Transformer) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


def worst(got: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(got.detach().double().numpy() - expected).max())


# --- against it
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_logits_at_tiny(masked: bool) -> None:
    model = build(TINY)
    tokens, label, keep = batch(TINY)
    got = model(tokens, label, keep if masked else None, blocks=range(1, 7))
    weights = as_numpy(model)
    for row in range(len(tokens)):
        logits, outputs, hidden = restated(
            weights, TINY, tokens[row].numpy(), int(label[row]), keep[row].numpy() if masked else None
        )
        assert np.abs(logits).max() > 2  # so that 1e-5 says something
        assert worst(got.logits[row], logits) <= 1e-5
        for number in range(1, 7):
            assert worst(got.features[number][row], outputs[number - 1]) <= 1e-5, f"block {number}"
        assert worst(got.last[row], outputs[-1]) <= 1e-5
        assert worst(got.hidden[row], hidden) <= 1e-5
    assert got.logits.shape == (2, 49, 256) and got.logits.dtype == torch.float32


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 20)], ids=["B", "L", "XL"])
def test_one_block_at_full_width(width: int, heads: int) -> None:
    config = ModelConfig(blocks=1, heads=heads, width=width, vocab=64, positions=16, num_classes=10)
    model = build(config)
    tokens, label, keep = batch(config)
    got = model(tokens, label, keep)
    for row in range(len(tokens)):
        logits, outputs, _ = restated(as_numpy(model), config, tokens[row].numpy(), int(label[row]), keep[row].numpy())
        assert worst(got.logits[row], logits) <= 1e-5
        assert worst(got.last[row], outputs[0]) <= 1e-5


def test_float64_is_exact_to_rounding() -> None:
    model = build(SMALL, dtype=torch.float64)
    tokens, label, keep = batch(SMALL)
    got = model(tokens, label, keep)
    for row in range(len(tokens)):
        assert (
            worst(
                got.hidden[row],
                restated(as_numpy(model), SMALL, tokens[row].numpy(), int(label[row]), keep[row].numpy())[2],
            )
            <= 1e-12
        )


def test_class_position_has_zero_rotary() -> None:
    """The rule is visible: with an unturned class position (factor 1) the re-statement is far from the model."""
    model = build(SMALL)
    tokens, label, _ = batch(SMALL)
    logits, _, _ = restated(as_numpy(model), SMALL, tokens[0].numpy(), int(label[0]), class_factor=1.0)
    assert worst(model(tokens, label).logits[0], logits) > 1e-2
    assert not model.rotary[0].any() and model.rotary.shape == (16, 8, 2)


def test_gradient_along_a_random_direction() -> None:
    model = build(SMALL, dtype=torch.float64)
    tokens, label, keep = batch(SMALL, rows=1, tokens=6)
    cotangent = np.random.default_rng(0).normal(size=(7, 32))
    (model(tokens, label, keep).hidden[0] * torch.from_numpy(cotangent)).sum().backward()
    generator = torch.Generator().manual_seed(3)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()
    }
    slope = sum((p.grad * direction[name]).sum().item() for name, p in model.named_parameters() if p.grad is not None)
    values = []
    for step in (1e-5, -1e-5):
        moved = build(SMALL, dtype=torch.float64)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += step * direction[name]
        values.append(
            (restated(as_numpy(moved), SMALL, tokens[0].numpy(), int(label[0]), keep[0].numpy())[2] * cotangent).sum()
        )
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("on_device", [False, True])
def test_cached_steps_equal_the_full_forward(on_device: bool) -> None:
    model = build(TINY)
    tokens, label, _ = batch(TINY, rows=3)
    full = model(tokens, label).hidden
    caches = [decode_attention.new_cache(3, 4, 49, 32, torch.float32) for _ in range(TINY.blocks)]
    embedded = model.embed(tokens, label)
    with torch.no_grad():
        for t in range(49):
            hidden = model.step(embedded[:, t], caches, torch.tensor(t) if on_device else t)
            assert (hidden - full[:, t]).abs().max() <= 1e-5, f"position {t}"


def test_a_short_prefix_gives_the_same_numbers() -> None:
    model = build(SMALL)
    tokens, label, keep = batch(SMALL)
    full = model(tokens, label, keep).logits
    for n in (0, 1, 7):
        torch.testing.assert_close(
            model(tokens[:, :n], label, keep[:, : n + 1]).logits, full[:, : n + 1], rtol=0, atol=1e-5
        )


# --- what is returned
# -------------------------------------------------------------------------------------------------------------


def test_features_are_numbered_from_one_and_given_when_asked() -> None:
    model = build(SMALL)
    tokens, label, _ = batch(SMALL)
    out = model(tokens, label, blocks=(2,), logits=False)
    assert out.logits is None and set(out.features) == {2}
    assert torch.equal(out.features[2], out.last)
    rms = out.last.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    torch.testing.assert_close(out.hidden, out.last / rms * model.norm.weight)
    assert not model(tokens, label).features


# --- the key mask
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_key_touches_no_other_position(dtype: torch.dtype) -> None:
    model = build(TINY, dtype=dtype)
    tokens, label, keep = batch(TINY)
    position = 20
    keep[:, position] = False
    other = tokens.clone()
    other[:, position - 1] = (tokens[:, position - 1] + 1) % TINY.vocab  # position t holds token t - 1
    elsewhere = torch.arange(49) != position
    before, after = model(tokens, label, keep, blocks=(3,)), model(other, label, keep, blocks=(3,))
    for name, a, b in (
        ("logits", before.logits, after.logits),
        ("block 3", before.features[3], after.features[3]),
        ("last", before.last, after.last),
    ):
        assert torch.equal(a[:, elsewhere], b[:, elsewhere]), name
        assert not torch.equal(a[:, position], b[:, position]), name  # it still runs as a query of its own
    unmasked, moved = model(tokens, label).logits, model(other, label).logits
    assert torch.equal(unmasked[:, :position], moved[:, :position])  # causal
    assert (unmasked[:, position + 1 :] != moved[:, position + 1 :]).any(dim=(0, 2)).all()


# --- dropout and recomputation
# ----------------------------------------------------------------------------------------------------


def test_dropout_is_of_training_only_and_follows_the_seed() -> None:
    model = build(SMALL)
    tokens, label, keep = batch(SMALL)
    plain = model(tokens, label, keep).logits
    assert torch.equal(plain, model(tokens, label, keep).logits)
    model.train()
    torch.manual_seed(1)
    first, second = model(tokens, label, keep).logits, model(tokens, label, keep).logits
    torch.manual_seed(1)
    again = model(tokens, label, keep).logits
    assert torch.equal(first, again) and not torch.equal(first, second) and not torch.equal(first, plain)
    without = Transformer(ModelConfig(**{**vars(SMALL), "dropout": 0.0}))
    without.load_state_dict(model.state_dict())
    assert torch.equal(without.train()(tokens, label, keep).logits, plain)


def test_dropout_has_a_mask_of_its_own_at_every_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, and attention and feed-forward output of each block: the sums of the residual stream, each called
    with 0.1 and a seed of its own.
    """
    calls = []
    plain = transformer_module.add_rms_norm

    def recorded(x, residual, weight, eps, *, dropout, seed):
        calls.append((residual is None, dropout, seed))
        return plain(x, residual, weight, eps, dropout=dropout, seed=seed)

    monkeypatch.setattr(transformer_module, "add_rms_norm", recorded)
    tokens, label, _ = batch(SMALL)
    build(SMALL).train()(tokens, label)
    assert [first for first, _, _ in calls] == [True, False, False, False, False]
    assert {dropout for _, dropout, _ in calls} == {0.1}
    assert len({seed for _, _, seed in calls}) == 5


def test_block_checkpointing_gives_the_same_gradients() -> None:
    model = build(SMALL).train()
    tokens, label, keep = batch(SMALL)
    calls = []
    for block in model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for model.block_checkpointing in (False, True):
        calls.clear()
        model.zero_grad()
        torch.manual_seed(7)
        out = model(tokens, label, keep, blocks=(1,))
        (out.logits.square().mean() + out.features[1].mean() + out.last.square().mean()).backward()
        assert len(calls) == (4 if model.block_checkpointing else 2)  # each block ran again in backward
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.any(), name


# --- weights
# ----------------------------------------------------------------------------------------------------------------------


def test_initial_weights() -> None:
    model = Transformer(TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    assert not model.output.weight.any()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        elif name != "output.weight":
            count = parameter.numel()
            assert abs(parameter.mean().item()) < 5 * 0.02 / math.sqrt(count), name
            assert abs(parameter.std().item() / 0.02 - 1) < 5 / math.sqrt(2 * count), name
            assert parameter.abs().max() > 3 * 0.02 if count > 10_000 else True, name  # normal, not uniform
    again = Transformer(TINY)
    again.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("blocks", "heads", "width", "millions"),
    [(12, 12, 768, 111), (24, 16, 1024, 343), (36, 20, 1280, 775)],
    ids=["B", "L", "XL"],
)
def test_parameter_counts_of_the_paper(blocks: int, heads: int, width: int, millions: int) -> None:
    with torch.device("meta"):
        model = Transformer(
            ModelConfig(blocks=blocks, heads=heads, width=width, vocab=16384, positions=256, num_classes=1000)
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    feed_forward = math.ceil(int(8 * width / 3) / 256) * 256
    assert count == blocks * (4 * width**2 + 3 * width * feed_forward + 2 * width) + width * (2 * 16384 + 1001 + 1)
    assert round(count / 1e6) == millions


def test_state_dict_has_the_published_names() -> None:
    model = build(SMALL)
    names = ["cls_embedding.embedding_table.weight", "tok_embeddings.weight", "norm.weight", "output.weight"]
    for n in range(2):
        names += [
            f"layers.{n}.{part}.weight"
            for part in (
                "attention.wqkv",
                "attention.wo",
                "feed_forward.w1",
                "feed_forward.w2",
                "feed_forward.w3",
                "attention_norm",
                "ffn_norm",
            )
        ]
    state = model.state_dict()
    assert sorted(state) == sorted(names)
    assert state["layers.0.feed_forward.w1.weight"].shape == (256, 32) and state[
        "layers.0.attention.wqkv.weight"
    ].shape == (96, 32)
    other = Transformer(SMALL).eval()
    other.load_state_dict(state)
    tokens, label, keep = batch(SMALL)
    assert torch.equal(other(tokens, label, keep).logits, model(tokens, label, keep).logits)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_rotary_table_survives_casts_and_the_meta_device() -> None:
    angles = [
        [0.0] * 8,
        *(
            [(row if pair < 4 else column) * 10000.0 ** (-2 * (pair % 4) / 8) for pair in range(8)]
            for row in range(4)
            for column in range(4)
        ),
    ]
    table = torch.tensor([[(math.cos(a), math.sin(a)) for a in row] for row in angles[:16]], dtype=torch.float64)
    table[0] = 0
    assert torch.equal(Transformer(SMALL).rotary, table.float())
    assert torch.equal(Transformer(SMALL).bfloat16().rotary, table.float())
    assert torch.equal(Transformer(SMALL).bfloat16().float().rotary, table.float())
    torch.testing.assert_close(Transformer(SMALL).double().rotary, table, rtol=0, atol=1e-15)
    with torch.device("meta"):
        model = Transformer(SMALL)
    assert torch.equal(model.bfloat16().to_empty(device="cpu").rotary, table.float())
    assert "rotary" not in model.state_dict()


# --- bad input
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 16, dtype=torch.int64)}, "at most T - 1 = 15 tokens, got 16"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, r"label must be \(2,\).*got \(3,\)"),
        ({"blocks": (0,)}, r"numbered 1 \.\.\. 2, got \[0\]"),
        ({"blocks": (1, 3)}, r"numbered 1 \.\.\. 2, got \[1, 3\]"),
        ({"keep": torch.ones(2, 5, dtype=torch.bool)}, r"keep must be .*got shape \(2, 5\)"),
        ({"keep": torch.zeros(2, 16, dtype=torch.bool)}, r"keep\[:, 0\] must be True"),
    ],
)
def test_bad_input_says_what_came(change: dict, message: str) -> None:
    tokens, label, keep = batch(SMALL)
    arguments = {"tokens": tokens, "label": label, "keep": keep, "blocks": ()} | change
    with pytest.raises(ValueError, match=message):
        build(SMALL)(**arguments)


def test_a_token_or_label_out_of_range_raises() -> None:
    tokens, label, _ = batch(SMALL)
    with pytest.raises(IndexError):
        build(SMALL)(tokens + 37, label)
    with pytest.raises(IndexError):
        build(SMALL)(tokens, label + 6)


@pytest.mark.parametrize("sizes", [{"vocab": 0}, {"num_classes": 0}, {"positions": 0}])
def test_sizes_must_be_set(sizes: dict) -> None:
    with pytest.raises(ValueError, match="must be set, got"):
        Transformer(ModelConfig(**{**vars(SMALL), **sizes}))

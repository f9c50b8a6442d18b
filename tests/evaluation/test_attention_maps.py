"""Attention maps against plain loops, and against what the model itself does with its attention."""

from __future__ import annotations

import math

import pytest
import torch

from star_fast.config import ModelConfig
from star_fast.evaluation.attention_maps import attention_shares, grid_map, last_block_attention, mean_attention, query_positions
from star_fast.model.transformer import Transformer


def small_model(blocks: int) -> Transformer:
    model = Transformer(ModelConfig(blocks=blocks, heads=2, width=16, vocab=11, positions=9, num_classes=4))
    model.init_weights(torch.Generator().manual_seed(blocks))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15)
    return model.eval()


def by_loops(model: Transformer, codes: list[int], label: int) -> list[list[list[float]]]:
    """[head][query][key] in float64, from the residual stream that enters the last block, with method.md's rotary written out."""
    config, block = model.config, model.layers[-1]
    head_size, grid, width = config.head_size, math.isqrt(config.positions), config.width
    with torch.no_grad():
        tokens = torch.tensor([codes[:-1]])
        inputs = (model(tokens, torch.tensor([label]), blocks=(config.blocks - 1,), logits=False).features[config.blocks - 1] if config.blocks > 1
                  else model.embed(tokens, torch.tensor([label])))[0].double()
    weight, gain = block.attention.wqkv.weight.detach().double(), block.attention_norm.weight.detach().double()
    vectors: dict[str, list[list[list[float]]]] = {"q": [], "k": []}
    for t in range(config.positions):
        x = inputs[t]
        x = x / math.sqrt((x * x).mean().item() + 1e-5) * gain
        for part, name in enumerate("qk"):
            heads = []
            for h in range(config.heads):
                start = part * width + h * head_size
                raw = [(weight[start + e] * x).sum().item() for e in range(head_size)]
                turned = []
                for pair in range(head_size // 2):
                    if t == 0:
                        turned += [0.0, 0.0]
                        continue
                    place = (t - 1) // grid if pair < head_size // 4 else (t - 1) % grid
                    angle = place * 10000 ** (-2 * (pair % (head_size // 4)) / (head_size / 2))
                    a, b = raw[2 * pair], raw[2 * pair + 1]
                    turned += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
                heads.append(turned)
            vectors[name].append(heads)
    result = []
    for h in range(config.heads):
        rows = []
        for query in range(config.positions):
            scores = [sum(a * b for a, b in zip(vectors["q"][query][h], vectors["k"][key][h], strict=True)) / math.sqrt(head_size) for key in range(query + 1)]
            total = sum(math.exp(score) for score in scores)
            rows.append([math.exp(score) / total for score in scores] + [0.0] * (config.positions - query - 1))
        result.append(rows)
    return result


@pytest.mark.parametrize("blocks", [1, 3])
def test_equals_plain_loops(blocks: int) -> None:
    model = small_model(blocks)
    codes = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    probs = last_block_attention(model, codes, torch.tensor([1, 4]))
    for b, label in enumerate((1, 4)):
        expected = torch.tensor(by_loops(model, codes[b].tolist(), label), dtype=torch.float64)
        torch.testing.assert_close(probs[b].double(), expected, rtol=1e-4, atol=1e-5)
    assert probs.std() > 0.05  # not merely uniform


def test_rows_sum_to_one_and_see_no_later_position() -> None:
    model = small_model(2)
    probs = last_block_attention(model, torch.arange(9)[None], torch.tensor([0]))
    torch.testing.assert_close(probs.sum(-1), torch.ones(1, 2, 9))
    assert probs.triu(1).abs().max() == 0
    torch.testing.assert_close(probs[0, :, 0, 0], torch.ones(2))
    changed = torch.arange(9)
    changed[5:] = 0  # codes from 5 on enter at position 6
    assert torch.equal(last_block_attention(model, changed[None], torch.tensor([0]))[..., :6, :], probs[..., :6, :])


def test_the_model_mixes_values_by_these_probabilities() -> None:
    """Applying the maps to the last block's values gives what the model's own attention gives to its output matrix."""
    model, codes, label = small_model(2), torch.arange(9)[None] % 11, torch.tensor([2])
    block, seen = model.layers[-1], {}
    handle = block.attention.wo.register_forward_hook(lambda _module, inputs, _output: seen.update(mixed=inputs[0]))
    with torch.no_grad():
        features = model(codes[:, :-1], label, blocks=(1,), logits=False).features[1]
        handle.remove()
        values = block.attention.wqkv(block.attention_norm(features)[0]).view(1, 9, 3, 2, 8)[:, :, 2]
    mixed = torch.einsum("bhqk,bkhe->bqhe", last_block_attention(model, codes, label), values).flatten(2)
    torch.testing.assert_close(mixed, seen["mixed"], rtol=1e-4, atol=1e-5)


def test_grid_map_places_position_s_at_cell_s_minus_1() -> None:
    probs = torch.arange(81.0).view(9, 9)
    cells = grid_map(probs, 4)
    assert cells.flatten()[:4].tolist() == probs[4, 1:5].tolist()
    assert cells.flatten()[4:].isnan().all()
    assert query_positions(49, 4) == [11, 23, 35, 48] and query_positions(4, 4) == [1, 2, 3]


def test_shares_by_loops() -> None:
    model = small_model(2)
    codes, labels = torch.randint(11, (5, 9), generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 4])
    mean = mean_attention(model, codes, labels, batch_images=2)
    probs = last_block_attention(model, codes, labels).double()
    torch.testing.assert_close(mean, probs.mean(dim=(0, 1)))
    to_class = near = far = weighted = 0.0
    for query in range(1, 9):
        to_class += mean[query, 0].item() / 8
        for key in range(1, query + 1):
            down, across = query // 3 - (key - 1) // 3, query % 3 - (key - 1) % 3
            share = mean[query, key].item() / 8
            weighted += share * math.hypot(down, across)
            if max(abs(down), abs(across)) <= 1:
                near += share
            else:
                far += share
    shares = attention_shares(mean)
    assert (shares.to_class, shares.near, shares.far) == pytest.approx((to_class, near, far), rel=1e-9)
    assert shares.mean_distance == pytest.approx(weighted / (near + far), rel=1e-9)
    assert shares.to_class + shares.near + shares.far == pytest.approx(1)


def test_wrong_length_says_what_came() -> None:
    with pytest.raises(ValueError, match=r"codes must be \(B, 9\), got \(1, 8\)"):
        last_block_attention(small_model(1), torch.zeros(1, 8, dtype=torch.int64), torch.tensor([0]))

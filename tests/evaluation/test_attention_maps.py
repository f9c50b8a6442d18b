"""Attention maps against plain loops, and against what the model itself does with its attention."""

from __future__ import annotations

import math

import pytest
import torch

from star_fast.config import ModelConfig
from star_fast.evaluation.attention_maps import (
    all_attention,
    attention_by_block,
    attention_shares,
    block_attention,
    even_attention,
    grid_map,
    last_block_attention,
    mean_attention,
    query_positions,
)
from star_fast.model.transformer import Transformer


def small_model(blocks: int) -> Transformer:
    model = Transformer(ModelConfig(blocks=blocks, heads=2, width=16, vocab=11, positions=9, num_classes=4))
    model.init_weights(torch.Generator().manual_seed(blocks))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15)
    return model.eval()


def by_loops(model: Transformer, codes: list[int], label: int, number: int) -> list[list[list[float]]]:
    """[head][query][key] in float64, from the residual stream that enters block `number`, with method.md's rotary
    written out.
    """
    config, block = model.config, model.layers[number - 1]
    head_size, grid, width = config.head_size, math.isqrt(config.positions), config.width
    with torch.no_grad():
        tokens = torch.tensor([codes[:-1]])
        inputs = (
            model(tokens, torch.tensor([label]), blocks=(number - 1,), logits=False).features[number - 1]
            if number > 1
            else model.embed(tokens, torch.tensor([label]))
        )[0].double()
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
            scores = [
                sum(a * b for a, b in zip(vectors["q"][query][h], vectors["k"][key][h], strict=True))
                / math.sqrt(head_size)
                for key in range(query + 1)
            ]
            total = sum(math.exp(score) for score in scores)
            rows.append([math.exp(score) / total for score in scores] + [0.0] * (config.positions - query - 1))
        result.append(rows)
    return result


@pytest.mark.parametrize("blocks", [1, 3])
def test_equals_plain_loops(blocks: int) -> None:
    model = small_model(blocks)
    codes = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 4])
    for number, probs in enumerate(all_attention(model, codes, labels), 1):
        for b, label in enumerate(labels.tolist()):
            expected = torch.tensor(by_loops(model, codes[b].tolist(), label, number), dtype=torch.float64)
            torch.testing.assert_close(probs[b].double(), expected, rtol=1e-4, atol=1e-5)
        assert probs.std() > 0.05  # not merely uniform
        assert torch.equal(probs, block_attention(model, codes, labels, number))
    assert number == blocks and torch.equal(probs, last_block_attention(model, codes, labels))


def test_every_block_in_numbers_by_loops() -> None:
    """Shares, distance and entropy from probabilities that plain loops computed: no sum of the code
    under test is used.
    """
    model, codes, labels = (
        small_model(3),
        torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(2)),
        [0, 3, 4],
    )
    got = attention_by_block(model, codes, torch.tensor(labels), batch_images=2)
    assert [block.block for block in got] == [1, 2, 3]
    for block in got:
        to_class = near = far = weighted = entropy = 0.0
        rows = 0
        for image, label in zip(codes.tolist(), labels, strict=True):
            for head in by_loops(model, image, label, block.block):
                for query in range(1, 9):
                    rows += 1
                    for key, share in enumerate(head[query][: query + 1]):
                        entropy -= share * math.log(share) if share else 0.0
                        if key == 0:
                            to_class += share
                            continue
                        down, across = query // 3 - (key - 1) // 3, query % 3 - (key - 1) % 3
                        weighted += share * math.hypot(down, across)
                        if abs(down) <= 1 and abs(across) <= 1:
                            near += share
                        else:
                            far += share
        assert (block.shares.to_class, block.shares.near, block.shares.far) == pytest.approx(
            (to_class / rows, near / rows, far / rows), rel=1e-4
        )
        assert block.shares.mean_distance == pytest.approx(weighted / (near + far), rel=1e-4)
        assert block.entropy == pytest.approx(entropy / rows, rel=1e-4)


def test_even_attention_by_hand() -> None:
    """2 x 2 codes: query 1 sees the class and cell 0, query 2 cells 0 and 1 too, query 3 cells 0 ... 2."""
    even = even_attention(4)
    assert even.entropy == pytest.approx((math.log(2) + math.log(3) + math.log(4)) / 3)
    assert even.shares.to_class == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert even.shares.far == pytest.approx(0)
    # Distances: 1 to 0; 2 to 0 and to 1; 3 to 0, 1 and 2.
    weighted = 1 / 2 + (1 + math.sqrt(2)) / 3 + (math.sqrt(2) + 1 + 1) / 4
    assert even.shares.mean_distance == pytest.approx(weighted / (1 / 2 + 2 / 3 + 3 / 4))


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
    with pytest.raises(ValueError, match=r"numbered 1 \.\.\. 1, got 2"):
        block_attention(small_model(1), torch.zeros(1, 9, dtype=torch.int64), torch.tensor([0]), 2)

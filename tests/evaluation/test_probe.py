"""The linear probe: finds a class where one is planted, nothing where there is none, and reads the right features."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from star_fast.config import ModelConfig
from star_fast.errors import UserError
from star_fast.evaluation import plots
from star_fast.evaluation.probe import ProbeConfig, probe_positions
from star_fast.evaluation.probe_features import InMemory, extract_features
from star_fast.evaluation.probe_training import train_probes
from star_fast.model.transformer import Transformer


class FakeStore:
    """Codes (images, views, T) in memory."""

    def __init__(self, codes: torch.Tensor) -> None:
        self.array = codes

    def codes(self, rows: torch.Tensor, views: list[int]) -> torch.Tensor:
        return self.array[rows][:, views]


def predictions(
    train: list[torch.Tensor], labels: torch.Tensor, held_out: torch.Tensor, classes: int, config: ProbeConfig
) -> torch.Tensor:
    """(P, N' + N): the classes named of the held-out images, then of the training images' first view."""
    probes = train_probes(InMemory(train), labels, classes, config.schedule)
    return torch.cat([probes.predict(held_out)[0], probes.predict(train[0])[0]], dim=1)


def small_model() -> Transformer:
    model = Transformer(ModelConfig(blocks=3, heads=2, width=16, vocab=11, positions=9, num_classes=4))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # large enough that blocks and labels matter
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model.eval()


def test_positions_are_the_papers() -> None:
    assert probe_positions(256) == [31, 63, 95, 127, 159, 191, 223, 255]
    assert probe_positions(49) == [5, 11, 17, 23, 29, 35, 41, 48]
    assert probe_positions(4) == [0, 1, 2, 3]


def test_planted_class_is_found_where_it_is_and_only_there(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    classes, width, count = 5, 24, 800
    labels = torch.randint(classes, (count,), generator=generator)
    directions = torch.randn(classes, width, generator=generator)
    features = torch.randn(count, 4, width, generator=generator)
    features[:, 1] += 3 * directions[labels]  # position 1: plain to see
    # Position 3: the same under another scale and mean
    features[:, 3] = 1000 + 1e-3 * (features[:, 3] + 3 * directions[labels])
    predicted = predictions([features[:500]], labels[:500], features[500:], classes, ProbeConfig(tmp_path))
    held_out = (predicted[:, :300] == labels[500:]).double().mean(1)
    assert held_out[1] > 0.95 and held_out[3] > 0.95
    assert all(abs(held_out[i] - 1 / classes) < 0.1 for i in (0, 2))
    assert predicted.shape == (4, 800)
    again = predictions([features[:500]], labels[:500], features[500:], classes, ProbeConfig(tmp_path))
    assert torch.equal(predicted, again)


def test_probes_side_by_side_equal_one_probe_alone(tmp_path: Path) -> None:
    """Each position's layer must learn as if it were alone: a summed loss or a shared norm would couple them."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (200,), generator=generator)
    features = torch.randn(200, 2, 8, generator=generator)
    features[:, 0] += 2 * torch.eye(3, 8)[labels]
    config = ProbeConfig(tmp_path, epochs=12, warmup_epochs=2)
    together = predictions([features[:150]], labels[:150], features[150:], 3, config)
    noise_changed = features.clone()
    noise_changed[:, 1] = 50 * torch.randn(200, 8, generator=generator)
    other = predictions([noise_changed[:150]], labels[:150], noise_changed[150:], 3, config)
    assert torch.equal(together[0], other[0])
    assert not torch.equal(together[1], other[1])


def test_views_are_drawn_by_epoch(tmp_path: Path) -> None:
    """A class visible in the second view only can be learnt only if that view is used."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(2, (300,), generator=generator)
    blank, telling = torch.randn(2, 300, 1, 6, generator=generator)
    telling[:, 0, 0] += 8.0 * labels
    held_out = telling[200:]
    config = ProbeConfig(tmp_path, epochs=40, warmup_epochs=4)
    alone = predictions([blank[:200]], labels[:200], held_out, 2, config)[0, :100]
    both = predictions([blank[:200], telling[:200]], labels[:200], held_out, 2, config)[0, :100]
    assert (both == labels[200:]).double().mean() > 0.9 > 0.75 > (alone == labels[200:]).double().mean()


def test_features_are_the_full_models_under_the_null_class() -> None:
    model, generator = small_model(), torch.Generator().manual_seed(3)
    codes = torch.randint(11, (7, 2, 9), generator=generator)
    rows = torch.tensor([6, 0, 3])
    got = extract_features(model, FakeStore(codes), rows, 1, [2], [2, 5, 8], batch_images=2)
    with torch.no_grad():
        null = model(codes[rows, 1, :8], torch.full((3,), 4), blocks=(2,), logits=False).features[2][:, [2, 5, 8]]
        other = model(codes[rows, 1, :8], torch.full((3,), 0), blocks=(2,), logits=False).features[2][:, [2, 5, 8]]
    # Batches of 2 and of 3: with several threads a product may round otherwise
    torch.testing.assert_close(got, null, rtol=1e-4, atol=1e-5)
    assert (got - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("points", 0),
        ("points", 10**15),
        ("epochs", 0),
        ("warmup_epochs", 90),
        ("warmup_epochs", -1),
        ("lr", (0.0,)),
        ("lr", (math.nan,)),
        ("lr", (1.0, math.inf)),
        ("lr", (1e30,)),
        ("lr", ()),
        ("lr", (1.0, 1.0)),
        ("depths", (-1,)),
        ("depths", (2, 2)),
        ("knn", -1),
        ("features", "a\0b"),
        ("train_views", 0),
        ("train_views", 10**15),
        ("max_train_images", -1),
        ("images_per_step", 0),
        ("batch_images", 10**15),
        ("seed", -1),
        ("seed", 10**30),
    ],
)
def test_bad_settings_say_what_came(field: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')}: expected .* got "):
        ProbeConfig(tmp_path, **{field: value})


def test_the_papers_curves_stand_behind_what_can_be_compared() -> None:
    """Only where every run has 1000 classes and 256 codes an image; then the panel is wider, for their names."""
    ours = {"positions": probe_positions(256), "held_out": [0.3] * 8, "chance": 0.001, "classes": 1000, "sequence": 256}
    others = [
        {**ours, "classes": 10},
        {**ours, "sequence": 576},
        {key: ours[key] for key in ("positions", "held_out", "chance")},
    ]
    sizes = [
        Image.open(io.BytesIO(plots.probe_curves(results, dark=False))).size
        for results in ({"a": ours}, *({"a": ours, "b": other} for other in others))
    ]
    assert sizes[0] > sizes[1] == sizes[2] == sizes[3]
    for positions, shares in plots.PAPER_FIGURE_4.values():
        assert list(positions) == probe_positions(256) and len(shares) == 8
    # Table 3 of the paper: 18.68 % and 45.27 % at the last position after 50 epochs.
    assert plots.PAPER_FIGURE_4["LlamaGen, 50 epochs"][1][-1] == pytest.approx(0.1868, abs=0.005)
    assert plots.PAPER_FIGURE_4["ST-AR, 50 epochs"][1][-1] == pytest.approx(0.4527, abs=0.005)


def test_names_at_the_ends_of_lines_do_not_touch() -> None:
    axes = Figure().add_subplot()
    axes.set_ylim(0, 1)
    plots._name_ends(axes, {"b": (1, 0.5), "a": (1, 0.49), "c": (1, 0.9)}, "black")
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    assert heights["a"] == 0.49 and heights["b"] >= 0.54 and heights["c"] == 0.9


def test_a_probe_that_diverges_says_so(tmp_path: Path) -> None:
    features = 1e30 * torch.randn(64, 1, 4, generator=torch.Generator().manual_seed(0))
    features[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        predictions([features], torch.arange(64) % 2, features, 2, ProbeConfig(tmp_path, epochs=1, warmup_epochs=0))

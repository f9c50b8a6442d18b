"""Mistakes that are easily made between a sampling job's settings and its files: a setting that never reaches the draw,
or one job taken for another.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from star_fast.errors import UserError
from star_fast.generation import Decoder
from star_fast.generation.grid import draw_grid
from star_fast.generation.label_plan import find_classes, plan_labels
from star_fast.generation.products import with_products
from star_fast.generation.render import Renderer
from star_fast.generation.sample import sample_images
from star_fast.generation.sample_config import SampleConfig
from star_fast.model.tokenizer import VQTokenizer, to_uint8
from star_fast.model.transformer import Transformer
from star_fast.model.weights import load_model, save_model
from tests.disk_events import DiskEvent, watch_disk
from tests.generation.small_model import CLASS_NAMES, TOKENIZER, save_small_model

IMAGES, BATCH = 21, 12  # two batches, the first larger than the pieces in which pixels are made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a teacher that is not the student."""
    folder = tmp_path_factory.mktemp("faults") / "model"
    student, tokenizer = save_small_model(folder)
    teacher = {
        name: value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        for name, value in student.state_dict().items()
    }
    save_model(folder, student, class_names=CLASS_NAMES, teacher=teacher, tokenizer=tokenizer, record={})
    return folder


def other_tokenizer(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        VQTokenizer(TOKENIZER).eval().save(folder)
    return folder


def settings(model: Path, out: Path, **changes: Any) -> SampleConfig:
    return dataclasses.replace(
        SampleConfig(
            model=str(model),
            out=str(out),
            images=IMAGES,
            batch_images=BATCH,
            precision="fp32",
            products="plain",
            seed=3,
            grid=False,
        ),
        **changes,
    )


def drawn(config: SampleConfig) -> tuple[np.ndarray, np.ndarray]:
    with np.load(sample_images(config).npz) as file:
        return file["arr_0"], file["arr_1"]


@torch.no_grad()
def by_hand(config: SampleConfig, tokenizer: VQTokenizer | None = None) -> np.ndarray:
    """The images that a config describes, from Decoder and tokenizer alone; by numbers, not by the job's code."""
    loaded = load_model(config.model, weights=config.weights)
    transformer: Transformer = loaded.transformer.to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    tokenizer = tokenizer or VQTokenizer.load(loaded.tokenizer_folder)
    made = []
    for first in range(0, config.images, config.batch_images):
        index = torch.arange(first, min(first + config.batch_images, config.images))
        decoder = Decoder(
            transformer, 2 * config.batch_images, torch.int8 if config.cache == "int8" else None, config.products
        )
        codes = decoder.generate(
            index % 3,
            guidance=config.guidance,
            cfg_interval=config.cfg_interval,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            image_index=index,
        )
        if config.precision == "bf16":  # tests/generation/test_render.py says what these pixels are
            made.append(Renderer(tokenizer, torch.device("cpu"), config.pixels).start(codes).wait())
            continue
        pixels = tokenizer.decode(codes)
        if config.pixels:
            pixels = F.interpolate(pixels, size=(config.pixels, config.pixels), mode="bicubic", antialias=False)
        made.append(to_uint8(pixels).expand(-1, 3, -1, -1).permute(0, 2, 3, 1))
    return torch.cat(made).numpy()


@pytest.fixture(scope="module")
def usual(model: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return drawn(settings(model, tmp_path_factory.mktemp("usual") / "images.npz"))[0]


def test_the_usual_draw(model: Path, tmp_path: Path, usual: np.ndarray) -> None:
    assert np.array_equal(usual, by_hand(settings(model, tmp_path / "images.npz")))


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.5},
        {"top_p": 0.6},
        {"top_k": 4},
        {"cfg_interval": 3},
        {"guidance": 1.0},
        {"guidance": 3.5},
        {"seed": 4},
        {"weights": "teacher"},
        {"precision": "bf16"},
        {"products": "int8"},
        {"cache": "int8"},
        {"pixels": 24},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_reaches_the_draw(
    model: Path, tmp_path: Path, usual: np.ndarray, changes: dict[str, Any]
) -> None:
    config = settings(model, tmp_path / "images.npz", **changes)
    images, _ = drawn(config)
    assert np.array_equal(images, by_hand(config))
    assert images.shape != usual.shape or not np.array_equal(images, usual)


def test_the_tokenizer_asked_for_goes_before_the_models_own(model: Path, tmp_path: Path, usual: np.ndarray) -> None:
    config = settings(model, tmp_path / "images.npz", tokenizer=str(other_tokenizer(tmp_path / "tokenizer")))
    images, _ = drawn(config)
    assert np.array_equal(images, by_hand(config, VQTokenizer.load(tmp_path / "tokenizer"))) and not np.array_equal(
        images, usual
    )


def test_the_seed_names_random_labels_too(model: Path, tmp_path: Path) -> None:
    found = {seed: drawn(settings(model, tmp_path / f"{seed}.npz", labels="random", seed=seed))[1] for seed in (3, 4)}
    for seed, labels in found.items():
        assert np.array_equal(labels, plan_labels(IMAGES, [0, 1, 2], "random", seed))
    assert not np.array_equal(found[3], found[4])


def test_the_precision_recorded_is_the_one_that_was_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for native, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        result = sample_images(settings(model, tmp_path / f"{precision}.npz", precision="auto"))
        pixels = precision if torch.backends.cpu.get_cpu_capability() == "AVX512" else "fp32"
        assert all(
            line in result.record.read_text()
            for line in (f'"precision": "{precision}"', f'"pixels_precision": "{pixels}"')
        )
        with np.load(result.npz) as file:
            assert np.array_equal(file["arr_0"], by_hand(settings(model, tmp_path / "x.npz", precision=precision)))


def test_exact_mode_is_float32_in_fixed_blocks(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine could multiply natively; and image i always lies in place i mod 8 of its block."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    generate, asked = Decoder.generate, []

    def watched(decoder: Decoder, label: torch.Tensor, **more: Any) -> torch.Tensor:
        asked.append((more["image_index"].tolist(), decoder.model.output.weight.dtype))
        return generate(decoder, label, **more)

    monkeypatch.setattr(Decoder, "generate", watched)
    result = sample_images(
        settings(model, tmp_path / "images.npz", exact=True, precision="auto", products="auto", batch_images=5)
    )
    assert all(
        index == list(range(index[0], index[0] + 8)) and index[0] % 8 == 0 and dtype == torch.float32
        for index, dtype in asked
    )
    assert '"precision": "fp32"' in result.record.read_text() and '"products": "plain"' in result.record.read_text()


def test_without_guidance_the_caches_hold_one_row_an_image(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    born, rows = Decoder.__init__, []

    def watched(decoder: Decoder, model: Transformer, count: int, *more: Any, **named: Any) -> None:
        rows.append(count)
        born(decoder, model, count, *more, **named)

    monkeypatch.setattr(Decoder, "__init__", watched)
    for guidance in (1.0, 2.0):
        sample_images(settings(model, tmp_path / f"{guidance}.npz", guidance=guidance))
    assert rows == [BATCH, 2 * BATCH]


OTHERS = [
    {"images": 20},
    {"labels": "random"},
    {"guidance": 1.5},
    {"cfg_interval": 5},
    {"temperature": 0.9},
    {"top_k": 7},
    {"top_p": 0.9},
    {"seed": 4},
    {"batch_images": 8},
    {"exact": True},
    {"pixels": 20},
    {"classes": ("ash", "7")},
    {"precision": "bf16"},
    {"products": "int8"},
    {"cache": "int8"},
    {"weights": "teacher"},
]


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleConfig:
    config = settings(model, tmp_path_factory.mktemp("finished") / "images.npz")
    sample_images(config)
    return config


@pytest.mark.parametrize("changes", OTHERS, ids=lambda changes: next(iter(changes)))
def test_a_file_of_other_settings_is_not_taken_for_ours(finished: SampleConfig, changes: dict[str, Any]) -> None:
    before = Path(finished.out).read_bytes()
    with pytest.raises(UserError, match=rf"of another sampling job \(.*{next(iter(changes))} "):
        sample_images(dataclasses.replace(finished, **changes))
    assert sample_images(finished).drawn == 0 and Path(finished.out).read_bytes() == before


def test_a_file_of_other_weights_is_not_taken_for_ours(finished: SampleConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"of another sampling job \(.*tokenizer_sha256 "):
        sample_images(dataclasses.replace(finished, tokenizer=str(other_tokenizer(tmp_path / "tokenizer"))))
    loaded = load_model(finished.model)
    with torch.no_grad():
        loaded.transformer.output.weight += 0.01
    save_model(
        tmp_path / "model", loaded.transformer, class_names=CLASS_NAMES, tokenizer=loaded.tokenizer_folder, record={}
    )
    with pytest.raises(UserError, match=r"of another sampling job \(.*weights_sha256 "):
        sample_images(dataclasses.replace(finished, model=str(tmp_path / "model")))


def test_ranks_share_the_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 delivers its batches and goes; rank 0 draws only the others."""
    config = settings(model, tmp_path / "images.npz", batch_images=4)
    counts = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        counts.append(sample_images(config).drawn)
    assert counts == [4 + 4 + 1, 4 + 4 + 4]
    assert np.array_equal(np.load(config.out)["arr_0"][:4], by_hand(dataclasses.replace(config, images=4)))


def test_pictures_asked_for_later_are_drawn_from_the_finished_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model, tmp_path / "images.npz", grid=True, grid_rows=2, grid_columns=3)
    result = sample_images(config)
    picture = result.grid.read_bytes()
    result.grid.unlink()
    assert sample_images(config).drawn == 0 and result.grid.read_bytes() == picture
    with Image.open(result.grid) as image:
        assert image.height == 4 + 2 * (64 + 4)  # two of three classes


def test_the_grid_names_each_row_by_its_class() -> None:
    images, labels = np.zeros((4, 16, 16, 3), dtype=np.uint8), np.array([2, 1, 2, 1])

    def drawn(*names: str) -> np.ndarray:
        return np.asarray(draw_grid(images, labels, names))

    usual = drawn("n", "the longest of all names", "m")
    middle = len(usual) // 2
    assert np.array_equal(drawn("x", "the longest of all names", "m"), usual)  # class 0 is not shown
    other = drawn("n", "the longest of all names", "x")
    assert np.array_equal(other[:middle], usual[:middle]) and not np.array_equal(other[middle:], usual[middle:])


def test_classes_are_found_by_name_then_by_number() -> None:
    assert find_classes(["1", "0"], ["1", "0", "2"]) == [0, 1]
    assert find_classes(["1"], ["ash", "birch"]) == [1]
    assert find_classes(["twin"], ["ash", "twin", "twin"]) == [1]


def test_what_counts_as_drawn_is_on_the_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part goes when its images are flushed; the file gets its name when it is flushed and its record is there; then
    the name is flushed.
    """
    events = watch_disk(monkeypatch)
    config = settings(model, tmp_path / "images.npz")
    sample_images(config)
    unfinished, parts = (
        str(tmp_path / "images.npz.parts" / "unfinished.npz"),
        str(tmp_path / "images.npz.parts" / "batch-"),
    )
    removals = [
        number for number, event in enumerate(events) if event.kind == "remove" and event.path.startswith(parts)
    ]
    arrivals = [
        number for number, event in enumerate(events) if event.kind == "rename" and event.target.startswith(parts)
    ]
    assert len(removals) == len(arrivals) == 2
    for arrived, removed in zip(arrivals, removals, strict=True):
        assert DiskEvent("sync", unfinished) in events[arrived:removed]
    named = events.index(DiskEvent("rename", unfinished, config.out))
    assert DiskEvent("sync", unfinished) in events[removals[-1] : named]
    assert any(event.kind == "rename" and event.target == str(tmp_path / "images.json") for event in events[:named])
    assert DiskEvent("sync", str(tmp_path)) in events[named:]


def test_eight_bit_products_scale_each_row_and_replace_every_matrix(model: Path) -> None:
    transformer = load_model(model).transformer
    with torch.no_grad():
        transformer.output.weight[0] *= 1000  # one row that would swallow all others' resolution
        quantised = with_products(transformer, "int8", 4)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
        exact, got = transformer.output(x), quantised.output(x)
    for columns in (slice(0, 1), slice(1, None)):
        assert (got[:, columns] - exact[:, columns]).norm() < 0.03 * exact[:, columns].norm()
    assert not any(isinstance(module, torch.nn.Linear) for module in quantised.modules())
    assert any(isinstance(module, torch.nn.Linear) for module in transformer.modules())

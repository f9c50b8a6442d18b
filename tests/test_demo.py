"""The demo draws what sampling draws, image by image as they come; the page (where Gradio is installed) has a control
for every setting.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from star_fast.demo import DemoCommand, Painter, page
from star_fast.errors import UserError
from star_fast.generation import generate
from star_fast.generation.render import Renderer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.weights import load_model
from tests.generation.small_model import save_small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    save_small_model(folder)
    return folder


def test_images_come_in_batches_and_are_those_of_sampling(model: Path) -> None:
    painter = Painter(DemoCommand(str(model), device="cpu"), batch_images=2)
    stages = list(painter.draw(1, 5, 1.5, 0.9, 10, 0.95, 7))
    assert [len(stage) for stage in stages] == [2, 4, 5]
    loaded = load_model(model)
    codes = generate(
        loaded.transformer,
        torch.ones(5, dtype=torch.int64),
        guidance=1.5,
        temperature=0.9,
        top_k=10,
        top_p=0.95,
        seed=7,
    )
    images = Renderer(VQTokenizer.load(loaded.tokenizer_folder), torch.device("cpu")).start(codes).wait()
    for picture, image in zip(stages[-1], images, strict=True):
        factor = picture.width // image.shape[1]
        assert picture.width >= 128 and np.array_equal(np.asarray(picture)[::factor, ::factor], image.numpy())


def test_what_can_be_chosen_and_what_cannot(model: Path, tmp_path: Path) -> None:
    painter = Painter(DemoCommand(str(model), device="cpu"))
    names = load_model(model).class_names
    assert painter.labels() == [*((name, number) for number, name in enumerate(names)), ("no class", len(names))]
    painter.class_names = ["crane", "tench", "crane"]
    assert [name for name, _ in painter.labels()] == ["crane (0)", "tench", "crane (2)", "no class"]
    numbers = sum(weight.numel() for weight in painter.model.parameters()) / 1e6
    assert painter.about() == f"3 classes; {numbers:.1f} M parameters, 16 codes an image, 16 × 16 pixels; on cpu"
    for settings, says in (
        ((0, 0, 1, 1, 0, 1, 0), "images"),
        ((0, 1, 0.5, 1, 0, 1, 0), "guidance"),
        ((0, 1, 1, 1, 0, 2, 0), "top_p"),
    ):
        with pytest.raises(UserError, match=says):
            list(painter.draw(*settings))
    with pytest.raises(UserError, match=r"nowhere"):
        Painter(DemoCommand(str(tmp_path / "nowhere"), device="cpu"))


def test_the_page_has_a_control_for_every_setting(model: Path) -> None:
    pytest.importorskip("gradio", minversion="5")
    blocks = page(Painter(DemoCommand(str(model), device="cpu")), "a title")
    labels = {component["props"].get("label") for component in blocks.config["components"]}
    assert {
        "Class",
        "Images",
        "Guidance (1: none)",
        "Temperature (0: likeliest)",
        "Top-k (0: all)",
        "Top-p (1: all)",
        "Seed",
    } <= labels


def test_a_missing_gradio_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"the demo needs Gradio, .*pip install 'star_fast\[demo\]'"):
        page(Painter(DemoCommand(str(model), device="cpu")), "a title")

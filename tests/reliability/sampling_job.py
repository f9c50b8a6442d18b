"""A sampling job of eleven images in three batches: its settings, and its files taken apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from star_fast.generation.sample import sample_images
from star_fast.generation.sample_config import SampleConfig
from tests.generation.small_model import images_of, journal_of, save_small_model

IMAGES, BATCH, IMAGE_BYTES = 11, 4, 16 * 16 * 3
FINISHED = {"images.npz", "images.json", "images.png"}


def settings(model: Path, where: Path, **changes: object) -> SampleConfig:
    return replace(
        SampleConfig(
            model=str(model),
            out=str(where / "images.npz"),
            images=IMAGES,
            batch_images=BATCH,
            precision="fp32",
            top_k=20,
        ),
        **changes,
    )


def first_pixel(npz: Path) -> int:
    return npz.read_bytes().index(images_of(npz)[0].tobytes())


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x20
    file.write_bytes(data)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    """No launcher's environment, however the tests were started."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampling") / "model"
    save_small_model(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed job."""
    folder = tmp_path_factory.mktemp("unbroken")
    sample_images(settings(model, folder))
    return folder


@pytest.fixture
def finished(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    for file in unbroken.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def interrupted(model: Path, unbroken: Path, tmp_path: Path) -> Path:
    """A folder with all batches in the unfinished file, and its journal."""
    (tmp_path / "images.npz.parts").mkdir()
    plan = json.loads((unbroken / "images.json").read_text())["plan"]
    (tmp_path / "images.npz.parts/plan.json").write_text(json.dumps(plan))
    (tmp_path / "images.npz.parts/unfinished.npz").write_bytes((unbroken / "images.npz").read_bytes())
    (tmp_path / "images.npz.parts/unfinished.journal").write_bytes(journal_of(unbroken / "images.npz", BATCH))
    return tmp_path

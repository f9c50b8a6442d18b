"""README's ImageNet commands, as they stand there, on a miniature ImageNet: WordNet folders, a validation set, a
tokenizer file of VQ-16's shape.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from star_fast import cli, train
from star_fast.config import TokenizerConfig
from star_fast.data.codes import CodeStore
from star_fast.model.tokenizer import VQTokenizer
from star_fast.presets import IMAGENET_CODES
from tests.data.pictures import picture

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
BLOCK = re.search(r"## ImageNet, as in the paper\n\n```bash\n(.*?)```", README, re.DOTALL)
LINES = [shlex.split(line, comments=True) for line in re.sub(r"\\\n\s*", "", BLOCK[1]).splitlines()]
WORDS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n02012849": "crane"}
TRAIN, VAL = 3, 1  # images of each class


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands name: IMAGENET/train and val, vq_ds16_c2i.pt; and names for three classes, where ImageNet has a
    thousand.
    """
    where = tmp_path_factory.mktemp("imagenet")
    for number, wnid in enumerate(WORDS):
        for part, count in (("train", TRAIN), ("val", VAL)):
            folder = where / "IMAGENET" / part / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                picture(500 - 20 * i, 375 + 10 * number, 10 * number + i).save(folder / f"{wnid}_{i}.JPEG", quality=92)
    (where / "names.txt").write_text("".join(f"{wnid} {words}\n" for wnid, words in WORDS.items()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(
            {"model": VQTokenizer(TokenizerConfig(base_channels=4, z_channels=16)).state_dict()},
            where / "vq_ds16_c2i.pt",
        )
    return where


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def prepare(out: str, *more: str) -> CodeStore:
    """The first command, with names for three classes, into `out`."""
    words = ["names.txt" if word == "imagenet" else word for word in LINES[0][1:]]
    words[words.index("--out") + 1] = out
    assert cli.main([*words, *more]) == 0
    return CodeStore.open(out)


def test_the_presets_say_the_same_command() -> None:
    assert shlex.join(LINES[0]).replace("data/imagenet", "CODES") == IMAGENET_CODES


def test_all_training_images_are_trained_on_and_val_validates(
    here: Path, one_rank: torch.device, capfd: pytest.CaptureFixture
) -> None:
    store = prepare("data/imagenet")
    assert store.class_names == tuple(WORDS.values()) and (store.image_size, store.positions, store.codebook) == (
        256,
        256,
        16384,
    )
    assert len(store.train_indices) == 3 * TRAIN and len(store.held_out_indices) == 3 * VAL and len(store.views) == 20
    assert [store.keys()[row] for row in store.held_out_indices] == [f"held out/{wnid}/{wnid}_0.JPEG" for wnid in WORDS]
    assert store.manifest["split"]["held_out_share"] == 0
    assert store.views[store.plain_view] == "centre, range 1.1"
    assert LINES[1][:2] == ["deepspeed", "star_fast/train.py"]
    train.run_command(
        [
            *LINES[1][2:],
            "--model.num-classes",
            "3",
            "--model.blocks",
            "2",
            "--model.heads",
            "2",
            "--model.width",
            "32",
            "--method.contrast-depth",
            "1",
            "--method.projector-width",
            "32",
            "--train.images-per-step",
            "4",
            "--train.epochs",
            "2",
            "--train.tensorboard",
            "False",
        ],
        "train.py",
    )
    told = capfd.readouterr().out
    # 9 images, 4 a step: 2 steps and 1 image left over in each of two epochs.
    assert (
        "9 training images x 2 views, steps 0 to 4 of 4 images (2 steps an epoch, 1 images of each epoch left over)"
        in told
    )
    assert "Finished after 4 of 4 steps" in told
    assert LINES[2][0] == "torchrun"
    words = LINES[2][LINES[2].index("star-fast") + 1 :]
    words[words.index("--images") + 1] = "3"
    assert cli.main([*words, "--batch-images", "3"]) == 0
    with np.load("samples.npz") as samples:
        assert samples["arr_0"].shape == (3, 256, 256, 3)


def test_384_pixels(here: Path) -> None:
    store = prepare("data/imagenet-384", "--image-size", "384", "--data.crop-ranges", "1.05")
    assert (store.image_size, store.positions, store.grid, len(store.views)) == (384, 576, (24, 24), 10)
    assert len(store) == 3 * (TRAIN + VAL) and store.manifest["view_settings"]["crop_ranges"] == [1.05]

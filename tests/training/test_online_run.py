"""Training on views that are drawn and encoded while it trains: the batches are the store's but for their codes, and
the run says what they cost.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from star_fast import cli
from star_fast.config import ConfigError, DataConfig, MethodConfig, ModelConfig, RunConfig, TrainConfig
from star_fast.data.codes import CodeStore
from star_fast.data.online import OnlineCodes
from star_fast.data.origin import Origin, images_of, write_origin
from star_fast.data.prepare import prepare
from star_fast.data.sources import ImageFolder
from star_fast.train import TrainCommand, train
from star_fast.training.batches import Batches, resolve
from tests.data.pictures import make_folder, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CodeStore:
    """Ten pictures; two views of each in the store, of which training online needs none."""
    where = tmp_path_factory.mktemp("online")
    folder = make_folder(where / "images", {"oak": 5, "elm": 5})
    made = prepare(
        ImageFolder(folder),
        where / "codes",
        TOKENIZER,
        DataConfig(views="small-affine", affine_views=2, held_out_share=0.2),
        progress=False,
    )
    TOKENIZER.save(made.path / "tokenizer")
    write_origin(made, Origin(str(folder)))
    return made


def run_config(store: CodeStore, views: int = 3, **data: object) -> RunConfig:
    return RunConfig(
        ModelConfig(2, 2, 16),
        MethodConfig(views=views, contrast_positions=2, projector_width=16),
        train=TrainConfig(
            images_per_step=4, max_steps=3, precision="fp32", zero_stage=0, log_every_steps=1, tensorboard=False
        ),
        data=DataConfig(codes=str(store.path), online=True, **data),
    )


def test_only_the_codes_are_other_ones(store: CodeStore) -> None:
    config = resolve(run_config(store), store)
    online = OnlineCodes(store, images_of(store), TOKENIZER, config.data, config.train.seed, torch.device("cpu"))
    batches = Batches(store, config, codes=online)
    for step in (0, 1, 5):
        micro, images = batches.step(step)[0], batches.images_of(step)[0, 0]
        expected = OnlineCodes(store, images_of(store), TOKENIZER, config.data, config.train.seed, torch.device("cpu"))(
            step // 2, images, 3
        )
        assert torch.equal(micro.targets, expected.flatten(0, 1)) and torch.equal(micro.tokens, micro.targets[:, :-1])
        assert set(images.tolist()) <= set(store.train_indices.tolist())
    stored = Batches(
        store,
        resolve(dataclasses.replace(run_config(store), method=MethodConfig(views=2, contrast_positions=2)), store),
    ).step(0)[0]
    two = Batches(store, resolve(run_config(store, views=2), store), codes=online).step(0)[0]
    assert (
        torch.equal(stored.label, two.label)
        and torch.equal(stored.keep, two.keep)
        and not torch.equal(stored.targets, two.targets)
    )
    with pytest.raises(ConfigError, match=r"method\.views: expected at most 2"):
        resolve(dataclasses.replace(run_config(store), data=DataConfig(codes=str(store.path))), store)


def test_a_run(one_rank: torch.device, store: CodeStore, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    train(TrainCommand(run_config(store), run=str(tmp_path / "run")))
    assert "Fresh views took" in capfd.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == 3 and all(
        line["data_s"] >= 0 and line["views_s"] > 0 and line["tokenizer_s"] > 0 for line in trained[:2]
    )
    assert np.isfinite([line["loss"] for line in trained]).all()
    given = [
        "train",
        "--preset",
        "tiny",
        "--data.codes",
        str(store.path),
        "--data.images",
        "x",
        "--run",
        str(tmp_path / "other"),
    ]
    assert cli.main(given) == 2 and "data.images: x has no effect without --data.online True" in capfd.readouterr().err
    again = cli.main(
        [
            "train",
            "--preset",
            "tiny",
            "--data.codes",
            str(store.path),
            "--data.online",
            "True",
            "--data.images",
            str(tmp_path),
            "--run",
            str(tmp_path / "other"),
            "--train.images-per-step",
            "4",
        ]
    )
    assert again == 2 and "no images in class subfolders" in capfd.readouterr().err

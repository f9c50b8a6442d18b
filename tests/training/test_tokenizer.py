"""training.tokenizer: it learns, uses its codebook, repeats itself exactly, and sees no held-out image."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast.config import ConfigError, DataConfig, TokenizerConfig
from star_fast.data.prepare import prepare
from star_fast.data.sources import DataError, ImageFolder, Sample, split_indices
from star_fast.errors import UserError
from star_fast.model.tokenizer import VQTokenizer
from star_fast.storage import StorageError
from star_fast.training.codebook import move_codes
from star_fast.training.tokenizer import tokenizer_for, train_tokenizer, train_tokenizer_on
from star_fast.training.tokenizer_report import measure_tokenizer, reconstruct
from tests.data.pictures import TINY, make_folder, tiny_tokenizer

BLOBS = TokenizerConfig(
    base_channels=8,
    multipliers=(1, 2),
    residual_blocks=1,
    z_channels=8,
    code_channels=4,
    codebook=48,
    image_channels=1,
    image_size=8,
    steps=80,
    images_per_step=16,
    lr=4e-3,
    reseed_every_steps=10,
)


def blobs(count: int, seed: int) -> torch.Tensor:
    """(count, 1, 8, 8) uint8: a bright round spot somewhere on black."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, 1, 1, generator=generator) * 6 + 1
    place = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
    return (255 * torch.exp(-(place - centre).square().sum(1, keepdim=True) / 3)).to(torch.uint8)


def test_learns_and_uses_its_codebook(tmp_path: Path) -> None:
    unseen = blobs(64, 1)
    tokenizer = train_tokenizer(blobs(256, 0), BLOBS, held_out=unseen, out=tmp_path, progress=False)
    report = json.loads((tmp_path / "training.json").read_text())
    untrained = train_tokenizer(blobs(256, 0), replace(BLOBS, steps=1, lr=1e-9), progress=False)
    assert report["psnr_db"] > 20 > measure_tokenizer(untrained, unseen).psnr_db + 5
    assert report["codes_used"] >= 40 and report["codebook"] == 48 and report["measured_on"] == "held-out images"
    assert VQTokenizer.load(tmp_path).weights_hash() == tokenizer.weights_hash() and not tokenizer.training
    # 16 columns and 2 rows of 12 x 12 (8 and a border), enlarged 12 times
    picture = np.asarray(Image.open(tmp_path / "reconstructions.png"))
    assert picture.shape == (2 * 12 * 12, 16 * 12 * 12)
    shown = picture[::12, ::12].reshape(2, 12, 16, 12)[:, 2:-2, :, 2:-2].transpose(0, 2, 1, 3)
    assert np.array_equal(shown[0], unseen[::4, 0].numpy()) and np.array_equal(
        shown[1], reconstruct(tokenizer, unseen[::4])[0][:, 0].numpy()
    )


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    short = replace(BLOBS, steps=12, reseed_every_steps=4)
    torch.manual_seed(1)
    first = train_tokenizer(blobs(64, 0), short, seed=3, progress=False).weights_hash()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    assert train_tokenizer(blobs(64, 0), short, seed=3, progress=False).weights_hash() == first
    assert train_tokenizer(blobs(64, 0), short, seed=4, progress=False).weights_hash() != first


def test_measure_against_arithmetic_by_hand() -> None:
    tokenizer, images = VQTokenizer(BLOBS).eval(), blobs(5, 2)
    made, codes = reconstruct(tokenizer, images)
    error = np.mean((made.numpy().astype(float) - images.numpy()) ** 2)
    share = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    report = measure_tokenizer(tokenizer, images)
    assert report.psnr_db == pytest.approx(20 * np.log10(255) - 10 * np.log10(error), abs=1e-3)
    assert report.codes_used == len(share) and report.perplexity == pytest.approx(
        np.exp(-(share * np.log(share)).sum()), abs=1e-2
    )


def test_moved_codes_land_on_the_latents_served_worst() -> None:
    codebook = torch.nn.Parameter(torch.eye(4)[[0, 0, 1, 1, 0]])
    optimizer = torch.optim.AdamW([codebook], lr=0.1, weight_decay=0.0)
    (codebook * codebook.detach()).sum().backward()  # lengthens every entry along itself
    optimizer.step()
    kept = codebook.detach()[[0, 2]].clone()
    latents = torch.eye(4)[[0] * 500 + [2] + [1] * 500 + [3] + [0] * 500]  # a thousand served well, two not at all
    move_codes(
        codebook, torch.tensor([False, True, False, True, False]), latents, torch.Generator().manual_seed(0), optimizer
    )
    assert sorted(codebook.detach()[[1, 3]].tolist()) == [[0, 0, 0, 1], [0, 0, 1, 0]]
    assert torch.equal(codebook.detach()[[0, 2]], kept)
    moments = optimizer.state[codebook]["exp_avg"].abs().sum(1)
    assert moments[[1, 3]].tolist() == [0, 0] and (moments[[0, 2, 4]] > 0).all()


def test_no_held_out_image_is_opened_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    class Watched(ImageFolder):
        def __getitem__(self, index: int) -> Sample:
            opened.append(index)
            return super().__getitem__(index)

    source = Watched(make_folder(tmp_path / "images", {"a": 6, "b": 4}))
    data = DataConfig(crop_ranges=(1.2,), held_out_share=0.3)
    train, held_out = split_indices(source.labels, 0.3)
    given: dict[str, torch.Tensor] = {}

    def record(images: torch.Tensor, config: TokenizerConfig, *, held_out: torch.Tensor, **_: object) -> None:
        given.update(train=images, held_out=held_out)

    monkeypatch.setattr("star_fast.training.tokenizer.train_tokenizer", record)
    train_tokenizer_on(source, TINY, data, out=tmp_path / "tokenizer", progress=False)
    assert opened == [*train, *held_out] and len(held_out) == 3
    assert given["train"].shape == (70, 3, 16, 16) and given["held_out"].shape == (3, 3, 16, 16)


def test_bad_images_say_what_came() -> None:
    for bad in (
        torch.zeros(2, 1, 9, 8, dtype=torch.uint8),
        torch.zeros(2, 1, 8, 8),
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
    ):
        with pytest.raises(ConfigError, match=r"images must be uint8 \(N >= 1, 1, 8, 8\)"):
            train_tokenizer(bad, BLOBS, progress=False)


def test_sizes_that_no_machine_holds() -> None:
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    for changes, message in (
        (
            {"base_channels": 4096, "multipliers": (64, 64)},
            r"^tokenizer\.base_channels: training [\d,]+ weights .* GiB",
        ),
        ({"lr": 1e308}, r"^tokenizer\.lr: expected at most 1e\+30"),
        ({"images_per_step": 2**20}, r"^tokenizer\.images_per_step: expected at most 262144 images of 64 codes"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_tokenizer(images, replace(TINY, **changes), progress=False)


ONE_STEP = replace(TINY, steps=1, images_per_step=4)
FEW = DataConfig(crop_ranges=(1.2,), held_out_share=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), {"a": 3, "b": 2})


def choose(
    folder: Path, out: Path, config: TokenizerConfig = ONE_STEP, data: DataConfig = FEW, **more: object
) -> VQTokenizer:
    return tokenizer_for(ImageFolder(folder), out, config, data, progress=False, **more)  # type: ignore[arg-type]


def test_a_kept_tokenizer_is_used_for_the_same_settings_only(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = choose(folder, tmp_path).weights_hash()
    (tmp_path / "tokenizer" / "unfinished.json").write_text("{}")  # a kill just before it would have been removed
    monkeypatch.setattr("star_fast.training.tokenizer.train_tokenizer_on", None)
    assert choose(folder, tmp_path).weights_hash() == first
    assert not (tmp_path / "tokenizer" / "unfinished.json").exists()
    with pytest.raises(
        ConfigError,
        match=r"^tokenizer\.steps: .*tokenizer holds a tokenizer with 1, asked for is 2; give the same, or choose "
        r"another --out",
    ):
        choose(folder, tmp_path, replace(ONE_STEP, steps=2))
    with pytest.raises(ConfigError, match=r"^seed: .* trained with 0, asked for is 7"):
        choose(folder, tmp_path, seed=7)
    # It has learnt from what is now held out
    with pytest.raises(UserError, match=r"other images, views or split \(held_out_share: 0\.3 there, 0\.0 here\)"):
        choose(folder, tmp_path, data=replace(FEW, held_out_share=0.0))
    with pytest.raises(UserError, match=r"view_settings\.crop_ranges: \[1\.2\] there, \[1\.5\] here"):
        choose(folder, tmp_path, data=replace(FEW, crop_ranges=(1.5,)))


def test_a_tokenizer_folder_of_an_earlier_version_is_used(tmp_path: Path, folder: Path) -> None:
    first = choose(folder, tmp_path).weights_hash()
    path = tmp_path / "tokenizer" / "training.json"
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "trained_on"})
    )
    assert choose(folder, tmp_path, data=replace(FEW, crop_ranges=(1.5,))).weights_hash() == first
    path.unlink()  # a tokenizer that was given
    assert choose(folder, tmp_path, replace(ONE_STEP, steps=600), asked=False).weights_hash() == first
    with pytest.raises(ConfigError, match=r"^tokenizer\.steps"):
        choose(folder, tmp_path, replace(ONE_STEP, steps=600))
    path.write_text('{"psnr_db": []}')
    with pytest.raises(StorageError, match=r"training\.json: .*choose another --out, or delete"):
        choose(folder, tmp_path)


def test_a_given_tokenizer_never_takes_anothers_place(tmp_path: Path, folder: Path) -> None:
    given, other, out = tmp_path / "given", tmp_path / "other", tmp_path / "out"
    tiny_tokenizer(1).save(given)
    tiny_tokenizer(2).save(other)
    ours = tiny_tokenizer(1).weights_hash()
    assert (
        choose(folder, out, given=str(given)).weights_hash()
        == VQTokenizer.load(out / "tokenizer").weights_hash()
        == ours
    )
    files = {path.name: path.read_bytes() for path in (out / "tokenizer").iterdir()}

    def refused() -> None:
        with pytest.raises(
            ConfigError,
            match=rf"^tokenizer: .*other is {tiny_tokenizer(2).weights_hash()[:12]}, .*{ours[:12]}; give that one",
        ):
            choose(folder, out, given=str(other))
        assert {path.name: path.read_bytes() for path in (out / "tokenizer").iterdir()} == files

    refused()
    prepare(ImageFolder(folder), out, choose(folder, out, given=str(given)), FEW, progress=False)
    refused()
    (out / "tokenizer" / "tokenizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"tokenizer\.safetensors"):
        choose(folder, out, asked=False)
    choose(folder, out, given=str(given))  # puts it back
    refused()
    tiny_tokenizer(2).save(out / "tokenizer")
    with pytest.raises(StorageError, match=rf"not the tokenizer {ours[:12]} that the codes in .* were made with"):
        choose(folder, out, asked=False)
    (out / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(
        StorageError, match=rf"tokenizer\.json: not found, and the codes in .* need the tokenizer {ours[:12]}"
    ):
        choose(folder, out)
    rounded = tiny_tokenizer(1).bfloat16()
    rounded.save(tmp_path / "rounded")
    with pytest.raises((DataError, StorageError), match=r"float32|hash"):
        choose(folder, tmp_path / "fresh", given=str(tmp_path / "rounded"))
    assert not (tmp_path / "fresh" / "tokenizer").exists()
    (tmp_path / "begun" / "tokenizer").mkdir(parents=True)
    (tmp_path / "begun" / "tokenizer" / "unfinished.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^tokenizer: .* holds an unfinished training"):
        choose(folder, tmp_path / "begun", given=str(given))

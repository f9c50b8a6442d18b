"""The jobs that kill_and_resume.py kills and that make something: codes, a model, images."""

from __future__ import annotations

from pathlib import Path


def prepare_sampling(given: Path) -> None:
    """A model so small that start-up takes most of a run."""
    from tests.generation.small_model import save_small_model

    save_small_model(given / "model")


def run_sampling(given: Path, work: Path, small: bool) -> None:
    """Images in batches, the last one short, with a grid; the small job writes single pictures too."""
    from star_fast.generation.sample import sample_images
    from star_fast.generation.sample_config import SampleConfig

    images, batch = (5, 2) if small else (300, 16)
    sample_images(
        SampleConfig(
            model=str(given / "model"),
            out=str(work / "images.npz"),
            images=images,
            batch_images=batch,
            precision="fp32",
            top_k=20,
            png_folder=small,
        )
    )


def prepare_training(given: Path) -> None:
    """A small code store."""
    from tests.training.store import write_store

    write_store(given / "codes")


def run_training(given: Path, work: Path, small: bool) -> None:
    """A few steps in bf16 under ZeRO-1, with dropout, checkpoints, validation and export."""
    from star_fast.train import run_command
    from star_fast.training import checkpoint
    from tests.reliability.training_job import SMALL

    steps, every = (4, "2") if small else (90, "3")
    resume = ["--resume"] if checkpoint.latest(work / "run") is not None else []
    run_command(
        [
            *SMALL,
            "--data.codes",
            str(given / "codes"),
            "--run",
            str(work / "run"),
            "--train.max-steps",
            str(steps),
            "--train.save-every-steps",
            every,
            "--train.validate-every-steps",
            every,
            "--train.zero-stage",
            "1",
            "--train.precision",
            "bf16",
            "--model.dropout",
            "0.1",
            *resume,
        ],
        "train.py",
    )


def prepare_preparing(given: Path) -> None:
    """A folder of small pictures, one of them damaged."""
    from tests.data.pictures import make_folder

    folder = make_folder(given / "images", {"elm": 30, "oak": 31}, ".jpg")
    (folder / "oak" / "02.jpg").write_bytes(b"no picture")


def run_preparing(given: Path, work: Path, small: bool) -> None:
    """A tokenizer trained on them, then their codes."""
    from star_fast import cli

    cli.prepare(
        [
            str(given / "images"),
            "--out",
            str(work / "codes"),
            "--new-tokenizer.image-size",
            "16",
            "--new-tokenizer.base-channels",
            "8",
            "--new-tokenizer.multipliers",
            "1",
            "1",
            "--new-tokenizer.z-channels",
            "8",
            "--new-tokenizer.codebook",
            "16",
            "--new-tokenizer.images-per-step",
            "8",
            "--new-tokenizer.steps",
            "6" if small else "300",
        ]
    )


def prepare_encoding(given: Path) -> None:
    """A folder of small pictures, one of them damaged, and a tokenizer."""
    from tests.data.pictures import tiny_tokenizer

    prepare_preparing(given)
    tiny_tokenizer().save(given / "tokenizer")


def run_encoding(given: Path, work: Path, small: bool) -> None:
    """The codes of pictures under a tokenizer that is there, on any number of ranks: at two crop ranges, or (small) few
    of them.
    """
    from star_fast.config import DataConfig
    from star_fast.data import prepare as module
    from star_fast.data.sources import ImageFolder
    from star_fast.generation.device import rank_and_ranks
    from star_fast.model.tokenizer import VQTokenizer

    rank, ranks = rank_and_ranks()
    data = DataConfig(crop_ranges=(1.3,) if small else (1.3, 1.1))
    module.prepare(
        ImageFolder(given / "images"),
        work / "codes",
        VQTokenizer.load(given / "tokenizer"),
        data,
        chunk_images=16 if small else 1,
        batch_views=10,
        rank=rank,
        ranks=ranks,
    )

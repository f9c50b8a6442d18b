"""The good files that inputs are made of: a data set, a code store, a trained run, samples, all tiny, all written by
the package itself. To be made in a process of their own: training leaves a process group behind.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from scripts.fuzzing import small_network
from scripts.fuzzing.payloads import CANARY_MODULE
from star_fast import cli, train
from star_fast.config import DataConfig, ModelConfig, TokenizerConfig
from star_fast.data import prepare as preparing
from star_fast.data.origin import Origin, write_origin
from star_fast.data.prepare import collect_views, prepare
from star_fast.data.sources import ImageFolder, Sample, split_indices
from star_fast.errors import UserError
from star_fast.generation.npz_stream import NpzStream
from star_fast.generation.sample import sample_images
from star_fast.generation.sample_config import SampleConfig
from star_fast.model.llamagen import save_transformer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.training import tokenizer_training
from star_fast.training.tokenizer import tokenizer_for
from star_fast.training.tokenizer_state import save_state

CLASSES = ("ash", "bär", "7")
TOKENIZER = TokenizerConfig(
    base_channels=4,
    multipliers=(1, 2),
    residual_blocks=1,
    z_channels=4,
    code_channels=4,
    codebook=16,
    image_channels=3,
    image_size=8,
)
TRAINED = replace(TOKENIZER, steps=3, images_per_step=4)  # of a tokenizer that is trained, not only drawn at random
DATA = DataConfig(views="small-affine", affine_views=2, held_out_share=0.3)
TRAIN = (
    "--model.blocks",
    "2",
    "--model.heads",
    "2",
    "--model.width",
    "8",
    "--method.projector-width",
    "8",
    "--method.contrast-positions",
    "2",
    "--train.images-per-step",
    "4",
    "--train.max-steps",
    "3",
    "--train.log-every-steps",
    "1",
    "--train.validate-every-steps",
    "2",
    "--train.tensorboard",
    "False",
    "--train.precision",
    "fp32",
    "--train.zero-stage",
    "1",
)
# As in the goods' folder
SAMPLES = SampleConfig(
    model="run/model", out="samples/done.npz", images=8, batch_images=2, precision="fp32", grid=False
)
PART = replace(SAMPLES, out="sampling/part.npz")  # the interrupted one
HASH = "0" * 64
LAST_FILE = f"{CANARY_MODULE}.py"  # of the good files: where it is, all are


class Stopped(Exception):
    """Ends a job in the middle, to leave behind what an interrupted one does."""


class _Stopping:
    """An image source that stops the job after some images."""

    def __init__(self, source: ImageFolder, after: int) -> None:
        self.source, self.after = source, after

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if index >= self.after:
            raise Stopped
        return self.source[index]


def make(root: Path) -> None:
    """Write all of it below `root`; paths inside the files are relative to it."""
    os.chdir(root)
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        Path("images", name).mkdir(parents=True)
        for index in range(8):
            pixels = random.integers(0, 60, (10, 9, 3), dtype=np.uint8)
            pixels[2 * label : 2 * label + 3] += 150
            Image.fromarray(pixels).save(f"images/{name}/{index}.png")
    Path("images/ash/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TOKENIZER).eval()
    source = ImageFolder("images")
    store = prepare(source, "store", tokenizer, DATA, progress=False)
    tokenizer.save("store/tokenizer")
    with contextlib.suppress(Stopped):
        prepare(_Stopping(source, 12), "unfinished", tokenizer, DATA, chunk_images=4, progress=False)
    # Rank 0 never comes: rank 1's chunks wait in files of their own
    with mock.patch.object(preparing, "_PATIENCE_S", 0.0), contextlib.suppress(UserError):
        prepare(source, "unfinished", tokenizer, DATA, chunk_images=4, rank=1, ranks=2, progress=False)
    write_origin(store, Origin("images"))
    _tokenizers(source)
    train.run_command(["--data.codes", "store", "--run", "run", *TRAIN], "train.py")
    done = cli.main(
        [
            "report",
            "--run",
            "run",
            "--source",
            "images",
            "--samples-per-class",
            "2",
            "--attention-images",
            "1",
            "--classifier.epochs",
            "2",
        ]
    )
    assert done == 0
    _samples()
    with np.load(SAMPLES.out) as samples:
        small_network.make_measured(samples["arr_0"])
    small_network.make_gallery(Path("images/ash/0.png"), Path("gallery/a"), 5)
    assert (
        cli.main(
            [
                "probe",
                "--run",
                "run",
                "--points",
                "2",
                "--epochs",
                "1",
                "--warmup-epochs",
                "0",
                "--features",
                "kept",
                "--keep-features",
            ]
        )
        == 0
    )
    _released(tokenizer, store.codebook)
    _sources()
    Path("few/one").mkdir(parents=True)
    for index in range(2):
        shutil.copy(f"images/ash/{index}.png", f"few/one/{index}.png")
    for folder in ("odd/folder", "out"):
        Path(folder).mkdir(parents=True)
    for name, content in (("empty", b""), ("noise.pt", random.bytes(500)), ("noise.npz", random.bytes(500))):
        Path("odd", name).write_bytes(content)
    Path(LAST_FILE).write_text("import os\nos.mkdir(os.environ['FUZZ_CANARIES'] + '/imported')\n")


def _tokenizers(source: ImageFolder) -> None:
    """A trained tokenizer with its record, and one whose training was interrupted after two of three steps."""
    tokenizer_for(source, "trained", TRAINED, DATA, progress=False)
    images = collect_views(source, split_indices(source.labels, DATA.held_out_share)[0], DATA, TRAINED, progress=False)

    def save_and_stop(*arguments: Any) -> None:
        save_state(*arguments)
        raise Stopped

    with mock.patch.object(tokenizer_training, "save_state", save_and_stop), contextlib.suppress(Stopped):
        tokenizer_training.train_tokenizer(images, TRAINED, out="halfway/tokenizer", save_every_steps=2, progress=False)


def _samples() -> None:
    """A finished job, and one that was interrupted: a rank has delivered its batches, the other has put one into the
    file.
    """
    sample_images(SAMPLES)
    append = NpzStream.append
    os.environ.update(RANK="1", WORLD_SIZE="2")
    sample_images(PART)
    os.environ.update(RANK="0")
    appended = []

    def stop(stream: NpzStream, images: np.ndarray) -> None:
        if len(appended) == 2:
            raise Stopped
        appended.append(append(stream, images))

    with mock.patch.object(NpzStream, "append", stop), contextlib.suppress(Stopped):
        sample_images(PART)
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]


def _released(tokenizer: VQTokenizer, codebook: int) -> None:
    """Files in LlamaGen's layouts."""
    Path("released").mkdir()
    model = Transformer(ModelConfig(blocks=2, heads=2, width=8, vocab=codebook, positions=16, num_classes=3))
    model.init_weights(torch.Generator().manual_seed(0))
    for suffix in ("pt", "safetensors"):
        save_transformer(model, f"released/model.{suffix}")
    torch.save({"model": tokenizer.state_dict()}, "released/tokenizer.pt")
    shutil.copy("store/tokenizer/tokenizer.safetensors", "released/tokenizer.safetensors")
    random = np.random.default_rng(0)
    for folder, shape in (
        ("llamagen/imagenet8_codes", (1, 2, 16)),
        ("llamagen/imagenet8_labels", (1,)),
        ("llamagen_105/imagenet8_codes", (1, 2, 16)),
    ):
        Path(folder).mkdir(parents=True)
        for index in range(4):
            np.save(f"{folder}/{index}.npy", random.integers(0, 3, shape))
    shutil.copytree("llamagen/imagenet8_labels", "llamagen_105/imagenet8_labels")


def _sources() -> None:
    """Images with a list of labels, images in a tar file, and names for the classes."""
    for folder in ("listed", "shards", "names"):
        Path(folder).mkdir()
    with tarfile.open("shards/a.tar", "w") as tar, open("listed/labels.csv", "w") as table:
        table.write("file,label,size\n")
        for label, name in enumerate(CLASSES):
            for index in range(3):
                picture, key = f"images/{name}/{index}.png", f"{name}-{index}"
                shutil.copy(picture, f"listed/{key}.png")
                table.write(f"{key}.png,{name},{index}\n")
                tar.add(picture, f"{key}.png")
                ending, content = (
                    ("cls", b"%d" % label),
                    ("json", b'{"label": "%s"}' % name.encode()),
                    ("txt", name.encode()),
                )[index]
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    Path("names/mapping.txt").write_text("".join(f"{name} the {name}, once more\n" for name in CLASSES))
    Path("names/list.txt").write_text("".join(f"class of {name}\n" for name in CLASSES))

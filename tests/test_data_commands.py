"""`star-fast prepare` and `star-fast data` as a user meets them: sources of each kind, held-out images from elsewhere,
ranks, and what there is to see.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast import cli
from star_fast.config import DataConfig
from star_fast.data.codes import CodeStore
from star_fast.data.views import make_views
from star_fast.model.tokenizer import VQTokenizer, from_uint8, to_uint8
from tests.data.pictures import make_folder, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of two classes, the same training images flat with a list and in a tar file, and a tokenizer."""
    where = tmp_path_factory.mktemp("place")
    train, _ = make_folder(where / "train", {"elm": 4, "oak": 3}), make_folder(where / "val", {"oak": 2})
    (where / "flat").mkdir()
    lines = []
    with tarfile.open(where / "shard.tar", "w") as shard:
        for file in sorted(train.rglob("*.png")):
            name = f"{file.parent.name}-{file.name}"
            (where / "flat" / name).write_bytes(file.read_bytes())
            lines.append(f"{name},{file.parent.name}\n")
            (where / "x.cls").write_text(file.parent.name)
            shard.add(file, f"{file.parent.name}{file.name}")
            shard.add(where / "x.cls", f"{file.parent.name}{file.stem}.cls")
    (where / "labels.csv").write_text("file,class\n" + "".join(lines))
    (where / "names.txt").write_text("elm Ulmus\noak Quercus\n")
    tiny_tokenizer().save(where / "tokenizer")
    return where


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def prepared(out: str, *arguments: str) -> CodeStore:
    if not Path(out).exists():
        assert cli.main(["prepare", *arguments, "--tokenizer", "tokenizer", "--out", out]) == 0
    return CodeStore.open(out)


@pytest.fixture
def store(here: Path) -> CodeStore:
    return prepared("codes", "train", "--held-out-source", "val", "--class-names", "names.txt")


def one_line(capfd: pytest.CaptureFixture) -> str:
    error = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert len(error) == 1, error
    return error[0]


def test_every_kind_of_source_gives_the_same_codes(here: Path) -> None:
    stores = [
        prepared("from-folder", "train"),
        prepared("from-list", "flat", "--labels", "labels.csv"),
        prepared("from-tar", "shard.tar"),
    ]
    for store in stores:
        assert store.class_names == ("elm", "oak") and store.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
        assert (store.path / "codes.bin").read_bytes() == (stores[0].path / "codes.bin").read_bytes()


def test_held_out_images_from_elsewhere(store: CodeStore, capfd: pytest.CaptureFixture) -> None:
    assert store.class_names == ("Ulmus", "Quercus") and store.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert store.train_indices.tolist() == list(range(7)) and store.held_out_indices.tolist() == [7, 8]
    assert (
        store.keys()[7:] == ["held out/oak/00.png", "held out/oak/01.png"]
        and store.manifest["split"]["held_out_share"] == 0
    )
    wrong = [
        "prepare",
        "train",
        "--held-out-source",
        "val",
        "--data.held-out-share",
        "0.2",
        "--tokenizer",
        "tokenizer",
        "--out",
        "other",
    ]
    assert cli.main(wrong) == 2
    assert "--data.held-out-share: has no effect with --held-out-source" in one_line(capfd)
    assert cli.main(["prepare", "val", "--held-out-source", "train", "--tokenizer", "tokenizer", "--out", "other"]) == 2
    assert "held-out source: its class 'elm' is none of the 1 classes" in one_line(capfd)


def test_another_size_for_a_tokenizer(here: Path, capfd: pytest.CaptureFixture) -> None:
    store = prepared("larger", "train", "--image-size", "24")
    assert (store.image_size, store.grid) == (24, (12, 12)) and VQTokenizer.load(
        store.path / "tokenizer"
    ).config.image_size == 24
    assert cli.main(["prepare", "train", "--image-size", "25", "--tokenizer", "tokenizer", "--out", "x"]) == 2
    assert "--image-size: expected a multiple of the downsampling 2, got 25" in one_line(capfd)
    assert cli.main(["prepare", "train", "--image-size", "32", "--new-tokenizer.image-size", "48", "--out", "x"]) == 2
    assert "--image-size: 32 contradicts --new-tokenizer.image-size 48" in one_line(capfd)


def test_ranks_by_a_launcher(here: Path, capfd: pytest.CaptureFixture) -> None:
    torchrun, star_fast = (str(Path(sys.executable).with_name(name)) for name in ("torchrun", "star-fast"))
    done = subprocess.run(
        [
            torchrun,
            "--nproc-per-node",
            "2",
            "--no-python",
            "--",
            star_fast,
            "prepare",
            "train",
            "--tokenizer",
            "tokenizer",
            "--out",
            "by-ranks",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "by-ranks: codes of 7 images x 10 views, 64 a view, 2 classes, 2 images held out"
    ]
    alone = prepared("from-folder", "train")
    for name in ("codes.bin", "labels.bin", "keys.jsonl", "skipped.csv", "manifest.json", "source.json"):
        assert (here / "by-ranks" / name).read_bytes() == (alone.path / name).read_bytes(), name


def test_ranks_need_a_tokenizer(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["prepare", "train", "--out", "none"]) == 2
    assert (
        "several ranks encode with a tokenizer that is there; give --tokenizer, or run the command once without "
        "the launcher" in one_line(capfd)
    )


def test_info_tells_what_the_manifest_knows(store: CodeStore, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["data", "info", "codes"]) == 0
    told = capsys.readouterr().out
    for part in (
        "9 (7 train, 2 held out, 0 skipped)",
        "of 4 to 5 images: Ulmus; Quercus",
        "10: top left; top right",
        "64 a view (8 x 8), of a codebook of 300",
        "crop ranges [1.1]",
        "Pillow",
        f"sha256 {store.tokenizer_hash}",
        store.manifest["files"]["codes.bin"]["sha256"],
    ):
        assert part in told, part


def test_verify_finds_a_flipped_bit_and_a_cut_file(
    store: CodeStore, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert cli.main(["data", "verify", "codes"]) == 0
    assert capfd.readouterr().out == "codes: whole; 9 images and 0 skipped ones, every checksum and every code right\n"
    for name in ("codes.bin", "labels.bin", "keys.jsonl", "skipped.csv"):
        whole = (store.path / name).read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 4]), whole[:-1]):
            (store.path / name).write_bytes(damaged)
            assert cli.main(["data", "verify", "codes"]) == 2
            assert name in one_line(capfd)
        (store.path / name).write_bytes(whole)
    assert cli.main(["data", "verify", "codes"]) == 0


def test_show_draws_images_beside_what_their_codes_decode_to(
    store: CodeStore, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "show.png"
    assert (
        cli.main(
            [
                "data",
                "show",
                "codes",
                "--rows",
                "1",
                "8",
                "--views",
                "mirrored top left",
                "--out",
                str(out),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert "2 images x 1 views, PSNR" in capfd.readouterr().out
    picture = np.asarray(Image.open(out)).reshape(-1, 3)
    tokenizer = tiny_tokenizer()
    view = store.views.index("mirrored top left")
    square = np.asarray(Image.open(Path("train/elm/01.png")))
    drawn = {tuple(pixel) for pixel in picture.tolist()}
    made = to_uint8(tokenizer.decode(store.codes([1], [view])[0]))[0].permute(1, 2, 0).reshape(-1, 3)
    assert {tuple(pixel) for pixel in made.tolist()} <= drawn  # every colour of the reconstruction is in the picture
    real = make_views(Image.fromarray(square), 1, DataConfig(), 16, 3, only=view)
    assert {tuple(pixel) for pixel in real.transpose(1, 2, 0).reshape(-1, 3).tolist()} <= drawn
    codes = tokenizer.encode(from_uint8(torch.from_numpy(real[None])))
    assert codes[0].tolist() == store.codes([1], [view])[0, 0].tolist()
    for wrong, says in (
        (["--rows", "9"], "rows: expected rows of codes, 0 ... 8, got 9"),
        (["--views", "no"], "has no view 'no'; it has top left"),
        (["--source", "val"], "not the images that codes was made of"),
    ):
        assert cli.main(["data", "show", "codes", "--out", str(out), *wrong]) == 2
        assert says in one_line(capfd)


def test_llamagen_codes_in_and_out(store: CodeStore, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    root = tmp_path / "npy_ten_crop"
    assert cli.main(["data", "export", "codes", "--out", str(root)]) == 0
    assert np.array_equal(np.load(root / "imagenet16_codes/8.npy")[0], store.codes([8], range(10))[0].numpy())
    assert np.load(root / "imagenet16_labels/8.npy").tolist() == [1]
    back = [
        "data",
        "import",
        str(root),
        "--out",
        str(tmp_path / "back"),
        "--tokenizer",
        "tokenizer",
        "--image-size",
        "16",
    ]
    (tmp_path / "plain.txt").write_text("elm\noak\n")
    assert cli.main([*back, "--class-names", str(tmp_path / "plain.txt")]) == 0
    again = CodeStore.open(tmp_path / "back")
    assert (
        again.class_names == ("elm", "oak")
        and (again.path / "codes.bin").read_bytes() == (store.path / "codes.bin").read_bytes()
    )
    assert cli.main(["data", "show", str(again.path)]) == 0
    assert "decoded from their codes; the images themselves are not known: give --source" in capfd.readouterr().out


def test_an_unknown_data_command(capfd: pytest.CaptureFixture) -> None:
    assert cli.main(["data", "fly"]) == 2
    assert "data: expected one of info, verify, show, import, export, got 'fly'" in one_line(capfd)
    assert cli.main(["data"]) == 2
    assert "got nothing" in one_line(capfd)
    assert cli.main(["data", "--help"]) == 0


def test_no_image_held_out(here: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """All images train; probe and report judge on a tenth of them and say so."""
    store = prepared("all", "train", "--data.held-out-share", "0")
    assert len(store.held_out_indices) == 0 and len(store.train_indices) == 7
    learn, judge, judged_on = store.judging()
    assert (
        sorted([*learn.tolist(), *judge.tolist()]) == list(range(7))
        and len(judge) == 2
        and "the model has seen" in judged_on
    )
    run = tmp_path / "run"
    assert (
        cli.main(
            [
                "train",
                "--preset",
                "tiny",
                "--data.codes",
                "all",
                "--run",
                str(run),
                "--model.width",
                "32",
                "--model.blocks",
                "2",
                "--train.images-per-step",
                "4",
                "--train.max-steps",
                "2",
                "--train.tensorboard",
                "False",
            ]
        )
        == 0
    )
    assert not any("val_ar" in line for line in (run / "metrics.jsonl").read_text().splitlines())
    assert cli.main(["probe", "--run", str(run), "--epochs", "11"]) == 0
    assert (
        "% of 2 training images that the model has seen, since none are held out, learnt from 5"
        in capfd.readouterr().out
    )
    assert (
        cli.main(
            [
                "report",
                "--run",
                str(run),
                "--samples-per-class",
                "2",
                "--attention-images",
                "1",
                "--classifier.epochs",
                "1",
            ]
        )
        == 0
    )
    assert (
        "No image was held out. What this page calls held-out are training images that the model has seen"
        in (run / "report.html").read_text()
    )
    assert json.loads((run / "report.json").read_text())["trained"]["judged_on"].startswith("training images")

"""`star-fast evaluate` on what is odd, not as published, not to be measured: warnings, departures, one clear line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from star_fast.evaluation.inception import WEIGHTS_SHA256
from star_fast.evaluation.protocols import departures
from tests.evaluation.few_features import WIDTHS, FewFeatures, measured, pictures, run, write_adm_reference
from tests.evaluation.few_features import few_features as few_features  # a fixture


def test_odd_samples_are_warned_about(few_features: FewFeatures, tmp_path: Path) -> None:
    write_adm_reference(tmp_path / "ref.npz", pictures(9, seed=5), pictures(30, seed=5))

    def warnings(images: np.ndarray, **more: np.ndarray) -> str:
        np.savez(tmp_path / "samples.npz", images, **more)
        told = measured(samples=tmp_path / "samples.npz", reference=tmp_path / "ref.npz", out=tmp_path / "m.json")[
            "warnings"
        ]
        assert all(f"warning: {line}\n" in (tmp_path / "m.txt").read_text() for line in told)
        return "\n".join(told)

    good = pictures(20, seed=6)
    assert warnings(good, arr_1=np.arange(20) % 3).splitlines() == [
        "20 samples, published figures use 50,000: FID and sFID come out higher with fewer; compare equal counts only"
    ]
    assert "labels are not balanced: between 4 and 16 images a class, 2 classes" in warnings(
        good, arr_1=(np.arange(20) < 16).astype(np.int64)
    )
    assert "3 images are copies of others" in warnings(np.concatenate([good, good[:2], good[:1]]))
    assert "all values lie in 0 ... 1" in warnings(good // 128)
    assert "all values lie in 0 ... 15" in warnings(good // 17)
    constant = good.copy()
    constant[3], constant[7] = 9, 200
    assert "2 images are of a single colour" in warnings(constant)


def test_departures_from_a_known_protocol_are_all_listed(few_features: FewFeatures, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", pictures(20))
    write_adm_reference(tmp_path / "VIRTUAL_imagenet256_labeled.npz", pictures(9, seed=5), pictures(30, seed=5))
    options = {
        "samples": tmp_path / "samples.npz",
        "reference": tmp_path / "VIRTUAL_imagenet256_labeled.npz",
        "out": tmp_path / "m.json",
        "protocol": "adm-imagenet-256",
    }
    found = measured("--adm-half", neighbours=4, **options)
    named = {line.split(":")[0]: line for line in found["compared_with"]["differs"]}
    assert set(named) == {
        "sample images",
        "sample pixels",
        "reference images for precision and recall",
        "reference features for precision and recall",
        "Inception network",
        "resize to Inception",
        "neighbours",
        "matrix square root",
    }
    assert named["neighbours"] == "neighbours: 4 here, 3 in adm-imagenet-256"
    assert "  neighbours: 4 here, 3 in adm-imagenet-256\n" in (tmp_path / "m.txt").read_text()
    assert found["protocol"]["method"]["distances"] == "float16"
    assert "distances of precision and recall" in {
        line.split(":")[0] for line in measured(**options)["compared_with"]["differs"]
    }
    as_published = {
        "samples": {"images": 50_000, "width": 256, "height": 256, "skipped": [], "jpeg_images": 0},
        "reference": {
            "file": "VIRTUAL_imagenet256_labeled.npz",
            "statistics": "stored",
            "precision_images": 10_000,
            "precision_from": "images of 256 x 256 pixels",
        },
        "inception": {
            "weights_sha256": WEIGHTS_SHA256,
            "network": "TensorFlow graph of 2015-12-05",
            "resize": "TensorFlow 1 bilinear to 299 x 299",
        },
        "method": {
            "distances": "float16",
            "neighbours": 3,
            "split_images": 5000,
            "matrix_root": "scipy sqrtm, 1e-6 on the diagonals where it fails",
        },
    }
    assert departures(as_published, "adm-imagenet-256") == []


def test_what_cannot_be_measured_says_so_in_one_line(
    few_features: FewFeatures, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = pictures(20)
    np.savez(tmp_path / "good.npz", good)
    write_adm_reference(tmp_path / "ref.npz", pictures(9, seed=5), pictures(30, seed=5))
    np.savez(tmp_path / "floats.npz", good / 255)
    np.savez(tmp_path / "gray.npz", good[..., 0])
    np.savez(tmp_path / "objects.npz", np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "named.npz", images=good)
    np.savez(tmp_path / "one.npz", good[:1])
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "nan.npz", mu=np.full(WIDTHS[0], np.nan), sigma=np.eye(WIDTHS[0]))
    np.savez(tmp_path / "huge.npz", mu=np.full(WIDTHS[0], 1e200), sigma=np.eye(WIDTHS[0]))
    np.savez(tmp_path / "negative.npz", mu=np.zeros(WIDTHS[0]), sigma=-np.eye(WIDTHS[0]))
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    (tmp_path / "damaged.npz").write_bytes(damaged)
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    for side in (8, 16):
        Image.fromarray(pictures(1, side)[0]).save(tmp_path / f"sizes/{side}.png")
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable/a.png").write_bytes(b"no image")
    for name, message in (
        ("floats.npz", "expected uint8 images in 0 ... 255, found float64"),
        ("gray.npz", r"expected uint8 images \(N, H, W, 3\)"),
        ("objects.npz", "damaged or no .npz"),
        ("named.npz", "no array arr_0; it holds images"),
        ("cut.npz", "damaged or no .npz"),
        ("damaged.npz", "Bad CRC"),
        ("one.npz", "needs at least 2"),
        ("none.npz", "not found"),
        ("empty", "no images in it"),
        ("sizes", "16 x 16 pixels, 8.png 8 x 8; give --image-size N"),
        ("unreadable", "no image could be read; the first: a.png"),
    ):
        capsys.readouterr()
        assert run(samples=tmp_path / name, reference=tmp_path / "ref.npz", out=tmp_path / "m.json") == 2, name
        _one_line(capsys.readouterr().err, message)
    for name, message in (
        ("none.npz", "not found"),
        ("named.npz", "neither mu and sigma nor arr_0"),
        ("narrow.npz", r"mu: expected \(12,\)"),
        ("nan.npz", "NaN or infinity"),
        ("negative.npz", "FID: .*positive semi-definite"),
        ("huge.npz", "FID: .*too large for float64"),
        ("cut.npz", "damaged or no .npz"),
    ):
        capsys.readouterr()
        assert run(samples=tmp_path / "good.npz", reference=tmp_path / name, out=tmp_path / "m.json") == 2, name
        _one_line(capsys.readouterr().err, message)
    for arguments, message in (
        ((), "expected one of --samples"),
        (("--samples", "a.npz", "--tokenizer", "b"), "got --samples and --tokenizer"),
        (("--samples", "a.npz"), "--reference: missing"),
        (("--tokenizer", "b"), "--source: missing"),
        (("--make-reference", "b", "--reference", "c"), "--reference: does not go with --make-reference b"),
        (("--samples", "a.npz", "--reference", "b", "--image-size", 8), "--image-size: does not go with"),
        (("--samples", "a.npz", "--reference", "b", "--out", "c.txt"), "ends in .json"),
        (
            ("--draw.model", "a", "--draw.grid-rows", 3, "--draw.no-grid", "--reference", "b"),
            "--draw.grid: no file of images",
        ),
    ):
        capsys.readouterr()
        assert run(*arguments) == 2, arguments
        _one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "m.json").exists()


def _one_line(err: str, message: str) -> None:
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and re.search(message, lines[0]), (message, err)
    assert "Traceback" not in err

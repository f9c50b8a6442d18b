"""`star-fast evaluate` end to end with a network of a few features: numbers against numpy, every source of images,
records, warnings, and clear errors.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast import cli
from star_fast.evaluation import adm, evaluate, reference
from star_fast.evaluation.inception import WEIGHTS_SHA256, Features, Inception
from star_fast.evaluation.protocols import departures
from star_fast.evaluation.reference import read_reference
from tests.evaluation.small_inception import write_random_weights
from tests.generation.small_model import save_small_model

scipy_linalg = pytest.importorskip("scipy.linalg")
WIDTHS = (12, 10, 6)  # of pool and spatial features, classes


class FewFeatures:
    """In Inception's place: fixed random functions of an image's 4 x 4 block means."""

    sha256, device = WEIGHTS_SHA256, torch.device("cpu")

    def __call__(self, images: torch.Tensor) -> Features:
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        means = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        generator = torch.Generator().manual_seed(0)
        return Features(*(torch.tanh(means @ torch.randn(48, width, generator=generator)) for width in WIDTHS))

    def record(self) -> dict[str, str]:
        return {"network": "few features", "weights_sha256": self.sha256, "resize": "block means"}


@pytest.fixture
def few_features(monkeypatch: pytest.MonkeyPatch) -> FewFeatures:
    network = FewFeatures()
    for module in (adm, reference):
        monkeypatch.setattr(module, "POOL_WIDTH", WIDTHS[0])
        monkeypatch.setattr(module, "SPATIAL_WIDTH", WIDTHS[1])
    monkeypatch.setattr(evaluate, "open_inception", lambda *arguments: network)
    return network


def pictures(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """(N, H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, 1).repeat(size // 4, 2)


def features_of(images: np.ndarray) -> list[np.ndarray]:
    return [part.double().numpy() for part in FewFeatures()(torch.from_numpy(images).permute(0, 3, 1, 2))]


def moments_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(0), np.cov(rows, rowvar=False)


def frechet(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    return float(((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * scipy_linalg.sqrtm(a[1] @ b[1]).real))


def write_adm_reference(path: Path, images: np.ndarray, statistics_of: np.ndarray, save=np.savez) -> None:
    """As the ADM suite publishes them: the statistics are of more images than lie in the file."""
    pool, spatial, _ = features_of(statistics_of)
    (mu, sigma), (mu_s, sigma_s) = moments_of(pool), moments_of(spatial)
    save(path, arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)


def run(*arguments: object) -> int:
    return cli.main(["evaluate", *map(str, arguments)])


def result(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_the_five_metrics_of_a_npz_against_an_adm_reference(
    few_features: FewFeatures, tmp_path: Path, save, capsys: pytest.CaptureFixture
) -> None:
    samples, real, more = pictures(70, seed=1), pictures(40, seed=2) // 2 + 60, pictures(90, seed=3) // 2 + 60
    save(tmp_path / "samples.npz", samples)
    write_adm_reference(tmp_path / "ref.npz", real, more, save)
    assert (
        run(
            "--samples",
            tmp_path / "samples.npz",
            "--reference",
            tmp_path / "ref.npz",
            "--out",
            tmp_path / "m.json",
            "--split-images",
            30,
        )
        == 0
    )
    found = result(tmp_path / "m.json")
    mine, all_real, kept_real = (features_of(images) for images in (samples, more, real))
    metrics = found["metrics"]
    assert metrics["fid"] == pytest.approx(frechet(moments_of(mine[0]), moments_of(all_real[0])), rel=1e-6)
    assert metrics["sfid"] == pytest.approx(frechet(moments_of(mine[1]), moments_of(all_real[1])), rel=1e-6)
    scores = []
    for start in range(0, 70, 30):
        p = np.exp(mine[2][start : start + 30])
        p /= p.sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert (metrics["inception_score"], metrics["inception_score_spread"]) == pytest.approx(
        (np.mean(scores), np.std(scores)), rel=1e-6
    )

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((a[:, None] - b[None]) ** 2).sum(2)

    radii = [np.sort(distances(rows, rows), 1)[:, 3] for rows in (mine[0], kept_real[0])]
    between = distances(mine[0], kept_real[0])
    assert metrics["precision"] == (between <= radii[1][None]).any(1).mean()
    assert metrics["recall"] == (between <= radii[0][:, None]).any(0).mean()
    protocol = found["protocol"]
    assert protocol["samples"]["pixels_sha256"] == hashlib.sha256(samples.tobytes()).hexdigest()
    assert protocol["reference"]["sha256"] == hashlib.sha256((tmp_path / "ref.npz").read_bytes()).hexdigest()
    assert (
        protocol["reference"]["precision_images"],
        protocol["method"]["neighbours"],
        protocol["samples"]["images"],
    ) == (40, 3, 70)
    text = (tmp_path / "m.txt").read_text()
    assert f"FID              {metrics['fid']:.4f}" in text and text in capsys.readouterr().out


def test_a_folder_gives_what_its_npz_gives_and_jpeg_is_warned_about(few_features: FewFeatures, tmp_path: Path) -> None:
    samples = pictures(12, seed=4)
    np.savez(tmp_path / "samples.npz", samples)
    write_adm_reference(tmp_path / "ref.npz", pictures(9, seed=5), pictures(30, seed=5))
    for kind in ("png", "jpg"):
        (tmp_path / kind / "class").mkdir(parents=True)
        for index, pixels in enumerate(samples):
            Image.fromarray(pixels).save(tmp_path / kind / "class" / f"{index:03d}.{kind}")
    (tmp_path / "png/class/broken.png").write_bytes(b"no image")
    found = {}
    for name in ("samples.npz", "png", "jpg"):
        assert (
            run(
                "--samples",
                tmp_path / name,
                "--reference",
                tmp_path / "ref.npz",
                "--out",
                tmp_path / "m.json",
                "--batch-images",
                5,
            )
            == 0
        )
        found[name] = result(tmp_path / "m.json")
    assert found["png"]["metrics"] == pytest.approx(found["samples.npz"]["metrics"], rel=1e-9)
    pixels = [found[name]["protocol"]["samples"]["pixels_sha256"] for name in found]
    assert pixels[0] == pixels[1] != pixels[2]
    assert [entry["key"] for entry in found["png"]["protocol"]["samples"]["skipped"]] == ["class/broken.png"]
    assert any("1 images could not be read" in line for line in found["png"]["warnings"])
    assert not any("JPEG" in line for line in found["png"]["warnings"])
    assert any("12 of 12 images come from JPEG files" in line for line in found["jpg"]["warnings"])


def test_the_sampler_without_files_gives_what_its_file_gives(few_features: FewFeatures, tmp_path: Path) -> None:
    save_small_model(tmp_path / "model")
    write_adm_reference(tmp_path / "ref.npz", pictures(9, seed=5), pictures(30, seed=5))
    settings = ("images", 22, "batch-images", 8, "seed", 3, "guidance", 1.5)
    drawn = [
        item for name, value in zip(settings[::2], settings[1::2], strict=True) for item in (f"--draw.{name}", value)
    ]
    assert (
        run(
            "--draw.model",
            tmp_path / "model",
            *drawn,
            "--reference",
            tmp_path / "ref.npz",
            "--out",
            tmp_path / "a.json",
            "--batch-images",
            3,
        )
        == 0
    )
    sampled = [
        item for name, value in zip(settings[::2], settings[1::2], strict=True) for item in (f"--{name}", str(value))
    ]
    assert (
        cli.main(["sample", "--model", str(tmp_path / "model"), *sampled, "--out", str(tmp_path / "samples.npz")]) == 0
    )
    assert (
        run("--samples", tmp_path / "samples.npz", "--reference", tmp_path / "ref.npz", "--out", tmp_path / "b.json")
        == 0
    )
    a, b = result(tmp_path / "a.json"), result(tmp_path / "b.json")
    assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-6)
    assert a["protocol"]["samples"]["pixels_sha256"] == b["protocol"]["samples"]["pixels_sha256"]
    assert a["protocol"]["samples"]["sampling"] == b["protocol"]["samples"]["sampling"]
    assert b["protocol"]["samples"]["sampling"]["guidance"] == 1.5
    before = (tmp_path / "samples.json").read_bytes()
    assert (
        run(
            "--samples",
            tmp_path / "samples.npz",
            "--reference",
            tmp_path / "ref.npz",
            "--out",
            tmp_path / "samples.json",
        )
        == 2
    )
    assert (tmp_path / "samples.json").read_bytes() == before  # the sampler's record
    np.savez(tmp_path / "samples.npz", pictures(8))  # other images under the same name
    assert (
        run("--samples", tmp_path / "samples.npz", "--reference", tmp_path / "ref.npz", "--out", tmp_path / "b.json")
        == 0
    )
    assert result(tmp_path / "b.json")["protocol"]["samples"]["sampling"] is None
    assert any("record of other images" in line for line in result(tmp_path / "b.json")["warnings"])


def test_a_reference_of_own_images_and_the_same_images_measured_against_it(
    few_features: FewFeatures, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(10):
            Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(
                tmp_path / "images" / label / f"{index}.png"
            )
    (tmp_path / "images/a/x.png").write_bytes(b"no image")
    assert (
        run(
            "--make-reference",
            tmp_path / "images",
            "--image-size",
            16,
            "--out",
            tmp_path / "ref.npz",
            "--precision-images",
            7,
            "--batch-images",
            6,
        )
        == 0
    )
    # The middle: nothing to resize
    squares = np.stack(
        [np.asarray(Image.open(path))[:, 4:20] for path in sorted((tmp_path / "images").rglob("[0-9].png"))]
    )
    pool, spatial, _ = features_of(squares)
    with np.load(tmp_path / "ref.npz") as file:
        for name, expected in zip(
            ("mu", "sigma", "mu_s", "sigma_s"), (*moments_of(pool), *moments_of(spatial)), strict=True
        ):
            np.testing.assert_allclose(file[name], expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(file["pool"], pool[::3], rtol=1e-6)  # every third of 21, the unreadable one left out
    record = result(tmp_path / "ref.json")
    assert record["samples"]["pixels_sha256"] == hashlib.sha256(squares.tobytes()).hexdigest()
    assert [entry["key"] for entry in record["samples"]["skipped"]] == ["a/x.png"]
    np.savez(tmp_path / "same.npz", squares)
    assert (
        run("--samples", tmp_path / "same.npz", "--reference", tmp_path / "ref.npz", "--out", tmp_path / "m.json") == 0
    )
    metrics = result(tmp_path / "m.json")["metrics"]
    assert metrics["fid"] == pytest.approx(0, abs=1e-6) and metrics["sfid"] == pytest.approx(0, abs=1e-6)
    assert metrics["recall"] == 1  # each kept image is one of the samples
    few_features.sha256 = "0" * 64
    assert (
        run("--samples", tmp_path / "same.npz", "--reference", tmp_path / "ref.npz", "--out", tmp_path / "m.json") == 2
    )


def test_references_with_statistics_alone_or_images_alone(few_features: FewFeatures, tmp_path: Path) -> None:
    real = pictures(40, seed=2)
    pool = features_of(real)[0]
    np.savez(tmp_path / "statistics.npz", mu=moments_of(pool)[0], sigma=moments_of(pool)[1])  # pytorch-fid's
    np.savez(tmp_path / "images.npz", real)
    alone, images = (
        read_reference(tmp_path / name, few_features, 16, progress=False) for name in ("statistics.npz", "images.npz")
    )
    assert alone.pool is None and alone.gaussians.mu_s is None
    np.testing.assert_allclose(images.gaussians.sigma, alone.gaussians.sigma, rtol=1e-6, atol=1e-9)
    np.savez(tmp_path / "samples.npz", pictures(20))
    assert (
        run(
            "--samples",
            tmp_path / "samples.npz",
            "--reference",
            tmp_path / "statistics.npz",
            "--out",
            tmp_path / "m.json",
        )
        == 0
    )
    found = result(tmp_path / "m.json")["metrics"]
    assert found["fid"] > 0 and found["sfid"] is found["precision"] is found["recall"] is None
    assert "recall           not measured" in (tmp_path / "m.txt").read_text()


def test_rfid_of_a_tokenizer(few_features: FewFeatures, tmp_path: Path) -> None:
    _, tokenizer = save_small_model(tmp_path / "model")
    rng = np.random.default_rng(1)
    (tmp_path / "images/only").mkdir(parents=True)
    for index in range(11):
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / f"images/only/{index:02d}.png")
    assert (
        run(
            "--tokenizer",
            tmp_path / "model/tokenizer",
            "--source",
            tmp_path / "images",
            "--out",
            tmp_path / "m.json",
            "--batch-images",
            4,
        )
        == 0
    )
    found = result(tmp_path / "m.json")
    real = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "images/only").iterdir())])
    with torch.no_grad():
        codes = tokenizer.encode((torch.from_numpy(real)[:, None] / 255 - 0.5) / 0.5)
        made = (tokenizer.decode(codes) * 127.5 + 128).clamp(0, 255).to(torch.uint8)[:, 0].numpy()
    error = np.mean((made.astype(float) - real) ** 2)
    assert found["reconstruction"]["psnr_db"] == pytest.approx(20 * np.log10(255) - 10 * np.log10(error), rel=1e-4)
    pools = [features_of(images[..., None].repeat(3, -1))[0] for images in (made, real)]
    # Rank 10 of 12: sqrtm is the rough one
    assert found["metrics"]["fid"] == pytest.approx(frechet(moments_of(pools[0]), moments_of(pools[1])), rel=1e-4)
    assert found["protocol"]["tokenizer"]["weights_sha256"] == tokenizer.weights_hash()
    assert "PSNR, dB" in (tmp_path / "m.txt").read_text()


def test_odd_samples_are_warned_about(few_features: FewFeatures, tmp_path: Path) -> None:
    write_adm_reference(tmp_path / "ref.npz", pictures(9, seed=5), pictures(30, seed=5))

    def warnings(images: np.ndarray, **more: np.ndarray) -> str:
        np.savez(tmp_path / "samples.npz", images, **more)
        assert (
            run(
                "--samples", tmp_path / "samples.npz", "--reference", tmp_path / "ref.npz", "--out", tmp_path / "m.json"
            )
            == 0
        )
        assert all(
            f"warning: {line}\n" in (tmp_path / "m.txt").read_text() for line in result(tmp_path / "m.json")["warnings"]
        )
        return "\n".join(result(tmp_path / "m.json")["warnings"])

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
    arguments = (
        "--samples",
        tmp_path / "samples.npz",
        "--reference",
        tmp_path / "VIRTUAL_imagenet256_labeled.npz",
        "--out",
        tmp_path / "m.json",
        "--protocol",
        "adm-imagenet-256",
    )
    assert run(*arguments, "--adm-half", "--neighbours", 4) == 0
    found = result(tmp_path / "m.json")
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
    assert run(*arguments) == 0
    assert "distances of precision and recall" in {
        line.split(":")[0] for line in result(tmp_path / "m.json")["compared_with"]["differs"]
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
        assert (
            run("--samples", tmp_path / name, "--reference", tmp_path / "ref.npz", "--out", tmp_path / "m.json") == 2
        ), name
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
        assert (
            run("--samples", tmp_path / "good.npz", "--reference", tmp_path / name, "--out", tmp_path / "m.json") == 2
        ), name
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


def test_the_real_network_makes_a_reference(tmp_path: Path) -> None:
    """Inception itself, random weights from a file whose hash is given: the statistics of its features, called
    directly.
    """
    pytest.importorskip("torch_fidelity")
    state = write_random_weights(tmp_path / "random.pth")
    digest = hashlib.sha256((tmp_path / "random.pth").read_bytes()).hexdigest()
    (tmp_path / "images/only").mkdir(parents=True)
    squares = pictures(5, 32, seed=9)
    for index, pixels in enumerate(squares):
        Image.fromarray(pixels).save(tmp_path / f"images/only/{index}.png")
    arguments = (
        "--make-reference",
        tmp_path / "images",
        "--image-size",
        32,
        "--out",
        tmp_path / "ref.npz",
        "--batch-images",
        3,
        "--inception",
        tmp_path / "random.pth",
    )
    assert run(*arguments) == 2  # not the published weights
    assert run(*arguments, "--inception-sha256", digest) == 0
    direct = Inception(state)(torch.from_numpy(squares).permute(0, 3, 1, 2))
    with np.load(tmp_path / "ref.npz") as file:
        np.testing.assert_allclose(file["mu"], direct.pool.double().numpy().mean(0), rtol=1e-4, atol=1e-5)
        spatial = direct.spatial.double().numpy()
        np.testing.assert_allclose(file["sigma_s"], np.cov(spatial, rowvar=False), rtol=1e-3, atol=1e-4 * spatial.var())
        assert file["inception_sha256"].tobytes().hex() == digest
    assert any("not torch-fidelity's" in line for line in result(tmp_path / "ref.json")["warnings"])

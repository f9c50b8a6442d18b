"""`star-fast evaluate` end to end with a network of a few features: numbers against numpy, every source of images, and
records. What it warns of and refuses: test_evaluate_refusals.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast import cli
from star_fast.evaluation.inception import Inception
from star_fast.evaluation.reference import read_reference
from tests.evaluation.few_features import (
    FewFeatures,
    features_of,
    measured,
    moments_of,
    pictures,
    result,
    run,
    write_adm_reference,
)
from tests.evaluation.few_features import few_features as few_features  # a fixture
from tests.evaluation.small_inception import write_random_weights
from tests.generation.small_model import save_small_model

scipy_linalg = pytest.importorskip("scipy.linalg")


def frechet(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    return float(((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * scipy_linalg.sqrtm(a[1] @ b[1]).real))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_the_five_metrics_of_a_npz_against_an_adm_reference(
    few_features: FewFeatures, tmp_path: Path, save, capsys: pytest.CaptureFixture
) -> None:
    samples, real, more = pictures(70, seed=1), pictures(40, seed=2) // 2 + 60, pictures(90, seed=3) // 2 + 60
    save(tmp_path / "samples.npz", samples)
    write_adm_reference(tmp_path / "ref.npz", real, more, save)
    found = measured(
        samples=tmp_path / "samples.npz", reference=tmp_path / "ref.npz", out=tmp_path / "m.json", split_images=30
    )
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
        found[name] = measured(
            samples=tmp_path / name, reference=tmp_path / "ref.npz", out=tmp_path / "m.json", batch_images=5
        )
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
    settings = {"images": 22, "batch-images": 8, "seed": 3, "guidance": 1.5}
    drawn, sampled = (
        [str(word) for name, value in settings.items() for word in (f"--{prefix}{name}", value)]
        for prefix in ("draw.", "")
    )
    model, of_file = tmp_path / "model", {"samples": tmp_path / "samples.npz", "reference": tmp_path / "ref.npz"}
    a = measured("--draw.model", model, *drawn, reference=tmp_path / "ref.npz", out=tmp_path / "a.json", batch_images=3)
    assert cli.main(["sample", "--model", str(model), *sampled, "--out", str(tmp_path / "samples.npz")]) == 0
    b = measured(**of_file, out=tmp_path / "b.json")
    assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-6)
    assert a["protocol"]["samples"]["pixels_sha256"] == b["protocol"]["samples"]["pixels_sha256"]
    assert a["protocol"]["samples"]["sampling"] == b["protocol"]["samples"]["sampling"]
    assert b["protocol"]["samples"]["sampling"]["guidance"] == 1.5
    before = (tmp_path / "samples.json").read_bytes()
    assert run(**of_file, out=tmp_path / "samples.json") == 2
    assert (tmp_path / "samples.json").read_bytes() == before  # the sampler's record
    np.savez(tmp_path / "samples.npz", pictures(8))  # other images under the same name
    other = measured(**of_file, out=tmp_path / "b.json")
    assert other["protocol"]["samples"]["sampling"] is None
    assert any("record of other images" in line for line in other["warnings"])


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
            make_reference=tmp_path / "images",
            image_size=16,
            out=tmp_path / "ref.npz",
            precision_images=7,
            batch_images=6,
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
    same = {"samples": tmp_path / "same.npz", "reference": tmp_path / "ref.npz", "out": tmp_path / "m.json"}
    metrics = measured(**same)["metrics"]
    assert metrics["fid"] == pytest.approx(0, abs=1e-6) and metrics["sfid"] == pytest.approx(0, abs=1e-6)
    assert metrics["recall"] == 1  # each kept image is one of the samples
    few_features.sha256 = "0" * 64
    assert run(**same) == 2


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
    found = measured(samples=tmp_path / "samples.npz", reference=tmp_path / "statistics.npz", out=tmp_path / "m.json")[
        "metrics"
    ]
    assert found["fid"] > 0 and found["sfid"] is found["precision"] is found["recall"] is None
    assert "recall           not measured" in (tmp_path / "m.txt").read_text()


def test_rfid_of_a_tokenizer(few_features: FewFeatures, tmp_path: Path) -> None:
    _, tokenizer = save_small_model(tmp_path / "model")
    rng = np.random.default_rng(1)
    (tmp_path / "images/only").mkdir(parents=True)
    for index in range(11):
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / f"images/only/{index:02d}.png")
    found = measured(
        tokenizer=tmp_path / "model/tokenizer", source=tmp_path / "images", out=tmp_path / "m.json", batch_images=4
    )
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
    assert run(*arguments, inception_sha256=digest) == 0
    direct = Inception(state)(torch.from_numpy(squares).permute(0, 3, 1, 2))
    with np.load(tmp_path / "ref.npz") as file:
        np.testing.assert_allclose(file["mu"], direct.pool.double().numpy().mean(0), rtol=1e-4, atol=1e-5)
        spatial = direct.spatial.double().numpy()
        np.testing.assert_allclose(file["sigma_s"], np.cov(spatial, rowvar=False), rtol=1e-3, atol=1e-4 * spatial.var())
        assert file["inception_sha256"].tobytes().hex() == digest
    assert any("not torch-fidelity's" in line for line in result(tmp_path / "ref.json")["warnings"])

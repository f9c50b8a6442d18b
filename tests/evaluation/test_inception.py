"""The network with random weights: one pass against direct calls, sFID's layer by hand, and which files of weights are
let in.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from star_fast.errors import UserError
from star_fast.evaluation import inception
from star_fast.evaluation.inception import WEIGHTS_FILE, Features, Inception, open_inception
from star_fast.storage import StorageError
from tests.evaluation.small_inception import random_state, write_random_weights
from tests.model.torch_archives import Described, Run, archive, at_most, pickled

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    write_random_weights(path)
    return path


@pytest.fixture(scope="module")
def network(weights: Path) -> Inception:
    return open_inception(str(weights), hashlib.sha256(weights.read_bytes()).hexdigest())


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (5, 3, 4, 5), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, size=(40, 52), mode="bilinear").to(torch.uint8)


def test_one_pass_gives_what_torch_fidelitys_own_extractor_gives(
    network: Inception, weights: Path, images: torch.Tensor
) -> None:
    """Truth is its own network in float64; ours may be twice as far from it as its float32 is."""
    found = network(images)
    assert [tuple(part.shape) for part in found] == [(5, 2048), (5, 2023), (5, 1008)]
    assert {part.dtype for part in found} == {torch.float32}
    theirs, truth = (
        fidelity.FeatureExtractorInceptionV3(
            "theirs",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(weights),
            feature_extractor_internal_dtype=dtype,
        )(images[:2])
        for dtype in ("float32", "float64")
    )
    for own, plain, exact in zip((found.pool, found.logits), theirs, truth, strict=True):
        scale = exact.abs().max()
        assert (own[:2] - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6 * scale
        assert (plain - exact).abs().max() < 1e-4 * scale
    assert found.pool.std(0).mean() > 1e-3  # the images do differ in it


def test_batches_change_nothing_but_rounding(network: Inception, images: torch.Tensor) -> None:
    whole = network(images)
    parts = [network(part) for part in images.split((1, 3, 1))]
    for number, name in enumerate(whole._fields):
        torch.testing.assert_close(
            torch.cat([part[number] for part in parts]), whole[number], rtol=1e-4, atol=1e-5, msg=name
        )


def test_logits_are_the_last_product_without_its_bias(network: Inception, images: torch.Tensor) -> None:
    found = network(images[:2])
    weight = network.network.fc.weight.double().numpy()
    np.testing.assert_allclose(found.logits.numpy(), found.pool.double().numpy() @ weight.T, rtol=1e-4, atol=1e-4)


def test_spatial_features_are_seven_channels_of_one_convolution_place_by_place(
    network: Inception, images: torch.Tensor
) -> None:
    """The input of Mixed_6d, by a hook, times the 1 x 1 kernel by hand: feature (17 y + x) 7 + c is channel c at row y,
    column x, no batch norm, no ReLU.
    """
    seen = []
    handle = network.network.Mixed_6c.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        found = network(images[:1]).spatial[0].double().numpy()
    finally:
        handle.remove()
    entering = seen[0][0].double().numpy()  # (768, 17, 17)
    assert entering.shape == (768, 17, 17)
    kernel = network.network.Mixed_6d.branch1x1.conv.weight.double().numpy()[:, :, 0, 0]  # (192, 768)
    scale = np.abs(found).max()
    for y, x, channel in ((0, 0, 0), (0, 1, 0), (1, 0, 6), (16, 16, 6), (3, 11, 4), (11, 3, 4)):
        by_hand = sum(kernel[channel, source] * entering[source, y, x] for source in range(768))
        assert found[(17 * y + x) * 7 + channel] == pytest.approx(by_hand, rel=1e-4, abs=1e-6 * scale), (y, x, channel)
    assert found.min() < 0  # before the ReLU


def test_images_are_resized_as_tensorflow_1_did(network: Inception) -> None:
    """Source place of target pixel i is i * scale, not (i + 0.5) * scale - 0.5: an image already resized so, by hand,
    gives the same features.
    """
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (13, 13)).astype(np.float64)
    place = np.arange(299) * np.float64(np.float32(13 / 299))
    low, share = place.astype(int), place - place.astype(int)
    high = np.minimum(low + 1, 12)
    rows = small[low] * (1 - share[:, None]) + small[high] * share[:, None]
    big = rows[:, low] * (1 - share) + rows[:, high] * share
    seen = []
    handle = network.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        network(torch.from_numpy(small.astype(np.uint8)).expand(1, 3, 13, 13))
    finally:
        handle.remove()
    np.testing.assert_allclose(seen[0][0, 1].numpy(), (big - 128) / 128, atol=2e-5)


def test_other_shapes_and_dtypes_are_refused(network: Inception) -> None:
    for wrong in (
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=r"expected uint8 \(N, 3, H, W\)"):
            network(wrong)


def test_weights_that_are_not_there_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *args, **more: pytest.fail("downloaded without being asked")
    )
    with pytest.raises(UserError, match="--inception FILE, or --download"):
        open_inception()
    with pytest.raises(StorageError, match="not found"):
        open_inception(str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="leave one of them out"):
        open_inception("some.pth", download=True)


def test_a_download_goes_where_torch_hub_looks_and_is_checked_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def fetch(url: str, path: str, hash_prefix: str) -> None:
        asked.append((url, hash_prefix))
        Path(path).write_bytes(b"not what was published")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(UserError, match=r"its sha256 is .* expected 6726825d"):
        open_inception(download=True)
    assert asked == [(fidelity.URL_INCEPTION_V3, "6726825d")]
    assert (tmp_path / "checkpoints" / WEIGHTS_FILE).exists()
    assert fidelity.URL_INCEPTION_V3.endswith(WEIGHTS_FILE)  # the name and the digits of the hash are torch-fidelity's


class _Bomb:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("unpickled before its hash was known",)


def test_nothing_is_unpickled_before_the_hash_or_run_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(pickle.dumps(_Bomb(), protocol=2))
    loads, real, digest = [], torch.load, hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(inception.torch, "load", lambda *args, **more: loads.append(more) or real(*args, **more))
    with pytest.raises(UserError, match="its sha256 is"):
        open_inception(str(path))
    with pytest.raises(UserError, match="not a file of tensors"):
        open_inception(str(path), digest)
    assert not loads
    # The one file that torch itself reads, and that by no means runs
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", digest)
    with pytest.raises(pickle.UnpicklingError, match="pytest"):
        open_inception(str(path))
    assert loads[-1]["weights_only"] is True
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        open_inception(str(path), "abc")


def test_other_networks_weights_are_named(tmp_path: Path) -> None:
    for content, message in (
        ({"fc.weight": torch.zeros(2, 2)}, "not the weights of torch-fidelity's Inception: .*Conv2d_1a_3x3"),
        ([1, 2], "got list"),
        ({"fc.weight": 3}, "expected a state dict of tensors"),
    ):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        path = tmp_path / "other.pth"
        path.write_bytes(buffer.getvalue())
        with pytest.raises(UserError, match=message):
            open_inception(str(path), hashlib.sha256(buffer.getvalue()).hexdigest())


def test_what_a_file_asks_for_is_held_against_its_size_and_its_numbers_must_be_numbers(
    tmp_path: Path, weights: Path
) -> None:
    """Their hash may come with the weights: it proves that nothing was damaged, not that nothing is meant."""
    bomb = archive(
        tmp_path / "bomb.pth",
        pickled({"fc.bias": Described(Run("0", 6 * 10**7), 0, (6 * 10**7,), (1,))}),
        {"data/0": bytes(24 * 10**7)},
        compression=zipfile.ZIP_DEFLATED,
    )
    assert bomb.stat().st_size < 10**6
    with at_most(200), pytest.raises(UserError, match="not a file of tensors"):
        open_inception(str(bomb), hashlib.sha256(bomb.read_bytes()).hexdigest())
    state = torch.load(weights, weights_only=True)
    for content, message in (
        ({True: torch.zeros(1)}, "neither text"),
        ({**state, "fc.bias": torch.full((1008,), torch.nan)}, "fc.bias is not finite"),
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match=message):
            open_inception(
                str(tmp_path / "other.pth"), hashlib.sha256((tmp_path / "other.pth").read_bytes()).hexdigest()
            )


def test_what_the_record_says(network: Inception, weights: Path) -> None:
    record = network.record()
    assert record["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest() != inception.WEIGHTS_SHA256
    assert record["resize"] == "TensorFlow 1 bilinear to 299 x 299"
    state = random_state()
    assert all(torch.equal(value, state[name]) for name, value in network.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.network.parameters())


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_features(network: Inception, images: torch.Tensor) -> None:
    """To float32's rounding: TF32, which cuDNN would use by itself, is a thousand times coarser."""
    on_gpu = Inception(random_state(), "cuda")
    for found, expected, name in zip(on_gpu(images), network(images), Features._fields, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item(), msg=name)

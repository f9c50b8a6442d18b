"""The Inception network of FID: torch-fidelity's port of the TensorFlow graph of 2015-12-05, its weights file, and one
forward pass for all metrics.

The features, as the ADM suite takes them from that graph:
    pool      (N, 2048)  output of the last average pooling: FID, precision, recall
    spatial   (N, 2023)  the first 7 channels of the convolution Mixed_6d.branch1x1 before its batch norm (17 x 17
                         places; `mixed_6/conv` in the graph), flattened height first, then width, then channel: sFID
    logits    (N, 1008)  the last matrix product without its bias: Inception Score
Images of any size become 299 x 299 by TensorFlow 1's bilinear resize, which torch-fidelity's network does itself.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from star_fast.errors import UserError
from star_fast.evaluation.limits import explain_out_of_memory
from star_fast.model.bounded_file import BoundedFile
from star_fast.model.ieee import ieee_products
from star_fast.model.plain_pickle import read_plain
from star_fast.model.tensor_files import require_finite
from star_fast.model.torch_files import read_archive
from star_fast.storage import explain_write_errors, read_bytes, sha256_of_bytes

# torch-fidelity's name for it: the digits are the first of its sha256
WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
# pytorch-fid publishes the same bytes
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7
CLASSES = 1008
_MOST_WEIGHTS_BYTES = 2**28  # the published file has 95.6 MB
_SHA256 = re.compile("[0-9a-f]{64}")
_NEED = "evaluation needs torch-fidelity's Inception network, which is not installed: pip install 'star_fast[eval]'"


class Features(NamedTuple):
    """Of N images, float32, on the network's device."""

    pool: Tensor  # (N, 2048)
    spatial: Tensor  # (N, 2023)
    logits: Tensor  # (N, 1008), without bias


class Inception:
    """torch-fidelity's Inception, frozen, float32; a call gives `Features`.

    Args:
        state: its weights; None leaves the random ones that torch draws (for tests: nothing that such a network
            measures means anything).
        sha256: of the file that they came from; "" where there was none.

    Raises:
        UserError: torch-fidelity is not installed, or these are not this network's weights.
    """

    def __init__(self, state: dict[str, Tensor] | None, device: torch.device | str = "cpu", sha256: str = "") -> None:
        self.device, self.sha256 = torch.device(device), sha256
        self.network = _build(state).to(self.device)  # whose layers have no types
        if self.device.type == "cpu":
            self.network.to(memory_format=torch.channels_last)  # oneDNN's convolutions are 1.45 times as fast so
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.conv.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (N, 3, H, W), of any size, on any device.

        Numerics: float32 throughout, TF32 switched off, so that CPU and GPU agree to rounding; not bit for bit between
        batch sizes.

        Raises:
            ValueError: another dtype or shape. UserError: out of memory.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Inception: expected uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        with ieee_products(), explain_out_of_memory("give a smaller --batch-images"):
            pool, logits = self.network(images.to(self.device))
        assert self._spatial is not None, "_see has seen it"
        spatial, self._spatial = self._spatial.permute(0, 2, 3, 1).flatten(1).float(), None
        return Features(pool, spatial, logits)

    def record(self) -> dict[str, str]:
        """What decides its numbers, for the protocol."""
        return {
            "network": "torch-fidelity FeatureExtractorInceptionV3",
            "torch_fidelity": importlib.metadata.version("torch-fidelity"),
            "weights_sha256": self.sha256,
            "resize": "TensorFlow 1 bilinear to 299 x 299",
            "precision": "float32",
        }


def open_inception(
    weights: str = "", sha256: str = "", download: bool = False, device: torch.device | str = "cpu"
) -> Inception:
    """The network with the weights in a file.

    The file is read once; its hash must be the expected one before any of it is unpickled, and then only tensors are,
    all of which must be finite.

    Args:
        weights: the file; "": where torch.hub keeps what it downloaded.
        sha256: of the file; "": WEIGHTS_SHA256. Other weights make numbers that compare with no published one.
        download: fetch torch-fidelity's file if it is not where torch.hub keeps it.

    Raises:
        UserError, StorageError: no file (the line says how to get it), another file than expected, or not this
            network's weights.
    """
    expected = sha256 or WEIGHTS_SHA256
    if not _SHA256.fullmatch(expected):
        raise UserError(f"--inception-sha256: expected 64 hexadecimal digits, got {sha256[:80]!r}")
    if weights and download:
        raise UserError("--download: a file was given with --inception; leave one of them out")
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError(_NEED)
    path = Path(weights) if weights else hub_file()
    if not weights and not path.exists():
        if not download:
            raise UserError(
                f"{path}: not there: the weights of Inception. Give torch-fidelity's {WEIGHTS_FILE} with "
                "--inception FILE, or --download to fetch "
                "it (96 MB)"
            )
        _download(path)
    data = read_bytes(path, f"expected the weights of Inception, {WEIGHTS_FILE}", _MOST_WEIGHTS_BYTES)
    found = sha256_of_bytes(data)
    if found != expected:
        raise UserError(
            f"{path}: its sha256 is {found}, expected {expected}: not {WEIGHTS_FILE}, or damaged; get it again "
            "(for weights of your own give "
            "their hash with --inception-sha256)"
        )
    try:
        made = Inception(_tensors(data, path, found), device, found)
    except RuntimeError as error:
        raise UserError(
            f"{path}: not the weights of torch-fidelity's Inception: {' '.join(str(error).split())[:200]}"
        ) from error
    require_finite(made.network.state_dict(), str(path))
    return made


def _tensors(data: bytes, path: Path, sha256: str) -> dict[str, Tensor]:
    """The state dict in a file's bytes. torch itself reads the published file, which has the layout of torch before 1.6
    and is known by its hash; a hash that came with a file vouches for nothing, so other files are read as any model's
    are."""
    if sha256 == WEIGHTS_SHA256:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    meaning = "a file of tensors, the weights of Inception"
    file, cpu = BoundedFile(path, io.BytesIO(data), len(data)), torch.device("cpu")
    state = read_archive(file, meaning, lambda archive: read_plain(archive.pickle, archive.reader(cpu)))
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path}: expected a state dict of tensors, got {type(state).__name__} of something else")
    return state


def hub_file() -> Path:
    """Where torch.hub keeps the file that torch-fidelity downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE


def _download(path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    with explain_write_errors(path):
        os.makedirs(path.parent, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=WEIGHTS_SHA256[:8])
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{URL_INCEPTION_V3}: could not be fetched: {error}; get it another way and give it with "
                "--inception FILE"
            ) from error


def _build(state: dict[str, Tensor] | None) -> Any:
    """The network, frozen, in eval mode. Raises RuntimeError where `state` is not its own."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError(_NEED)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Network(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
            """The constructor always loads a file; an empty one leaves the weights as they are."""
            return super().load_state_dict(state_dict, strict=strict and bool(state_dict), assign=assign)

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Network("star-fast-inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)
    if state is not None:
        network.load_state_dict(state)
    return network.eval().requires_grad_(False)

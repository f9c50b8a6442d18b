"""Views made while training: images -> random crops -> the store's frozen tokenizer -> codes. For small data sets, and
for more than ten crops an image.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from star_fast.config import DataConfig
from star_fast.data.augment import Augmentation, augment
from star_fast.data.codes import CodeStore
from star_fast.data.encoding import Encoder
from star_fast.data.sources import DataError, ImageSource, UnreadableImage
from star_fast.data.view_reading import processors_of_this_rank
from star_fast.errors import UserError
from star_fast.model.tokenizer import VQTokenizer

if TYPE_CHECKING:
    from star_fast.data.dali import DaliAugment, Refused, Views


class OnlineCodes:
    """Codes of random crops of a store's images, the same for the same seed, epoch and image on any rank, drawn afresh
    in each epoch.

    Args:
        store: says which images, and which tokenizer must be given.
        source: the images that the store was made of.
        tokenizer: float32; encodes on `device`, on a stream of its own there.
        data: how crops are drawn, and who decodes.
        seed: of the crops. workers: threads that decode; 0: one for each of this rank's processors.

    Attributes:
        seconds: of all calls so far: {"views_s": reading, decoding and cropping, "tokenizer_s": encoding}.

    Raises:
        DataError: another tokenizer. UserError: the decoder asked for is not here.
    """

    def __init__(
        self,
        store: CodeStore,
        source: ImageSource,
        tokenizer: VQTokenizer,
        data: DataConfig,
        seed: int,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        store.require_tokenizer(tokenizer.weights_hash())
        workers = workers or processors_of_this_rank()
        self.source, self.device, self.seed, self.size = source, device, seed, store.image_size
        self.channels = tokenizer.config.image_channels
        self.rows = store.source_indices()
        self.settings = Augmentation(data.crop_area, data.crop_aspect, data.mirror)
        self._encoder = Encoder(tokenizer.to(device), "fp32", 64)  # which copies it
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="crops")
        self._decoder, self._workers = data.decoder, workers
        self._dali: dict[int, DaliAugment] = {}
        self.seconds = {"views_s": 0.0, "tokenizer_s": 0.0}

    def __call__(self, epoch: int, rows: np.ndarray, views: int) -> Tensor:
        """Codes (B, M, T) int64, on the CPU, of M = `views` crops of each of the store's rows (B,).

        Raises:
            UserError: an image can no longer be read.
        """
        began = time.perf_counter()
        with self._on_device():
            crops = self._crops(epoch, self.rows[rows], views)
            cut = time.perf_counter()
            codes = self._encoder(crops)
        self.seconds["views_s"] += cut - began
        self.seconds["tokenizer_s"] += time.perf_counter() - cut
        return torch.from_numpy(codes).view(len(rows), views, -1)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Batches are made in a thread, which knows neither the device nor the stream of the one that trains."""
        # Also makes the stream's device the current one
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _crops(self, epoch: int, indices: np.ndarray, views: int) -> Tensor:
        """(B * M, C, S, S) uint8."""
        files = [None] * len(indices) if self._decoder == "pillow" else list(self._pool.map(self._file, indices))
        with_file = [place for place, file in enumerate(files) if file is not None]
        made: dict[int, Views | Refused] = {}
        if with_file:
            numbers = [int(indices[place]) for place in with_file]
            encoded = [file for file in files if file is not None]
            made = dict(zip(with_file, self._by_dali(views)(encoded, numbers, epoch), strict=True))
        without = [place for place, file in enumerate(files) if file is None]
        made |= zip(
            without,
            self._pool.map(lambda place: self._by_pillow(epoch, int(indices[place]), views), without),
            strict=True,
        )
        crops: dict[int, Views] = {}
        for place, found in made.items():
            if not isinstance(found, list):  # Refused
                raise self._gone(UnreadableImage(self.source.files[indices[place]], found.reason))
            crops[place] = found
        # Images without a file are cut on the CPU whoever decodes the others
        where = self.device if self._decoder == "dali-gpu" else "cpu"
        return torch.stack(
            [torch.as_tensor(crop, device=where) for place in range(len(indices)) for crop in crops[place]]
        )

    def _file(self, index: int) -> bytes | None:
        try:
            return self.source.encoded(int(index))
        except UnreadableImage as error:
            raise self._gone(error) from error

    def _by_pillow(self, epoch: int, index: int, views: int) -> list[np.ndarray]:
        try:
            return augment(
                self.source[index].image, self.settings, views, self.size, self.channels, self.seed, epoch, index
            )
        except UnreadableImage as error:
            raise self._gone(error) from error

    def _by_dali(self, views: int) -> DaliAugment:
        if views not in self._dali:
            from star_fast.data.dali import DaliAugment

            self._dali[views] = DaliAugment(
                self.settings,
                views,
                self.size,
                self.channels,
                self.seed,
                device="mixed" if self._decoder == "dali-gpu" else "cpu",
                threads=self._workers,
            )
        return self._dali[views]

    @staticmethod
    def _gone(error: UnreadableImage) -> UserError:
        return DataError(f"{error}; it could be read when the codes were made")

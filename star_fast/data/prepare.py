"""Source -> views -> tokenizer -> code store; resumable; with a list of what was skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.config import DataConfig, TokenizerConfig
from star_fast.data.codes import CodeStore, StoreWriter
from star_fast.data.manifest import FILES, MANIFEST_FILE, PROGRESS_FILE, is_finished
from star_fast.data.sources import DataError, ImageSource, UnreadableImage, stable_permutation
from star_fast.data.views import ImageViews, check_view_settings, read_views, view_names, view_settings
from star_fast.errors import UserError, printable
from star_fast.locks import LOCK_FILE, only_writer
from star_fast.model.tokenizer import VQTokenizer, from_uint8
from star_fast.storage import remove_leftovers

_PIXELS = "upright by EXIF, 16 bits scaled by the white level"  # how files became pixels: a store begun under another rule cannot be finished under this one


class _Chunk(NamedTuple):
    """Consecutive images of a source, decoded and cut into views."""

    views: list[np.ndarray]  # of each readable image: (A, C, H, W) uint8
    labels: list[int]
    keys: list[str]
    skipped: list[dict[str, Any]]  # {"index", "key", "reason"}
    end: int  # the source index after the chunk


def prepare(source: ImageSource, out: str | Path, tokenizer: VQTokenizer, data: DataConfig, *, seed: int = 0, chunk_images: int = 64, batch_views: int = 64,
            workers: int = 2, progress: bool = True) -> CodeStore:
    """Encode every view of every image of `source` into a code store in folder `out`, and open it.

    Killed at any moment and called again with the same arguments it goes on, and ends with the same bytes as an unbroken run. A folder
    that already holds this very store is opened at once.

    Args:
        tokenizer: float32, in eval mode, on the device to encode on; its config gives image size and channels.
        data: which views, and the share of images held out.
        seed: of small-affine views.
        chunk_images: images between two records on disk. batch_views: views encoded at once. workers: threads that decode and crop.

    Raises:
        DataError: no image could be read; the tokenizer is not float32. ConfigError: view settings that ask for absurd sizes. StorageError: see StoreWriter.
        Busy: another job is writing to `out`.
    """
    config = tokenizer.config
    if tokenizer.dtype != torch.float32:
        raise DataError(f"prepare: the tokenizer must be float32, got {tokenizer.dtype}: a rounded tokenizer gives other codes than the one its hash names")
    check_view_settings(data, config.image_size, config.image_channels)
    with writing(out):
        side = config.image_size // config.downsampling
        writer = StoreWriter(out, {
            "views": view_names(data), "view_settings": view_settings(data, seed), "positions": config.positions, "grid": (side, side),
            "image_size": config.image_size, "image_channels": config.image_channels, "codebook": config.codebook, "class_names": source.class_names,
            "tokenizer_sha256": tokenizer.weights_hash(), "source": source.description(), "decoder": f"Pillow {PIL.__version__}", "pixels": _PIXELS,
            "held_out_share": data.held_out_share, "chunk_images": chunk_images, "batch_views": batch_views})
        if not writer.complete:
            with explain_out_of_memory(f"encode {batch_views} views of {config.image_size} pixels at once"):
                _encode(source, writer, tokenizer, data, seed, chunk_images, batch_views, workers, progress)
        return writer.finish(source.labels, data.held_out_share, source.skipped)


@contextmanager
def writing(out: str | Path) -> Iterator[None]:
    """Hold `out` for the one job that makes its codes, and clear what dead ones left half-written. A finished store is only read: nothing is held.

    Raises:
        Busy: another job is writing there. DataError: no file system knows such a name.
    """
    if "\0" in str(out):
        raise DataError(f"{out}: expected the name of a folder, got a null byte in it")
    with nullcontext() if is_finished(out) else only_writer(out, "preparing codes"):
        if not is_finished(out):
            remove_leftovers(out, (*FILES, MANIFEST_FILE, PROGRESS_FILE))
        yield
        if is_finished(out):
            with suppress(OSError):
                (Path(out) / LOCK_FILE).unlink()  # whoever waits for it looks again, and finds the finished store


@contextmanager
def explain_out_of_memory(what: str) -> Iterator[None]:
    """Turn an allocation that fails inside into one line that says what there is no memory to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text or "out of memory" in text:
            raise UserError(f"not enough memory to {what}; choose smaller sizes, or free some and run the same command") from error
        raise


def _encode(source: ImageSource, writer: StoreWriter, tokenizer: VQTokenizer, data: DataConfig, seed: int, chunk_images: int, batch_views: int, workers: int,
            progress: bool) -> None:
    config, device = tokenizer.config, next(tokenizer.parameters()).device
    with tqdm(total=len(source), initial=writer.next_index, desc="codes", unit="image", disable=not progress, dynamic_ncols=True) as bar:
        for chunk in _chunks(source, writer.next_index, chunk_images, data, config, seed, workers):
            codes = np.zeros((0, len(view_names(data)), config.positions), dtype=np.int64)
            if chunk.views:
                flat = torch.from_numpy(np.concatenate(chunk.views))
                parts = [tokenizer.encode(from_uint8(part.to(device))).cpu() for part in flat.split(batch_views)]
                codes = torch.cat(parts).view(len(chunk.views), -1, config.positions).numpy()
            writer.append(codes, chunk.labels, chunk.keys, chunk.end, chunk.skipped)
            bar.update(chunk.end - bar.n)
            bar.set_postfix(skipped=len(writer.skipped))
    if writer.rows == 0:
        first = f"; the first: {writer.skipped[0]['key']}: {writer.skipped[0]['reason']}" if writer.skipped else ""
        raise DataError(f"prepare: none of the {len(source)} images could be read{first}")


def skipped_report(store: CodeStore, most: int = 10) -> str:
    """What a store left out, for people: one line per file, `most` at most; empty when nothing was skipped."""
    skipped = store.manifest["skipped"]
    lines = [f"skipped {entry['key']}: {entry['reason']}" for entry in skipped[:most]]
    more = [f"... and {len(skipped) - most} more, listed in {store.path / MANIFEST_FILE}"] * (len(skipped) > most)
    return "\n".join(map(printable, lines + more))


def collect_views(source: ImageSource, indices: np.ndarray, data: DataConfig, config: TokenizerConfig, *, seed: int = 0, limit_bytes: int = 2**31,
                  first_view_only: bool = False, progress: bool = True) -> Tensor:
    """Views (N, C, H, W) uint8 of the source images `indices`, held in memory: what a tokenizer or a classifier trains on.

    Where all views take more than `limit_bytes`, a fixed random part of them is taken. Unreadable images are left out.

    Raises:
        DataError: none of the images could be read.
    """
    check_view_settings(data, config.image_size, config.image_channels)
    indices = np.asarray(indices)
    per_image = 1 if first_view_only else len(view_names(data))
    shape = (config.image_channels, config.image_size, config.image_size)
    chosen = np.sort(stable_permutation(len(indices) * per_image, seed)[:max(1, limit_bytes // math.prod(shape))])
    with explain_out_of_memory(f"hold {len(chosen)} views of {config.image_size} pixels"):
        views = np.empty((len(chosen), *shape), dtype=np.uint8)
    filled, reason = 0, ""
    with tqdm(total=len(chosen), desc="views", unit="view", disable=not progress, dynamic_ncols=True) as bar:
        for place, group in groupby(chosen.tolist(), key=lambda pair: pair // per_image):
            wanted, index = [pair % per_image for pair in group], int(indices[place])
            bar.update(len(wanted))
            try:
                views[filled: filled + len(wanted)] = read_views(source, index, data, config.image_size, config.image_channels, seed, wanted).views
            except UnreadableImage as error:
                reason = f"; the last: {error}"
                continue
            filled += len(wanted)
    if not filled:
        raise DataError(f"none of the {len(indices)} images could be read{reason}")
    return torch.from_numpy(views[:filled])


def _chunks(source: ImageSource, start: int, size: int, data: DataConfig, config: TokenizerConfig, seed: int, workers: int) -> Iterator[_Chunk]:
    """The chunks from `start` on, in order; the next one is decoded by `workers` threads while the caller encodes the present one."""

    def read(index: int) -> ImageViews | UnreadableImage:
        try:
            return read_views(source, index, data, config.image_size, config.image_channels, seed)
        except UnreadableImage as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        def submit(first: int) -> list[Future]:
            return [pool.submit(read, index) for index in range(first, min(first + size, len(source)))]

        pending = submit(start)
        while pending:
            following = submit(start + len(pending))
            results = [future.result() for future in pending]
            good = [result for result in results if not isinstance(result, UnreadableImage)]
            bad = [{"index": start + i, "key": result.key, "reason": result.reason} for i, result in enumerate(results) if isinstance(result, UnreadableImage)]
            start += len(pending)
            yield _Chunk([views for views, _, _ in good], [label for _, label, _ in good], [key for _, _, key in good], bad, start)
            pending = following

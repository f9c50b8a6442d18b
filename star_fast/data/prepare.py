"""Source -> views -> tokenizer -> code store, on any number of ranks; resumable; with a list of what was skipped."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.config import DataConfig, TokenizerConfig
from star_fast.data.chunks import EncodedChunk, read_chunks, read_part, write_part
from star_fast.data.codes import CodeStore
from star_fast.data.encoding import Encoder, codes_that_differ
from star_fast.data.manifest import FILES, MANIFEST_FILE, PROGRESS_FILE, SKIPPED_FILE, is_finished, recorded_until
from star_fast.data.sources import DataError, ImageSource, UnreadableImage, split_of, stable_permutation
from star_fast.data.store_writer import StoreWriter, job_hash
from star_fast.data.view_reading import ViewReader, view_reader
from star_fast.data.views import check_view_settings, plain_view, read_views, view_names, view_settings
from star_fast.errors import UserError, printable
from star_fast.locks import LOCK_FILE, only_writer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.storage import explain_write_errors, remove_leftovers

PARTS_FOLDER = "parts"  # within an unfinished store: chunks that ranks have encoded ahead of their turn
# How files became pixels: a store begun under another rule cannot be finished under this one
_PIXELS = "upright by EXIF, 16 bits scaled by the white level"
_COMPARED_IMAGES = 32  # encoded in float32 too, to say what bf16 changes
# Of a rank for the others: it gives up when nothing was recorded for so long; one chunk may take an hour on a CPU
_POLL_S, _PATIENCE_S = 0.2, 6 * 3600.0


def prepare(
    source: ImageSource,
    out: str | Path,
    tokenizer: VQTokenizer,
    data: DataConfig,
    *,
    seed: int = 0,
    precision: str = "fp32",
    chunk_images: int = 64,
    batch_views: int = 64,
    workers: int = 2,
    rank: int = 0,
    ranks: int = 1,
    progress: bool = True,
) -> CodeStore:
    """Encode every view of every image of `source` into a code store in folder `out`, and open it. Every rank of a job
    calls it.

    Images are dealt to the ranks in whole chunks. Rank 0 writes the store; a chunk whose turn has not come is kept in a
    file of its own meanwhile. Killed at any moment and called again with the same arguments, on any number of ranks, it
    goes on, and ends with the same bytes as an unbroken run of one rank. A folder that already holds this very store is
    opened at once.

    Args:
        tokenizer: float32, in eval mode, on the device to encode on; its config gives image size and channels.
        data: which views, and the share of images held out.
        seed: of small-affine views.
        precision: "fp32", or "bf16": faster and not quite the same codes; the manifest then says which share of them
            differs.
        chunk_images: images between two records on disk. batch_views: views encoded at once. workers: threads that
            decode and crop.

    Raises:
        DataError: no image could be read; the tokenizer is not float32. ConfigError: view settings that ask for absurd
            sizes. StorageError: see StoreWriter.
        Busy: another job is writing to `out`. UserError: the other ranks are gone.
    """
    config = tokenizer.config
    if tokenizer.dtype != torch.float32:
        raise DataError(
            f"prepare: the tokenizer must be float32, got {tokenizer.dtype}: a rounded tokenizer gives other "
            "codes than the one its hash names"
        )
    check_view_settings(data, config.image_size, config.image_channels)
    with writing(out, rank):
        side = config.image_size // config.downsampling
        reader = view_reader(source, data, config.image_size, config.image_channels, seed=seed, workers=workers)
        about = {
            "views": view_names(data),
            "view_settings": view_settings(data, seed),
            "positions": config.positions,
            "grid": (side, side),
            "image_size": config.image_size,
            "image_channels": config.image_channels,
            "codebook": config.codebook,
            "class_names": source.class_names,
            "tokenizer_sha256": tokenizer.weights_hash(),
            "source": source.description(),
            "decoder": reader.decoder,
            "pixels": _PIXELS,
            "precision": precision,
            "held_out_share": data.held_out_share,
            "chunk_images": chunk_images,
            "batch_views": batch_views,
        }
        job = _Job(source, Path(out), tokenizer, reader, data, seed, about, rank, ranks, progress)
        with explain_out_of_memory(f"encode {batch_views} views of {config.image_size} pixels at once"):
            return job.encode_and_finish() if rank == 0 else job.encode_and_wait()


class _Job:
    """One rank's part in making a store."""

    def __init__(
        self,
        source: ImageSource,
        out: Path,
        tokenizer: VQTokenizer,
        reader: ViewReader,
        data: DataConfig,
        seed: int,
        about: dict[str, Any],
        rank: int,
        ranks: int,
        progress: bool,
    ) -> None:
        self.source, self.out, self.tokenizer, self.reader, self.data, self.seed, self.about = (
            source,
            out,
            tokenizer,
            reader,
            data,
            seed,
            about,
        )
        self.rank, self.ranks, self.progress = rank, ranks, progress
        self.chunk_images: int = about["chunk_images"]
        self.name = job_hash(about)

    def encode_and_finish(self) -> CodeStore:
        """Rank 0: its own chunks, and the store."""
        writer = StoreWriter(self.out, self.about)
        more = {}
        if not writer.complete:
            with tqdm(
                total=len(self.source),
                initial=writer.next_index,
                desc="codes",
                unit="image",
                disable=not self.progress,
                dynamic_ncols=True,
            ) as bar:
                self._append_parts(writer, bar)
                for chunk in self._encoded():
                    if chunk.start == writer.next_index:
                        self._append(writer, chunk, bar)
                    else:
                        write_part(self._part(chunk.end), chunk, self.name)
                    self._append_parts(writer, bar)
                self._append_others(writer, bar)
            if writer.rows == 0:
                first = (
                    f"; the first: {writer.skipped[0]['key']}: {writer.skipped[0]['reason']}" if writer.skipped else ""
                )
                raise DataError(f"prepare: none of the {len(self.source)} images could be read{first}")
            if self.about["precision"] == "bf16":
                more["bf16"] = codes_that_differ(self.tokenizer, self._plain_views(), self.about["batch_views"])
            counts = self.reader.counts()
            if self.progress and len(counts) > 1:
                tqdm.write("decoded by rank 0: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
            with suppress(FileNotFoundError):
                shutil.rmtree(self.out / PARTS_FOLDER)
        return writer.finish(
            self.source.labels,
            self.data.held_out_share,
            self.source.skipped,
            more=more,
            held_out=split_of(self.source, self.data.held_out_share)[1],
        )

    def encode_and_wait(self) -> CodeStore:
        """Another rank: its own chunks, each in a file of its own; then wait for rank 0 to finish the store."""
        for chunk in self._encoded():
            write_part(self._part(chunk.end), chunk, self.name)
        self._wait(lambda: is_finished(self.out), "rank 0 has")
        return CodeStore.open(self.out)

    def _encoded(self) -> Iterator[EncodedChunk]:
        """This rank's chunks, but those that are there already: looked for in the order in which a chunk moves, so that
        one on the move is not missed.
        """
        starts = range(0, len(self.source), self.chunk_images)
        spans = [(start, min(start + self.chunk_images, len(self.source))) for start in starts[self.rank :: self.ranks]]
        first = recorded_until(self.out)
        spans = [span for span in spans if span[0] >= first and self._read(span[1]) is None]
        first = recorded_until(self.out)  # rank 0 may have taken some in meanwhile
        spans = [span for span in spans if span[0] >= first]
        encoder = Encoder(self.tokenizer, self.about["precision"], self.about["batch_views"])
        for chunk in read_chunks(self.reader, spans):
            shape = (len(chunk.views), len(self.about["views"]), self.about["positions"])
            codes = (
                encoder(np.concatenate(chunk.views)).reshape(shape) if chunk.views else np.zeros(shape, dtype=np.int64)
            )
            yield EncodedChunk(codes, chunk.labels, chunk.keys, chunk.skipped, chunk.start, chunk.end)

    def _append(self, writer: StoreWriter, chunk: EncodedChunk, bar: tqdm) -> None:
        writer.append(chunk.codes, chunk.labels, chunk.keys, chunk.end, chunk.skipped)
        part = self._part(chunk.end)
        with explain_write_errors(part):
            part.unlink(missing_ok=True)
        bar.update(chunk.end - bar.n)
        bar.set_postfix(skipped=len(writer.skipped))

    def _append_parts(self, writer: StoreWriter, bar: tqdm) -> bool:
        """Move the chunks whose turn has come from files of their own into the store; whether there was one."""
        found = False
        while (
            writer.next_index < len(self.source)
            and (chunk := self._read(min(writer.next_index + self.chunk_images, len(self.source)))) is not None
        ):
            self._append(writer, chunk, bar)
            found = True
        return found

    def _append_others(self, writer: StoreWriter, bar: tqdm) -> None:
        while writer.next_index < len(self.source):
            self._wait(
                lambda: self._append_parts(writer, bar),
                f"the ranks that encode images from {writer.next_index} on have",
            )

    def _wait(self, until: Callable[[], bool], who: str) -> None:
        end, seen = time.monotonic() + _PATIENCE_S, -1
        while not until():
            if (now := recorded_until(self.out)) != seen:
                end, seen = time.monotonic() + _PATIENCE_S, now
            if time.monotonic() > end:
                raise UserError(
                    f"{self.out}: {who} not come on for {_PATIENCE_S / 3600:g} hours; see what it said last, and "
                    "run the same command again"
                )
            time.sleep(_POLL_S)

    def _part(self, end: int) -> Path:
        return self.out / PARTS_FOLDER / f"until-{end:08d}"

    def _read(self, end: int) -> EncodedChunk | None:
        return read_part(self._part(end), self.name, len(self.about["views"]), self.about["positions"])

    def _plain_views(self) -> Tensor:
        """(N, C, H, W) uint8: one view of each of the first images that can be read."""
        indices = np.arange(min(len(self.source), 2 * _COMPARED_IMAGES))
        return collect_views(
            self.source, indices, self.data, self.tokenizer.config, seed=self.seed, plain_only=True, progress=False
        )[:_COMPARED_IMAGES]


@contextmanager
def writing(out: str | Path, rank: int = 0) -> Iterator[None]:
    """Hold `out` for the one job that makes its codes; rank 0 clears what dead ones left half-written. A finished store
    is only read: nothing is held.

    Raises:
        Busy: another job is writing there. DataError: no file system knows such a name.
    """
    if "\0" in str(out):
        raise DataError(f"{out}: expected the name of a folder, got a null byte in it")
    with nullcontext() if is_finished(out) else only_writer(out, "preparing codes"):
        if not is_finished(out) and rank == 0:
            remove_leftovers(out, (*FILES, SKIPPED_FILE, MANIFEST_FILE, PROGRESS_FILE))
        yield
        if is_finished(out) and rank == 0:
            with suppress(OSError):
                (Path(out) / LOCK_FILE).unlink()  # whoever waits for it looks again, and finds the finished store


@contextmanager
def explain_out_of_memory(what: str) -> Iterator[None]:
    """Turn an allocation that fails inside into one line that says what there is no memory to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if (
            isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "allocate memory" in text
            or "out of memory" in text
        ):
            raise UserError(
                f"not enough memory to {what}; choose smaller sizes, or free some and run the same command"
            ) from error
        raise


def skipped_report(store: CodeStore, most: int = 10) -> str:
    """What a store left out, for people: one line per file, `most` at most; empty when nothing was skipped."""
    skipped = store.manifest["skipped"]
    lines = [f"skipped {entry['key']}: {entry['reason']}" for entry in skipped[:most]]
    more = [f"... and {len(skipped) - most} more, listed in {store.path / MANIFEST_FILE}"] * (len(skipped) > most)
    return "\n".join(map(printable, lines + more))


def collect_views(
    source: ImageSource,
    indices: np.ndarray,
    data: DataConfig,
    config: TokenizerConfig,
    *,
    seed: int = 0,
    limit_bytes: int = 2**31,
    plain_only: bool = False,
    progress: bool = True,
) -> Tensor:
    """Views (N, C, H, W) uint8 of the source images `indices`, held in memory: what a tokenizer or a classifier trains
    on; all, or the plain one alone.

    Where all views take more than `limit_bytes`, a fixed random part of them is taken. Unreadable images are left out.

    Raises:
        DataError: none of the images could be read.
    """
    check_view_settings(data, config.image_size, config.image_channels)
    indices = np.asarray(indices)
    names = view_names(data)
    kinds = [plain_view(names)] if plain_only else list(range(len(names)))
    per_image = len(kinds)
    shape = (config.image_channels, config.image_size, config.image_size)
    chosen = np.sort(stable_permutation(len(indices) * per_image, seed)[: max(1, limit_bytes // math.prod(shape))])
    with explain_out_of_memory(f"hold {len(chosen)} views of {config.image_size} pixels"):
        views = np.empty((len(chosen), *shape), dtype=np.uint8)
    filled, reason = 0, ""
    with tqdm(total=len(chosen), desc="views", unit="view", disable=not progress, dynamic_ncols=True) as bar:
        for place, group in groupby(chosen.tolist(), key=lambda pair: pair // per_image):
            wanted, index = [kinds[pair % per_image] for pair in group], int(indices[place])
            bar.update(len(wanted))
            try:
                views[filled : filled + len(wanted)] = read_views(
                    source, index, data, config.image_size, config.image_channels, seed, wanted
                ).views
            except UnreadableImage as error:
                reason = f"; the last: {error}"
                continue
            filled += len(wanted)
    if not filled:
        raise DataError(f"none of the {len(indices)} images could be read{reason}")
    return torch.from_numpy(views[:filled])

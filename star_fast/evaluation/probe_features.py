"""The features that probes read: taken from the frozen model once, kept in memory or, at ImageNet's size, in a folder
of bfloat16 chunks.

A "head" is one block's output at one position; with several depths the heads of one depth lie side by side: (N, depths
* positions, D). On disk every chunk is a file of its own, whole or absent: so a killed extraction goes on, and the
ranks of a job share the work without speaking to each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.data.codes import CodeStore
from star_fast.errors import UserError
from star_fast.evaluation.runs import codes_of
from star_fast.model.transformer import Transformer
from star_fast.storage import (
    StorageError,
    atomic_write_bytes,
    atomic_write_json,
    explain_write_errors,
    read_record,
    remove_leftovers,
    require_regular,
)

BLOCK_IMAGES = 4096  # of a chunk on disk, and of what is judged at once
RECORD_FILE = "features.json"
_WINDOW_BYTES = 2**30  # of the chunks that are in memory, and mixed, together
_PATIENCE_S = 1800  # of rank 0 for the next chunk of another rank
_HINT = "remove the folder, or give another one with --features"


class Features(Protocol):
    """Features of `count` images at `heads` heads, `width` numbers each."""

    @property
    def count(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def width(self) -> int: ...

    def epoch(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """count // batch batches: (batch, heads, width) of any float dtype, and which images they are, (batch,) int64.
        A function of the generator's state.
        """
        ...

    def blocks(self) -> Iterator[Tensor]:
        """The images in order, as their first view shows them: (n, heads, width) of any float dtype."""
        ...


class InMemory:
    """Features held as one tensor for each view, the plain view first: (N, heads, width) float32 each."""

    def __init__(self, views: Sequence[Tensor]) -> None:
        self.views = views
        self.count, self.heads, self.width = views[0].shape

    def epoch(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image in a view of its own draw, all of them mixed."""
        order = torch.randperm(self.count, generator=generator)
        drawn = torch.randint(len(self.views), (self.count,), generator=generator)
        for step in range(self.count // batch):
            chosen = order[step * batch : (step + 1) * batch]
            x = self.views[0][chosen]
            for view in range(1, len(self.views)):
                here = drawn[chosen] == view
                x[here] = self.views[view][chosen[here]]
            yield x, chosen

    def blocks(self) -> Iterator[Tensor]:
        """Pieces of the plain view."""
        yield from self.views[0].split(BLOCK_IMAGES)


@dataclass(frozen=True)
class OnDisk:
    """Features of `count` images in the files of a folder: for each view chunks of BLOCK_IMAGES images, (n, heads,
    width) bfloat16, nothing else in them.
    """

    folder: Path
    name: str  # of this set of images, the beginning of its files' names
    views: int  # the plain view is number 0
    count: int
    heads: int
    width: int

    @property
    def chunks(self) -> int:
        """Files of a view."""
        return -(-self.count // BLOCK_IMAGES)

    def rows(self, chunk: int) -> slice:
        """Which images a chunk holds."""
        return slice(chunk * BLOCK_IMAGES, min((chunk + 1) * BLOCK_IMAGES, self.count))

    def path(self, view: int, chunk: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"{self.name}-view{view}-{chunk:06d}.bf16"

    def size_bytes(self, chunk: int) -> int:
        """Of a chunk's file."""
        rows = self.rows(chunk)
        return 2 * (rows.stop - rows.start) * self.heads * self.width

    def read(self, view: int, chunk: int, into: Tensor) -> int:
        """Fill the first rows of `into` (at least n, heads, width) bfloat16, contiguous; returns n. Raises StorageError
        for a file of another size.

        Read, not mapped: pages of a map would count as this process's memory until the kernel wants them back.
        """
        path, size, rows = self.path(view, chunk), self.size_bytes(chunk), self.rows(chunk)
        found = require_regular(path, "extract the features again")
        if found != size:
            raise StorageError(f"{path}: expected {size} bytes, got {found}; {_HINT}")
        place = into[: rows.stop - rows.start].view(torch.int16).numpy().data.cast("B")
        with open(path, "rb", buffering=0) as file:
            done = 0
            while done < size:
                got = file.readinto(place[done:])
                if not got:
                    raise StorageError(f"{path}: ended after {done} of {size} bytes; {_HINT}")
                done += got
        return rows.stop - rows.start

    def epoch(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks in random order, each in one view drawn for it; as many as fit a window of 1 GiB are mixed image by
        image. What a window leaves over goes into the next one, so that at most batch - 1 images of an epoch are left
        out."""
        order = torch.randperm(self.chunks, generator=generator)
        drawn = torch.randint(self.views, (self.chunks,), generator=generator).tolist()
        window = min(max(1, _WINDOW_BYTES // self.size_bytes(0)), self.chunks)
        room = window * BLOCK_IMAGES + batch
        buffer, images = (
            torch.empty(room, self.heads, self.width, dtype=torch.bfloat16),
            torch.empty(room, dtype=torch.int64),
        )
        filled = 0
        for part in order.split(window):
            for chunk in part.tolist():
                rows = self.rows(chunk)
                count = self.read(drawn[chunk], chunk, buffer[filled:])
                images[filled : filled + count] = torch.arange(rows.start, rows.stop)
                filled += count
            mixed = torch.randperm(filled, generator=generator)
            whole = filled // batch * batch
            for chosen in mixed[:whole].split(batch):
                yield buffer[chosen], images[chosen]
            left = mixed[whole:]
            buffer[: len(left)], images[: len(left)] = buffer[left], images[left]
            filled = len(left)

    def blocks(self) -> Iterator[Tensor]:
        """The chunks of the plain view; each is a view of one buffer, good until the next is asked for."""
        buffer = torch.empty(min(BLOCK_IMAGES, self.count), self.heads, self.width, dtype=torch.bfloat16)
        for chunk in range(self.chunks):
            yield buffer[: self.read(0, chunk, buffer)]


class Wanted(NamedTuple):
    """Which images' features are to be taken."""

    name: str  # "train", "held-out" ...
    rows: Tensor  # (N,) int64 of the store
    views: Sequence[int]  # the store's numbers, the plain one first


@dataclass(frozen=True)
class Identity:
    """Of what a folder holds the features: features.json."""

    weights_sha256: str
    codes_sha256: str
    depths: tuple[int, ...]
    positions: tuple[int, ...]
    sets: tuple[str, ...]  # name, views, images and sha256 of the rows of each
    block_images: int = BLOCK_IMAGES


@torch.inference_mode()
def extract_features(
    model: Transformer,
    store: CodeStore,
    rows: Tensor,
    view: int,
    depths: Sequence[int],
    positions: Sequence[int],
    *,
    batch_images: int = 128,
    device: torch.device | str = "cpu",
    title: str = "features",
    quiet: bool = False,
) -> Tensor:
    """Outputs of the blocks `depths` at `positions` under the null class: (N, depths * P, D) float32 on the CPU, depth
    by depth, for the store's rows (N,).
    """
    model = model.to(device).eval()
    chosen = torch.as_tensor(list(positions), device=device)
    parts = []
    for part in tqdm(rows.split(batch_images), desc=title, unit="batch", leave=False, disable=quiet):
        codes_BT = codes_of(store, part, view).to(device)
        label = torch.full((len(part),), model.null_class, device=device)
        features = model(
            codes_BT[:, : max(positions)], label, blocks=depths, logits=False, last_block=max(depths)
        ).features
        parts.append(torch.cat([features[depth][:, chosen] for depth in depths], dim=1).float().cpu())
    return torch.cat(parts)


def store_features(
    folder: Path,
    model: Transformer,
    store: CodeStore,
    wanted: Sequence[Wanted],
    depths: Sequence[int],
    positions: Sequence[int],
    *,
    rank: int = 0,
    ranks: int = 1,
    batch_images: int = 128,
    device: torch.device | str = "cpu",
) -> list[OnDisk]:
    """This rank's share of the chunks that `folder` lacks, extracted and written; the sets that will be whole when
    every rank is done (see await_all).

    Raises:
        UserError: the folder holds features of other weights, codes or settings, or the disk has no room.
    """
    sets = [
        OnDisk(folder, each.name, len(each.views), len(each.rows), len(depths) * len(positions), model.config.width)
        for each in wanted
    ]
    identity = Identity(
        _weights_hash(model),
        store.manifest["files"]["codes.bin"]["sha256"],
        tuple(depths),
        tuple(positions),
        tuple(map(_named, wanted)),
    )
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, identity)
    everything = [
        (place, view, chunk)
        for place, each in enumerate(sets)
        for view in range(each.views)
        for chunk in range(each.chunks)
    ]
    missing = {
        (place, view, chunk) for place, view, chunk in everything if not os.path.exists(sets[place].path(view, chunk))
    }
    needed, free = sum(sets[place].size_bytes(chunk) for place, _, chunk in missing), shutil.disk_usage(folder).free
    if rank == 0 and needed > free:
        raise UserError(
            f"{folder}: the features that are still to be written take {needed / 2**30:,.1f} GiB, the disk has "
            f"{free / 2**30:,.1f} GiB free; give "
            "another place with --features, or use fewer training images, views or depths"
        )
    # A share of everything, since ranks look at different times
    mine = [each for each in everything[rank::ranks] if each in missing]
    for place, view, chunk in tqdm(mine, desc="features to disk", unit="chunk", leave=False, disable=rank > 0):
        features = extract_features(
            model,
            store,
            wanted[place].rows[sets[place].rows(chunk)],
            wanted[place].views[view],
            depths,
            positions,
            batch_images=batch_images,
            device=device,
            quiet=True,
        )
        atomic_write_bytes(sets[place].path(view, chunk), features.bfloat16().view(torch.int16).numpy().data.cast("B"))
    return sets


def await_all(sets: Sequence[OnDisk], patience_s: float = _PATIENCE_S) -> None:
    """Wait until every rank's chunks are there. Raises UserError when none has come for `patience_s`."""
    missing = [each.path(view, chunk) for each in sets for view in range(each.views) for chunk in range(each.chunks)]
    end = time.monotonic() + patience_s
    while missing := (before := missing) and [path for path in before if not os.path.exists(path)]:
        end = time.monotonic() + patience_s if len(missing) < len(before) else end
        if time.monotonic() > end:
            raise UserError(
                f"{missing[0]}: another rank has not written it for {patience_s:g} s; see what that rank said, "
                "then run the same command: "
                "what is there is kept"
            )
        time.sleep(0.2)
    remove_leftovers(sets[0].folder)


def remove_features(sets: Sequence[OnDisk]) -> None:
    """Remove the sets' files, and their folder if nothing else is in it."""
    folder = sets[0].folder
    for path in (
        *(each.path(view, chunk) for each in sets for view in range(each.views) for chunk in range(each.chunks)),
        folder / RECORD_FILE,
    ):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _claim(folder: Path, identity: Identity) -> None:
    """The folder's record: written if there is none, else it must be ours."""
    if not os.path.exists(folder / RECORD_FILE):
        if any(folder.glob("*.bf16")):
            raise UserError(f"{folder}: holds features without {RECORD_FILE}, which says of what; {_HINT}")
        atomic_write_json(folder / RECORD_FILE, asdict(identity))
        return
    found = asdict(read_record(folder / RECORD_FILE, Identity, _HINT))
    if differing := [name for name, value in asdict(identity).items() if found[name] != value]:
        raise UserError(f"{folder}: holds features of other {', '.join(differing)}; {_HINT}")


def _named(wanted: Wanted) -> str:
    return (
        f"{wanted.name} {list(wanted.views)} {len(wanted.rows)} "
        f"{hashlib.sha256(wanted.rows.numpy().tobytes()).hexdigest()}"
    )


def _weights_hash(model: Transformer) -> str:
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

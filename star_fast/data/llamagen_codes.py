"""LlamaGen's pre-extracted codes to a code store and back: imagenet{S}_codes/{i}.npy of shape (1, A, T),
imagenet{S}_labels/{i}.npy of shape (1,), int64.

Its loader mixes two such folders, of crops at range 1.1 and at range 1.05: of a root NAME_ten_crop and its sibling
NAME_ten_crop_105. In a store they are the views of one image.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from star_fast.data.codes import CodeStore
from star_fast.data.image_source import DataError
from star_fast.data.prepare import writing
from star_fast.data.store_writer import StoreWriter
from star_fast.data.views import MOST_VIEWS, TEN_CROP_VIEWS
from star_fast.locks import LOCK_FILE, only_writer
from star_fast.storage import (
    atomic_write_json,
    explain_write_errors,
    read_bytes,
    read_json,
    remove_leftovers,
    sha256_of_bytes,
    temporary_beside,
)

RANGES = ("1.1", "1.05")  # of the root and of its sibling
_PROGRESS_FILE = "unfinished.json"
_EXPORT_CHUNK = 4096  # images between two records on disk
_MOST_PADDING = 1024  # images that an extraction by as many processes may repeat at its end
_MOST_CLASSES = 2**20  # that are named here, where nobody names them
_MOST_NPY_BYTES = 2**26  # of one image's codes
_HINT = "complete the extraction first"


def sibling_of(root: str | Path) -> Path | None:
    """The folder whose codes LlamaGen's loader would mix with those of `root`, where there is one."""
    root = Path(root)
    sibling = root.with_name(root.name + "_105")
    return sibling if root.name.endswith("ten_crop") and os.path.isdir(sibling) else None


def import_llamagen_codes(
    root: str | Path,
    out: str | Path,
    tokenizer_hash: str,
    *,
    sibling: str | Path | None = None,
    codebook: int = 16384,
    image_size: int = 256,
    image_channels: int = 3,
    class_names: tuple[str, ...] | None = None,
    held_out_share: float = 0.0,
    chunk_images: int = 1024,
    progress: bool = True,
) -> CodeStore:
    """Make a code store of the files that LlamaGen's extraction writes.

    Args:
        tokenizer_hash: `weights_hash()` of the released tokenizer that made the codes.
        sibling: the root with the codes of the same images at crop range 1.05, where `root` has those at 1.1: views A
            ... 2A-1 (see sibling_of).
        class_names: in the order of the labels; None names them 'class 0', 'class 1' ...

    Raises:
        DataError: no files, a number missing in their sequence, a damaged file, a shape or label that does not fit, a
            sibling of other images.
        StorageError: see StoreWriter. Busy: another job is writing to `out`.
    """
    root = Path(root)
    roots = [root] if sibling is None else [root, Path(sibling)]
    codes_folders, labels_folders = (
        [one / f"imagenet{image_size}_{what}" for one in roots] for what in ("codes", "labels")
    )
    counts = [_count(folder) for folder in codes_folders]
    if max(counts) - min(counts) > _MOST_PADDING:
        raise DataError(
            f"{codes_folders[1]}: expected the codes of the same images as {codes_folders[0]}, {counts[0]}, got "
            f"{counts[1]}"
        )
    numbers = range(min(counts))
    # An extraction by several processes repeats the first images at its end until all processes have as many: more, or
    # fewer, with another number of them.
    padding = [
        {
            "key": f"{i}.npy",
            "reason": f"only in {codes_folders[counts.index(max(counts))]}: "
            "the end of an extraction by several processes",
        }
        for i in range(min(counts), max(counts))
    ]
    labels = np.array(
        [_label(labels_folders[0] / f"{i}.npy") for i in _barred(numbers, "labels", progress)], dtype=np.int64
    )
    for folder in labels_folders[1:]:
        for i in _barred(numbers, "labels, range 1.05", progress):
            if (label := _label(folder / f"{i}.npy")) != labels[i]:
                raise DataError(
                    f"{folder / f'{i}.npy'}: label {label}, but {labels[i]} in {labels_folders[0]}; expected the "
                    "codes of the same images"
                )
    classes = len(class_names) if class_names is not None else min(int(labels.max()) + 1, _MOST_CLASSES)
    if not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"{labels_folders[0]}: labels must lie in 0 ... {classes - 1}, got {labels.min()} ... {labels.max()}"
        )
    names = class_names if class_names is not None else tuple(f"class {i}" for i in range(classes))
    first = codes_folders[0] / "0.npy"
    shape = _load(first).shape
    side = math.isqrt(shape[-1]) if shape else 0
    if len(shape) != 3 or shape[0] != 1 or not 1 <= shape[1] <= MOST_VIEWS or not side or side * side != shape[2]:
        raise DataError(f"{first}: expected shape (1, views, T) with square T, got {shape}")
    source: dict[str, Any] = {
        "kind": "LlamaGen codes",
        "folder": root.resolve().name,
        "images": len(numbers),
        "sha256_of_labels": sha256_of_bytes(labels.tobytes()),
    }
    if sibling is not None:
        source["sibling"] = roots[1].resolve().name
    with writing(out):
        writer = StoreWriter(
            out,
            {
                "views": _view_names(shape[1], len(roots)),
                "view_settings": {"kind": "as extracted by LlamaGen"},
                "positions": shape[2],
                "grid": (side, side),
                "image_size": image_size,
                "image_channels": image_channels,
                "codebook": codebook,
                "class_names": names,
                "tokenizer_sha256": tokenizer_hash,
                "source": source,
                "held_out_share": held_out_share,
                "chunk_images": chunk_images,
            },
        )
        starts = range(writer.next_index, 0 if writer.complete else len(numbers), chunk_images)
        with tqdm(
            total=len(numbers),
            initial=writer.next_index,
            desc="import",
            unit="image",
            disable=not progress,
            dynamic_ncols=True,
        ) as bar:
            for start in starts:
                chunk = numbers[start : start + chunk_images]
                codes = np.concatenate([_views(codes_folders, i, shape, first.parent) for i in chunk])
                writer.append(
                    codes.astype(np.int64),
                    labels[start : start + len(chunk)].tolist(),
                    [f"{i}.npy" for i in chunk],
                    start + len(chunk),
                )
                bar.update(len(chunk))
        return writer.finish(labels, held_out_share, padding)


def export_llamagen_codes(
    store: CodeStore, root: str | Path, *, sibling: str | Path | None = None, progress: bool = True
) -> list[Path]:
    """Write the rows of a store as the files that LlamaGen's training reads; returns the roots written, one or, for
    views at two crop ranges, two.

    Killed at any moment and called again with the same store it goes on.

    Args:
        sibling: where the second crop range goes; None: `root` with `_105` at its end, where LlamaGen's loader looks
            for it if `root` ends with `ten_crop`.

    Raises:
        DataError: a root that holds other codes, or views at more than two ranges. StorageError: it cannot be written.
            Busy: another job is writing there.
    """
    root = Path(root)
    groups = _by_range(store.views)
    if len(groups) > 2 or len({len(group) for group in groups}) != 1:
        raise DataError(
            f"{store.path}: its {len(store.views)} views are of {len(groups)} crop ranges; LlamaGen's layout has "
            "room for one or two with the same "
            "views"
        )
    roots = [root, Path(sibling) if sibling is not None else root.with_name(root.name + "_105")][: len(groups)]
    job = {
        "store": sha256_of_bytes(
            "".join(entry["sha256"] for _, entry in sorted(store.manifest["files"].items())).encode()
        ),
        "images": len(store),
    }
    with only_writer(root, "exporting codes"):
        begun = (
            read_json(root / _PROGRESS_FILE, f"delete {root} to start afresh")
            if os.path.exists(root / _PROGRESS_FILE)
            else {}
        )
        start = begun.get("next") if begun and {**begun, "next": 0} == {**job, "next": 0} else 0
        if not isinstance(start, int) or not 0 <= start <= len(store):
            raise DataError(
                f"{root / _PROGRESS_FILE}: expected a number of images up to {len(store)}, got {str(start)[:60]}; "
                f"delete {root} to start afresh"
            )
        folders = [tuple(one / f"imagenet{store.image_size}_{what}" for what in ("codes", "labels")) for one in roots]
        if (begun and {**begun, "next": 0} != {**job, "next": 0}) or (
            not begun and any(_holds_something(folder) for pair in folders for folder in pair)
        ):
            raise DataError(
                f"{root}: already holds codes, of another store or finished; choose another folder or delete this one"
            )
        with explain_write_errors(root):
            for folder in (folder for pair in folders for folder in pair):
                folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(folder)
        atomic_write_json(root / _PROGRESS_FILE, {**job, "next": start})
        with tqdm(
            total=len(store), initial=start, desc="export", unit="image", disable=not progress, dynamic_ncols=True
        ) as bar:
            for first in range(start, len(store), _EXPORT_CHUNK):
                rows = range(first, min(first + _EXPORT_CHUNK, len(store)))
                for (codes_folder, labels_folder), views in zip(folders, groups, strict=True):
                    codes = store.codes(torch.arange(rows.start, rows.stop), views).numpy()
                    for i in rows:
                        _save(codes_folder / f"{i}.npy", codes[i - first : i - first + 1])
                        _save(labels_folder / f"{i}.npy", store.labels[i : i + 1].numpy())
                        bar.update(len(folders) == 1 or views is groups[-1])
                os.sync()  # once for thousands of small files, before the record says that they are there
                atomic_write_json(root / _PROGRESS_FILE, {**job, "next": rows.stop})
        with explain_write_errors(root):
            (root / _PROGRESS_FILE).unlink()
            (root / LOCK_FILE).unlink(missing_ok=True)
    return roots


def _view_names(views: int, roots: int) -> tuple[str, ...]:
    """Names of LlamaGen's views, with the crop range where there are two."""
    names = {10: TEN_CROP_VIEWS, 2: ("centre", "mirrored centre")}.get(
        views, tuple(f"view {view}" for view in range(views))
    )
    return names if roots == 1 else tuple(f"{name}, range {crop_range}" for crop_range in RANGES for name in names)


def _by_range(views: tuple[str, ...]) -> list[list[int]]:
    """The numbers of the views of each crop range, by the ends of their names."""
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(views):
        groups.setdefault(name.partition(", range ")[2], []).append(number)
    return list(groups.values())


def _count(folder: Path) -> int:
    """How many files 0.npy, 1.npy ... a folder holds. Raises DataError where there are none or one is missing."""
    numbers = sorted(int(path.stem) for path in folder.glob("*.npy") if re.fullmatch("0|[1-9][0-9]{0,17}", path.stem))
    if not numbers:
        raise DataError(
            f"{folder}: no code files; expected 0.npy, 1.npy ... as LlamaGen's extract_codes_c2i.py writes them"
        )
    if numbers[-1] != len(numbers) - 1:
        gap = next(i for i, number in enumerate(numbers) if i != number)
        raise DataError(f"{folder}: {gap}.npy is missing although {numbers[-1]}.npy exists; {_HINT}")
    return len(numbers)


def _views(folders: list[Path], number: int, shape: tuple[int, ...], first: Path) -> np.ndarray:
    """The codes of one image from every root: (1, roots * A, T)."""
    arrays = []
    for folder in folders:
        arrays.append(_load(folder / f"{number}.npy"))
        if arrays[-1].shape != shape:
            where = "0.npy" if folder == first else str(first / "0.npy")
            raise DataError(f"{folder / f'{number}.npy'}: expected shape {shape} as in {where}, got {arrays[-1].shape}")
    return np.concatenate(arrays, axis=1)


def _label(path: Path) -> int:
    label = _load(path)
    if label.size != 1 or not -1 <= (value := int(label.reshape(()))) < 2**31:
        raise DataError(f"{path}: expected one label below 2^31, got {label.reshape(-1)[:3]} of shape {label.shape}")
    return value


def _load(path: Path) -> np.ndarray:
    """The whole numbers in a .npy file. What its header asks for must be what the file holds: nothing is allocated on
    its word.
    """
    try:
        data = io.BytesIO(read_bytes(path, _HINT, _MOST_NPY_BYTES))
        version = np.lib.format.read_magic(data)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, by_columns, dtype = read_header(data)
        content = data.read()
        if dtype.kind not in "iu" or math.prod(shape) * dtype.itemsize != len(content) or min(shape, default=0) < 0:
            raise ValueError(f"{len(content)} bytes cannot be whole numbers {dtype} of shape {shape}")
        return np.frombuffer(content, dtype=dtype).reshape(shape, order="F" if by_columns else "C")
    except Exception as error:  # the header is a Python literal, and NumPy's readers of it fail in many ways
        raise DataError(
            f"{path}: missing or not a NumPy file ({' '.join(str(error).split())[:200]}); {_HINT}"
        ) from error


def _save(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all; the caller syncs."""
    temporary = temporary_beside(path)
    with explain_write_errors(path):
        with open(temporary, "wb") as file:
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        os.replace(temporary, path)


def _holds_something(folder: Path) -> bool:
    return os.path.isdir(folder) and any(os.scandir(folder))


def _barred(numbers: Iterable[int], what: str, progress: bool) -> Iterable[int]:
    return tqdm(numbers, desc=what, unit="file", disable=not progress, dynamic_ncols=True)

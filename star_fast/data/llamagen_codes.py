"""LlamaGen's pre-extracted codes, one .npy an image, to a code store."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from star_fast.data.codes import CodeStore
from star_fast.data.prepare import writing
from star_fast.data.sources import DataError
from star_fast.data.store_writer import StoreWriter
from star_fast.data.views import MOST_VIEWS, TEN_CROP_VIEWS
from star_fast.storage import read_bytes, sha256_of_bytes

_MOST_CLASSES = 2**20  # that are named here, where nobody names them
_MOST_NPY_BYTES = 2**26  # of one image's codes


def import_llamagen_codes(root: str | Path, out: str | Path, tokenizer_hash: str, *, codebook: int = 16384, image_size: int = 256,
                          image_channels: int = 3, class_names: tuple[str, ...] | None = None, held_out_share: float = 0.0,
                          chunk_images: int = 1024, progress: bool = True) -> CodeStore:
    """Make a code store of the files that LlamaGen's extraction writes: imagenet{S}_codes/{i}.npy (1, A, T) and imagenet{S}_labels/{i}.npy (1,).

    Args:
        tokenizer_hash: `weights_hash()` of the released tokenizer that made the codes.
        class_names: in the order of the labels; None names them 'class 0', 'class 1' ...

    Raises:
        DataError: no files, a number missing in their sequence, a damaged file, a shape or label that does not fit. StorageError: see StoreWriter.
        Busy: another job is writing to `out`.
    """
    root = Path(root)
    codes_folder, labels_folder = (root / f"imagenet{image_size}_{what}" for what in ("codes", "labels"))
    numbers = sorted(int(path.stem) for path in codes_folder.glob("*.npy") if re.fullmatch("0|[1-9][0-9]*", path.stem))
    if not numbers:
        raise DataError(f"{codes_folder}: no code files; expected 0.npy, 1.npy ... as LlamaGen's extract_codes_c2i.py writes them")
    if numbers[-1] != len(numbers) - 1:
        gap = next(i for i, number in enumerate(numbers) if i != number)
        raise DataError(f"{codes_folder}: {gap}.npy is missing although {numbers[-1]}.npy exists; complete the extraction first")
    labels = np.array([_label(labels_folder / f"{i}.npy") for i in numbers], dtype=np.int64)
    classes = len(class_names) if class_names is not None else min(int(labels.max()) + 1, _MOST_CLASSES)
    if not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(f"{labels_folder}: labels must lie in 0 ... {classes - 1}, got {labels.min()} ... {labels.max()}")
    names = class_names if class_names is not None else tuple(f"class {i}" for i in range(classes))
    shape = _load(codes_folder / "0.npy").shape
    side = math.isqrt(shape[-1]) if shape else 0
    if len(shape) != 3 or shape[0] != 1 or not 1 <= shape[1] <= MOST_VIEWS or not side or side * side != shape[2]:
        raise DataError(f"{codes_folder / '0.npy'}: expected shape (1, views, T) with square T, got {shape}")
    views = {10: TEN_CROP_VIEWS, 2: ("centre", "mirrored centre")}.get(shape[1], tuple(f"view {view}" for view in range(shape[1])))
    with writing(out):
        writer = StoreWriter(out, {
            "views": views, "view_settings": {"kind": "as extracted by LlamaGen"}, "positions": shape[2], "grid": (side, side), "image_size": image_size,
            "image_channels": image_channels, "codebook": codebook, "class_names": names, "tokenizer_sha256": tokenizer_hash,
            "source": {"kind": "LlamaGen codes", "folder": root.resolve().name, "images": len(numbers), "sha256_of_labels": sha256_of_bytes(labels.tobytes())},
            "held_out_share": held_out_share, "chunk_images": chunk_images})
        starts = range(writer.next_index, 0 if writer.complete else len(numbers), chunk_images)
        with tqdm(starts, desc="import", unit=f"{chunk_images} images", disable=not progress, dynamic_ncols=True) as bar:
            for start in bar:
                chunk = numbers[start: start + chunk_images]
                arrays = [_load(codes_folder / f"{i}.npy") for i in chunk]
                if wrong := next((i for i, array in zip(chunk, arrays, strict=True) if array.shape != shape), None):
                    raise DataError(f"{codes_folder / f'{wrong}.npy'}: expected shape {shape} as in 0.npy, got {arrays[wrong - start].shape}")
                writer.append(np.concatenate(arrays).astype(np.int64), labels[chunk].tolist(), [f"{i}.npy" for i in chunk], start + len(chunk))
        return writer.finish(labels, held_out_share)


def _label(path: Path) -> int:
    label = _load(path)
    if label.size != 1 or not -1 <= (value := int(label.reshape(()))) < 2**31:
        raise DataError(f"{path}: expected one label below 2^31, got {label.reshape(-1)[:3]} of shape {label.shape}")
    return value


def _load(path: Path) -> np.ndarray:
    """The whole numbers in a .npy file. What its header asks for must be what the file holds: nothing is allocated on its word."""
    try:
        data = io.BytesIO(read_bytes(path, "complete the extraction first", _MOST_NPY_BYTES))
        version = np.lib.format.read_magic(data)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_columns, dtype = read_header(data)
        content = data.read()
        if dtype.kind not in "iu" or math.prod(shape) * dtype.itemsize != len(content) or min(shape, default=0) < 0:
            raise ValueError(f"{len(content)} bytes cannot be whole numbers {dtype} of shape {shape}")
        return np.frombuffer(content, dtype=dtype).reshape(shape, order="F" if by_columns else "C")
    except Exception as error:  # the header is a Python literal, and NumPy's readers of it fail in many ways
        raise DataError(f"{path}: missing or not a NumPy file ({' '.join(str(error).split())[:200]}); complete the extraction first") from error

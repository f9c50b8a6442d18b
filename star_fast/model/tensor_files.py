"""Weights files (.pt and .safetensors), read without trusting them, and modules filled from them.

A file's own table of contents comes first: names, types, shapes and places, each checked against the file's length. So
a module is compared with the shapes before it takes memory, and each tensor is read straight into its place.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from star_fast.errors import UserError
from star_fast.host_memory import physical_bytes
from star_fast.model.bounded_file import BoundedFile, Damaged, StoredTensor, are_sizes, contiguous, open_bounded, short
from star_fast.model.torch_files import describe
from star_fast.storage import parse_json

SomeModule = TypeVar("SomeModule", bound=nn.Module)
_NAMES_SHOWN = 6  # of each list in an error line
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of a safetensors file; one of 1000 tensors takes 0.1 MB. Each byte may become twenty in memory
_MOST_HEADER_BYTES = 2**22
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class TensorFile(NamedTuple):
    """An open weights file."""

    file: BoundedFile
    content: Any  # tensors by name; in a .pt file possibly nested, and among plain data
    metadata: dict[str, str]  # of a .safetensors file


@contextlib.contextmanager
def open_tensors(path: str | Path, hint: str) -> Iterator[TensorFile]:
    """Open a .safetensors file, or else one that torch.save wrote.

    Raises:
        UserError: truncated, damaged, holding what could run code, or larger inside than outside. StorageError with
            `hint`: missing, or no ordinary file.
    """
    with open_bounded(path, hint) as file:
        if file.path.suffix != ".safetensors":
            yield TensorFile(file, describe(file, "a torch checkpoint"), {})
            return
        try:
            content, metadata = _safetensors(file)
        except Damaged as error:
            raise UserError(
                f"{path}: truncated or not a safetensors file ({short(error, 200)}); copy or download it again"
            ) from error
        yield TensorFile(file, content, metadata)


class Undrawn(TorchFunctionMode):
    """Within it modules are made without the random numbers of torch.nn.init: their weights are memory that nobody has
    written to, which takes no time and, until they are replaced, no room.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch.nn.init's functions give their tensor back as it is; all others run."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def hold(module: SomeModule, dtype: torch.dtype, source: str | Path) -> SomeModule:
    """A module without memory (on the meta device), now with some on the CPU, in eval mode, to be filled. Raises
    UserError: more than this machine has.
    """
    needed = sum(tensor.numel() for tensor in module.state_dict().values()) * dtype.itemsize
    if needed > physical_bytes():
        raise UserError(
            f"{source}: its weights take {needed / 2**30:,.1f} GiB of memory in {dtype}, this machine has "
            f"{physical_bytes() / 2**30:,.1f} GiB"
        )
    return module.to(dtype).to_empty(device="cpu").eval()


def fill(module: nn.Module, weights: Mapping[str, StoredTensor], file: BoundedFile) -> None:
    """Read `weights`, which fit (`require_fit`), into the module, casting to its dtype. Raises UserError naming the
    first that is not finite.
    """
    state = module.state_dict()
    for name in sorted(state, key=lambda name: weights[name].start):
        file.read(weights[name], state[name])
    require_finite(state, f"{file.path}")


def require_fit(module: nn.Module, weights: Mapping[str, Any], source: str | Path) -> None:
    """Raises UserError unless `weights` (tensors or StoredTensors) are exactly the module's: one line that lists what
    is of another shape, missing, unexpected, or not of floating point."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    reshaped = [
        f"{name}: expected {shape}, found {tuple(weights[name].shape)}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    recast = [
        f"{name} in {weights[name].dtype}"
        for name in expected
        if name in weights and weights[name].dtype not in _FLOATS
    ]
    differences = [
        f"{what} {some(names, '; ')}"
        for what, names in (
            ("other shapes:", reshaped),
            ("missing:", missing),
            ("unexpected:", unexpected),
            ("neither float32, bfloat16, float16 nor float64:", recast),
        )
        if names
    ]
    if differences:
        raise UserError(f"{source}: these weights are not of the model that was expected; {' | '.join(differences)}")


def require_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError naming the first of `weights` that holds NaN or an infinity. Nothing of a tensor's size is
    allocated.
    """
    for name, tensor in weights.items():
        if not all(math.isfinite(end) for end in torch.stack(torch.aminmax(tensor.detach())).tolist()):
            raise UserError(
                f"{source}: {name} is not finite (holds NaN or infinite numbers): the file is damaged, or its "
                "training diverged; "
                "use an earlier checkpoint, or train with a smaller learning rate"
            )


def some(names: Collection[str], separator: str = ", ") -> str:
    """The first few names, and how many more."""
    shown = [short(name, 160) for name in list(names)[:_NAMES_SHOWN]]
    return (separator.join(shown) or "nothing") + (
        f"{separator}and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    )


def _safetensors(file: BoundedFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of the format that huggingface.co/docs/safetensors describes: bytes of the header, header,
    numbers without gap or overlap.
    """
    (length,) = struct.unpack("<Q", file.bytes(0, 8))
    if length > _MOST_HEADER_BYTES:
        raise Damaged(f"a header of {length:,} bytes; expected at most {_MOST_HEADER_BYTES:,}")
    try:
        header = parse_json(file.bytes(8, length))
    except ValueError as error:
        raise Damaged(f"header: {error}") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Damaged("header: expected tensors by name, and metadata that is text")
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    end = 0
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise Damaged(
                f"{short(name)}: {dtype} {shape} in bytes {start} to {stop}, where {end} is the next free one"
            )
        end = stop
    if 8 + length + end != file.size:
        raise Damaged(f"{8 + length + end:,} bytes are described, the file has {file.size:,}")
    return {
        name: StoredTensor(dtype, shape, contiguous(shape), 8 + length + start)
        for name, (dtype, shape, start, _) in entries.items()
    }, metadata


def _entry(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    dtype, shape, offsets = (
        (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if isinstance(entry, dict)
        else (None, None, None)
    )
    if (
        not isinstance(dtype, str)
        or dtype not in _DTYPES
        or not isinstance(shape, list)
        or not are_sizes(shape)
        or not are_sizes(offsets)
        or len(offsets) != 2
    ):
        raise Damaged(f"{short(name)}: expected dtype, shape and data_offsets of a tensor")
    return _DTYPES[dtype], tuple(shape), offsets[0], offsets[1]

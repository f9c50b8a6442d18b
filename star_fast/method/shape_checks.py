"""Arguments checked against the shapes that docstrings give, in the name of the function that was called."""

from __future__ import annotations

import torch
from torch import Tensor

_KINDS = {torch.int64: "int64", torch.bool: "bool"}


def check_shapes(function: str, **arguments: tuple[Tensor, str] | tuple[Tensor, str, torch.dtype]) -> dict[str, int]:
    """Check tensors against shapes written in letters: `check_shapes("f", q=(q, "B T D"), label=(label, "B",
    torch.int64))`.

    A letter stands for the size that it first met; a number for itself. Without a dtype a tensor is floating point, of
    the dtype that the first such tensor has; all are on one device. Values are not looked at, so nothing waits for a
    GPU.

    Returns:
        The sizes by letter.

    Raises:
        TypeError: no tensor, or another dtype. ValueError: another shape or device. The line begins with `function`.
    """
    sizes: dict[str, int] = {}
    first, first_float = next(iter(arguments)), ""
    for name, (tensor, pattern, *kind) in arguments.items():
        letters = pattern.split()
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor {_written(letters)}, got {type(tensor).__name__}")
        known = {letter: sizes[letter] for letter in letters if letter in sizes}
        expected = [int(letter) if letter.isdecimal() else sizes.get(letter) for letter in letters]
        if (
            tensor.ndim != len(letters)
            or any(size not in (None, found) for size, found in zip(expected, tensor.shape, strict=True))
            or 0 in tensor.shape
        ):
            told = f" with {', '.join(f'{letter} = {size}' for letter, size in known.items())}" if known else ""
            raise ValueError(
                f"{function}: {name} must be {_written(letters)}{told}, every size at least 1, got shape "
                f"{tuple(tensor.shape)}"
            )
        sizes |= {letter: size for letter, size in zip(letters, tensor.shape, strict=True) if not letter.isdecimal()}
        if kind and tensor.dtype != kind[0]:
            raise TypeError(f"{function}: {name} must be {_KINDS.get(kind[0], kind[0])}, got {tensor.dtype}")
        if not kind:
            first_float = first_float or name
            like = arguments[first_float][0].dtype
            if not tensor.is_floating_point() or tensor.dtype != like:
                wanted = "floating point" if name == first_float else f"{like} like {first_float}"
                raise TypeError(f"{function}: {name} must be {wanted}, got {tensor.dtype}")
        if tensor.device != arguments[first][0].device:
            raise ValueError(
                f"{function}: {name} must be on {arguments[first][0].device} like {first}, got {tensor.device}"
            )
    return sizes


def _written(letters: list[str]) -> str:
    return f"({', '.join(letters)}{',' if len(letters) == 1 else ''})"

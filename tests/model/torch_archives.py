"""Torch files put together by hand: any pickle, any members, any lie about sizes. And a bound on the memory that
reading one may take.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import resource
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


class Run:
    """A storage that the archive's member data/KEY holds."""

    def __init__(self, key: str, length: int, kind: Any = torch.FloatStorage) -> None:
        self.id = ("storage", kind, key, "cpu", length)


class Described:
    """A tensor as a file may describe it, true or not."""

    def __init__(self, run: Any, offset: Any, shape: Any, stride: Any) -> None:
        self.arguments = (run, offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.id if isinstance(value, Run) else None


def pickled(content: Any, protocol: int = 2) -> bytes:
    """The pickle of a torch file."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(content)
    return buffer.getvalue()


def archive(
    path: Path, data: bytes, members: Mapping[str, bytes] | None = None, *, compression: int = zipfile.ZIP_STORED
) -> Path:
    """A torch file of this pickle and these storages."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        for name, content in (members or {}).items():
            file.writestr(f"archive/{name}", content)
    return path


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """The same members, written anew."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@contextlib.contextmanager
def at_most(mebibytes: int) -> Iterator[None]:
    """Within the block this process may take so much more memory; asking for more is an error there and then."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (mebibytes << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

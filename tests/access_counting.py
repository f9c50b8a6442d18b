"""Counts the bytes that Triton kernels load and store, in Triton's interpreter.

Every active lane of every load and store counts with its element's size: what the kernel asks of the memory system.
`distinct` counts each address once a launch: what must come from DRAM if caches hold whatever is read again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter


@dataclass
class Launch:
    """One kernel launch and the addresses it touched."""

    kernel: str
    # Element size in bytes -> addresses of each instruction
    loads: dict[int, list[np.ndarray]] = field(default_factory=dict)
    stores: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def loaded_bytes(self, distinct: bool = False) -> int:
        """Bytes loaded; each address once if `distinct`."""
        return _total(self.loads, distinct)

    def stored_bytes(self, distinct: bool = False) -> int:
        """Bytes stored; each address once if `distinct`."""
        return _total(self.stores, distinct)

    def moved_bytes(self, distinct: bool = False) -> int:
        """Bytes loaded and stored."""
        return self.loaded_bytes(distinct) + self.stored_bytes(distinct)


def _total(accesses: dict[int, list[np.ndarray]], distinct: bool) -> int:
    return sum(
        size * (len(np.unique(np.concatenate(addresses))) if distinct else sum(map(len, addresses)))
        for size, addresses in accesses.items()
    )


@contextlib.contextmanager
def count_accesses() -> Iterator[list[Launch]]:
    """Within the block, every interpreted kernel launch is noted: yields the growing list."""
    launches: list[Launch] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    call, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    atomic_rmw, atomic_cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def note(kind: str, pointers: Any, mask: Any = None) -> None:
        addresses = pointers.data.ravel()
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, pointers.data.shape).ravel()]
        size = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        getattr(launches[-1], kind).setdefault(size, []).append(addresses.copy())

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(Launch(self.fn.__name__))
        return call(self, *args, **kwargs)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note("loads", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note("stores", pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def counted_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("loads", pointers, mask)
        note("stores", pointers, mask)
        return atomic_rmw(self, operation, pointers, value, mask, *rest)

    def counted_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        note("loads", pointers)
        note("stores", pointers)
        return atomic_cas(self, pointers, *rest)

    with (
        mock.patch.object(executor, "__call__", counted_call),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "create_atomic_rmw", counted_rmw),
        mock.patch.object(builder, "create_atomic_cas", counted_cas),
    ):
        yield launches

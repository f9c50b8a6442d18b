"""What a program tells the disk, and in which order: whether something is flushed before it counts can be seen without
a power cut.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest


class DiskEvent(NamedTuple):
    """One call: "sync" of a path, "rename" of a path to another, or "remove" of a path."""

    kind: str
    path: str
    target: str = ""


def watch_disk(monkeypatch: pytest.MonkeyPatch) -> list[DiskEvent]:
    """Every fsync, rename and removal of a file by this process from now on, in order."""
    events: list[DiskEvent] = []
    fsync = os.fsync

    def synced(descriptor: Any) -> None:
        fsync(descriptor)
        events.append(
            DiskEvent(
                "sync",
                os.readlink(f"/proc/self/fd/{descriptor if isinstance(descriptor, int) else descriptor.fileno()}"),
            )
        )

    def moving(move: Any) -> Any:
        def moved(source: Any, target: Any, **more: Any) -> None:
            events.append(DiskEvent("rename", os.path.abspath(source), os.path.abspath(target)))
            move(source, target, **more)

        return moved

    def removing(remove: Any) -> Any:
        def removed(path: Any, **more: Any) -> None:
            if not more:  # with a folder's descriptor the name alone says nothing
                events.append(DiskEvent("remove", os.path.abspath(path)))
            remove(path, **more)

        return removed

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, moving(getattr(os, name)))
    for name in ("unlink", "remove"):
        monkeypatch.setattr(os, name, removing(getattr(os, name)))
    return events

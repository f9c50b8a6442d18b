"""A power cut finds a checkpoint whole or not at all: what the disk is told, and when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from star_fast.training import checkpoint
from tests.disk_events import watch_disk
from tests.training import ranks_main
from tests.training.ranks_main import settings
from tests.training.store import write_store


def test_a_checkpoint_takes_its_name_when_all_of_it_is_on_the_disk_and_then_the_name_is_too(
    one_rank: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path / "codes")
    engine, batches = ranks_main.start(settings(store), store, one_rank)
    engine.step(batches.step(0), 0, 0.01)
    events = watch_disk(monkeypatch)
    final = checkpoint.save(engine, store, tmp_path / "run", 1, 1)
    named = next(place for place, event in enumerate(events) if event.target == str(final))
    temporary, on_disk = Path(events[named].path), set()
    for kind, path, target in events[:named]:
        if kind == "sync":
            on_disk.add(path)
        elif kind == "rename":  # of a file, or of a folder with all that is in it
            on_disk |= {target + known[len(path) :] for known in on_disk if f"{known}/".startswith(f"{path}/")}
    there = {str(temporary / path.relative_to(final)) for path in final.rglob("*")}
    assert len(there) > 5
    assert there | {str(temporary)} <= on_disk
    assert ("sync", str(final.parent), "") in events[named + 1 :]

"""A folder that is whole or absent: written beside its place, then renamed; and what saves that were killed leave."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from star_fast.errors import UserError
from star_fast.storage import explain_write_errors, sync_folder


@contextlib.contextmanager
def replaced_folder(folder: Path, members: set[str], marker: str) -> Iterator[Path]:
    """Within the block the caller fills the folder that it gets; after it, that folder stands in `folder`'s place.

    Args:
        members: what `folder` may hold already; it is removed.
        marker: a file that every whole folder has.

    Leftovers of saves to `folder` that were killed are cleared first, and what such a save had moved out of the way
    comes back; so there must be one writer of a folder at a time.

    Raises:
        UserError: other files are in `folder`. StorageError: the place cannot be written. After these, and after
            whatever the block raises, the older folder, if any, is in its place.
    """
    with explain_write_errors(folder):
        _recover(folder, marker)
        _refuse_foreign_files(folder, members)
    staging, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    try:
        yield staging
        with explain_write_errors(folder):
            if folder.exists():
                os.rename(folder, replaced)
            try:
                os.rename(staging, folder)
            except OSError:
                if replaced.exists():
                    os.rename(replaced, folder)
                raise
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def require_in_place(folder: Path, marker: str) -> None:
    """Raise UserError where a save was killed between its two renames, so that `folder` is not there but beside it."""
    if not os.path.lexists(folder) and (moved := _moved_away(folder, marker)):
        raise UserError(
            f"{folder}: not found: a save was killed while it replaced this model; the older one is in {moved.name}: "
            f"rename that to {folder.name}, or resume the run, which saves again"
        )


def _leftovers(folder: Path) -> dict[Path, str]:
    """What earlier saves to `folder` left beside it, each with its suffix: "tmp" (half written) or "old" (the one that
    was being replaced).
    """
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9]+\.(tmp|old)")
    try:
        return {entry: match[1] for entry in folder.parent.iterdir() if (match := pattern.fullmatch(entry.name))}
    except (OSError, ValueError):
        return {}


def _moved_away(folder: Path, marker: str) -> Path | None:
    """The folder, with a file `marker`, that a killed save had moved out of its place; of several the newest."""
    kept = [entry for entry, suffix in _leftovers(folder).items() if suffix == "old" and os.path.isfile(entry / marker)]
    return max(kept, key=os.path.getmtime, default=None)


def _recover(folder: Path, marker: str) -> None:
    """Clear what killed saves have left beside `folder`; what one of them had moved away comes back."""
    if not os.path.lexists(folder) and (moved := _moved_away(folder, marker)):
        os.rename(moved, folder)
    for entry in _leftovers(folder):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _refuse_foreign_files(folder: Path, members: set[str]) -> None:
    """Replacing a folder removes what is in it: only files of a model may be."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: a file; expected a folder to save the model in")
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in members) if folder.exists() else []
    if foreign:
        raise UserError(
            f"{folder}: holds other files than a model's ({', '.join(foreign[:6])}); save the model in a folder "
            "of its own"
        )

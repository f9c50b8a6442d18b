"""Where the files of one sampling job lie, and what dead processes left among them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from star_fast.generation.record import JobPlan, read_plan
from star_fast.generation.sample_config import SampleConfig
from star_fast.locks import LOCK_FILE
from star_fast.storage import StorageError, remove_leftovers

_OURS_IN_PARTS = re.compile(r"plan\.json|unfinished\.npz|unfinished\.journal|batch-\d{7,}\.npy")


class JobFiles:
    """Names and places of a job, from its settings alone.

    Attributes:
        out: the .npz, which takes this name last.
        record, grid: beside it; grid is None where none is wanted.
        pngs: the folder of single images, or None.
        parts: the folder of what is not finished: `plan_file`, batches drawn, `unfinished` (the .npz so far), the lock.
        images, batch_images, batches: how many in all, in a batch, and how many files of batches there will be.
    """

    def __init__(self, config: SampleConfig) -> None:
        self.images, self.batch_images = config.images, config.batch_images
        self.batches = -(-config.images // config.batch_images)
        self.out = Path(config.out)
        self.record = self.out.with_suffix(".json")
        self.grid = self.out.with_suffix(".png") if config.grid else None
        self.pngs = self.out.with_suffix("") if config.png_folder else None
        self.parts = self.out.with_name(self.out.name + ".parts")
        self.plan_file = self.parts / "plan.json"
        self.unfinished = self.parts / "unfinished.npz"

    def span(self, number: int) -> tuple[int, int]:
        """First image of a batch, and one past its last."""
        return number * self.batch_images, min((number + 1) * self.batch_images, self.images)

    def part(self, number: int) -> Path:
        """A finished batch that is not in the .npz yet."""
        return self.parts / f"batch-{number:07d}.npy"

    def png(self, image: int) -> Path:
        """A single image; only where these are wanted."""
        assert self.pngs is not None, "asked only where PNGs are wanted"
        return self.pngs / f"{image:06d}.png"

    def missing_pngs(self) -> Iterator[int]:
        """The single images that are wanted and not there."""
        return (image for image in range(self.images) if not self.png(image).exists()) if self.pngs else iter(())

    def _beside(self) -> set[str]:
        """The names of this job's files beside each other."""
        return {self.out.name, self.record.name, self.out.with_suffix(".png").name}

    def has_leftovers(self) -> bool:
        """Whether temporary files of a dead process lie about."""
        names = "|".join(map(re.escape, self._beside()))
        leftover = re.compile(rf"\.(?:{names})\.\d+\.tmp")
        with contextlib.suppress(OSError):  # a folder that may not be listed
            return any(leftover.fullmatch(entry.name) for entry in self.out.parent.iterdir()) or bool(
                self.pngs and any(self.pngs.glob(".*.png.*.tmp"))
            )
        return False

    def remove_leftovers(self, rank: int, ranks: int) -> None:
        """Remove the temporary files that dead processes left of what only this rank writes: other ranks of this job
        are at work beside it.
        """
        own = range(rank, self.batches, ranks)
        if rank == 0:
            remove_leftovers(self.out.parent, self._beside())
        remove_leftovers(self.parts, {self.part(number).name for number in own})
        if self.pngs:
            remove_leftovers(self.pngs, {self.png(image).name for number in own for image in range(*self.span(number))})

    def remove_parts(self, plan: JobPlan) -> None:
        """Remove the folder of parts of a job that is done, the lock last. Files that are not ours stay, and the folder
        with them.
        """
        try:
            if self.plan_file.exists() and read_plan(self.plan_file, "") != plan:
                return  # what another job, interrupted under this name, has drawn
            remove_leftovers(self.parts)
            for entry in self.parts.iterdir():
                if _OURS_IN_PARTS.fullmatch(entry.name):
                    entry.unlink(missing_ok=True)
            (self.parts / LOCK_FILE).unlink(missing_ok=True)
            self.parts.rmdir()
        except (OSError, StorageError):  # other ranks clean up too, and nothing depends on it
            return

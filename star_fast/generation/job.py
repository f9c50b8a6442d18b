"""The files of a sampling job: who writes them, in which order they come and go, and what a job that starts again
believes of those it finds.

Images are dealt to ranks in whole batches: batch j holds images j * batch_images ..., rank j mod ranks draws it. A
finished batch becomes a file in `<out>.parts/`; rank 0 appends these, in order, to the unfinished .npz in the same
folder and removes them. So at any moment every batch is in one of two places or not drawn at all, and a rerun, on any
number of ranks, draws what is in neither. Whatever is found is checked against its checksum first.

The ranks of one job hold the lock in that folder together. The .npz takes its name last: where it is, its record and
its grid are; the folder goes after that.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from star_fast.errors import UserError, printable
from star_fast.generation.batch import EXACT_IMAGES, Drawer
from star_fast.generation.grid import draw_grid, save_png
from star_fast.generation.label_plan import plan_labels
from star_fast.generation.limits import require_disk, require_drawable_grid, require_memory
from star_fast.generation.npz_file import LABELS_MEMBER, check_npz, map_images
from star_fast.generation.npz_stream import NpzStream, images_appended
from star_fast.generation.parts import read_part, write_part
from star_fast.generation.record import JobPlan, read_finished, read_plan, write_finished, write_plan
from star_fast.generation.render import Rendering
from star_fast.generation.sample_config import SampleConfig
from star_fast.locks import LOCK_FILE, Busy, only_writer
from star_fast.storage import StorageError, explain_write_errors, read_json, remove_leftovers, require_regular

_POLL_S = 0.05
_PATIENCE_S = 3600  # rank 0 gives up when no other rank has delivered a batch for so long
_RECORD_HINT = (
    "expected the protocol record of an earlier sampling run; delete it and the .npz to draw again, or choose another "
    "--out"
)
_OURS_IN_PARTS = re.compile(r"plan\.json|unfinished\.npz|unfinished\.journal|batch-\d{7,}\.npy")


@dataclass
class Outcome:
    """What one call did."""

    drawn: int = 0  # images drawn on this rank
    added: int = 0  # images that came into the file, of all ranks
    seconds: float = 0.0


class Job:
    """One sampling job, seen by one of its ranks.

    Args:
        classes: labels in the order asked for.
        class_names: of all the model's classes.
    """

    def __init__(
        self,
        config: SampleConfig,
        drawer: Drawer,
        plan: JobPlan,
        classes: Sequence[int],
        class_names: Sequence[str],
        rank: int,
        ranks: int,
    ) -> None:
        self.config, self.drawer, self.plan = config, drawer, plan
        self.classes, self.class_names, self.rank, self.ranks = classes, class_names, rank, ranks
        self.out = Path(config.out)
        self.record = self.out.with_suffix(".json")
        self.grid = self.out.with_suffix(".png") if config.grid else None
        self.pngs = self.out.with_suffix("") if config.png_folder else None
        self.parts = self.out.with_name(self.out.name + ".parts")
        self.plan_file = self.parts / "plan.json"
        self.unfinished = self.parts / "unfinished.npz"
        self.batches = -(-config.images // config.batch_images)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64, one an image."""
        return plan_labels(self.config.images, self.classes, self.config.labels, self.config.seed)

    def do(self) -> Outcome:
        """This rank's share, and for rank 0 the files.

        Raises:
            UserError, StorageError: the job cannot start or go on, or what is there is another job's or damaged. Busy:
                another job is at it.
        """
        if self.finished():
            self._check_finished()
            self._tidy_finished()
            return Outcome()
        self._require_own_record()
        require_disk(self.config, self.drawer.image_shape, self.parts)
        require_memory(self.drawer)
        if self.grid:
            require_drawable_grid(self.config, self.drawer.image_shape, len(self.classes))
        outcome = Outcome()
        try:
            with only_writer(self.parts, "sampling"):
                if not self.finished():  # another process may have come first, or the other ranks may be done already
                    outcome = self._run()
                else:
                    self._check_finished()
                if self.out.exists():
                    self._remove_parts()
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(self._where_it_stands()) from interrupt
        except (StorageError, FileNotFoundError):
            if not self.finished():
                raise
            # The folder of parts was removed under this process, by one that had finished the job
            self._check_finished()
        return outcome

    def finished(self) -> bool:
        """Whether this very job is done; a finished job with other settings under the same name is an error."""
        with explain_write_errors(self.out):  # an over-long name
            if not self.out.exists():
                return False
        require_regular(self.out, "expected a name for the images' file; choose another --out")
        if not self.record.exists():
            raise UserError(
                f"{self.out}: exists without its protocol record {self.record.name}; choose another --out or delete it"
            )
        self.plan.require_same(
            read_finished(self.record, _RECORD_HINT)[0], self.record, "choose another --out or delete both files"
        )
        return True

    def _where_it_stands(self) -> str:
        if self.out.exists():
            return f"all images are in {self.out}; the same command checks them"
        kept = images_appended(self.unfinished, self.config.images, self.drawer.image_shape, self.config.batch_images)
        return f"{kept} of {self.config.images} images are safe in {self.parts}; the same command goes on from there"

    def _require_own_record(self) -> None:
        """What lies under the record's name will be replaced: only a record may be."""
        if self.record.exists() and not {"plan", "run"} <= read_json(self.record, _RECORD_HINT).keys():
            raise UserError(
                f"{self.record}: is no record of a sampling run, and would be replaced by one; choose another --out"
            )

    def _check_finished(self) -> None:
        if self.rank:
            return  # rank 0 looks
        checksums = read_finished(self.record, _RECORD_HINT)[1]
        hint = "delete it and run the same command again"
        least = self.config.images * int(np.prod(self.drawer.image_shape))
        if (there := require_regular(self.out, hint)) < least:  # before labels are planned for what a record claims
            raise StorageError(f"{self.out}: damaged: expected more than {least:,} bytes, it has {there:,}; {hint}")
        check_npz(
            self.out,
            self.config.images,
            self.drawer.image_shape,
            self.labels,
            int(checksums.images_crc32, 16),
            checksums.frame,
            hint,
        )

    def _tidy_finished(self) -> None:
        """Of a job that is done: draw the pictures asked for that are missing, remove what a kill in the last moments
        left.
        """
        if self.rank:
            return
        lacking = (self.grid is not None and not self.grid.exists()) or any(True for _ in self._missing_pngs())
        if not lacking and not self.parts.exists() and not self._has_leftovers():
            return
        try:
            with only_writer(self.parts, "sampling"):
                self._remove_leftovers(range(self.config.images))
                if lacking:
                    self._draw_pictures(map_images(self.out, self.config.images, self.drawer.image_shape))
                self._remove_parts()
        except (Busy, StorageError):  # somebody else is tidying, or the place is read-only: all images are there
            if lacking:
                raise

    def _run(self) -> Outcome:
        started, outcome = time.perf_counter(), Outcome()
        self._claim()
        self._remove_leftovers(
            image for number in range(self.rank, self.batches, self.ranks) for image in range(*self._span(number))
        )
        stream = self._open_stream() if self.rank == 0 else None
        kept = stream.written if stream else 0
        exact_cost = None
        if stream and self.config.exact:
            exact_cost = round(self.drawer.exact_cost(), 2)
            print(
                f"exact mode: {self.drawer.images_in_batch} images in fixed blocks of {EXACT_IMAGES} takes "
                f"{exact_cost} times as long as in one piece"
            )
        # Given only where it must be: the environment's TQDM_DISABLE counts otherwise
        quiet = {} if stream else {"disable": True}
        with tqdm(total=self.config.images, initial=kept, desc="sampling", unit=" images", **quiet) as progress:
            # On CUDA a batch's pixels are still being computed while the next one's codes are drawn; on the CPU a batch
            # is done when it returns.
            in_flight: deque[tuple[int, Rendering]] = deque()
            for number in self._to_draw(stream):
                in_flight.append((number, self._start(number)))
                if len(in_flight) > 1 or in_flight[0][1].done is None:
                    outcome.drawn += self._deliver(*in_flight.popleft())
                    self._collect(stream, progress, outcome)
            while in_flight:
                outcome.drawn += self._deliver(*in_flight.popleft())
            if stream:
                self._collect_all(stream, progress, outcome)
        outcome.seconds = time.perf_counter() - started
        if stream:
            outcome.added = stream.written - kept
            self._draw_pictures(stream.map())
            run = {
                "ranks": self.ranks,
                "drawn_here_images": outcome.drawn,
                "here_s": round(outcome.seconds, 2),
                "exact_cost_ratio": exact_cost,
            }
            arrays = {LABELS_MEMBER: self.labels}
            write_finished(self.record, self.plan, run, stream.crc, stream.frame_crc(**arrays))
            stream.finish(self.out, **arrays)
        return outcome

    def _claim(self) -> None:
        """Write the plan, or see that the parts that are there belong to the same one."""
        advice = f"delete {self.parts} to start again, or choose another --out"
        if self.plan_file.exists():
            self.plan.require_same(read_plan(self.plan_file, advice), self.plan_file, advice)
        else:
            write_plan(self.plan, self.plan_file)

    def _open_stream(self) -> NpzStream:
        stream = NpzStream(self.unfinished, self.config.images, self.drawer.image_shape, self.config.batch_images)
        if stream.lost or stream.cut > self.config.batch_images:
            _say(
                f"{self.unfinished}: {stream.cut} of {stream.cut + stream.written} images are not what the "
                "journal vouches for; they are drawn again"
            )
        return stream

    def _to_draw(self, stream: NpzStream | None) -> list[int]:
        """The batches to draw here: this rank's, and those that other ranks may have taken for safe in a file that rank
        0 has cut since.
        """
        lost = range(stream.written, stream.written + stream.lost) if stream else range(0)
        numbers = {
            *range(self.rank, self.batches, self.ranks),
            *(image // self.config.batch_images for image in lost[:: self.config.batch_images]),
        }
        return [number for number in sorted(numbers) if not self._drawn(number)]

    def _drawn(self, number: int) -> bool:
        """Whether a batch need not be drawn. Looks in the order in which a batch moves, so that one on the move is not
        missed.
        """
        return (
            self._good_part(number) is not None
            or self.out.exists()
            or images_appended(self.unfinished, self.config.images, self.drawer.image_shape, self.config.batch_images)
            >= self._span(number)[1]
        )

    def _good_part(self, number: int) -> np.ndarray | None:
        """A batch's images from its part file; None where there is none. A damaged one is removed."""
        part = self._part(number)
        if not part.exists():
            return None
        first, end = self._span(number)
        try:
            return read_part(part, (end - first, *self.drawer.image_shape))
        except StorageError as error:
            if part.exists():  # rank 0 may have appended and removed it meanwhile
                _say(f"{error}; it is drawn again")
                with explain_write_errors(part):
                    part.unlink(missing_ok=True)
        return None

    def _span(self, number: int) -> tuple[int, int]:
        """First image of a batch, and one past its last."""
        return number * self.config.batch_images, min((number + 1) * self.config.batch_images, self.config.images)

    def _part(self, number: int) -> Path:
        return self.parts / f"batch-{number:07d}.npy"

    def _png(self, image: int) -> Path:
        assert self.pngs is not None, "asked only where PNGs are wanted"
        return self.pngs / f"{image:06d}.png"

    def _start(self, number: int) -> Rendering:
        return self.drawer.start(*self._span(number), self.labels)

    def _deliver(self, number: int, rendering: Rendering) -> int:
        """Wait for a batch's pixels and put them on the disk; the part file comes last and says that all is there."""
        images = rendering.wait().numpy()
        if self.pngs:
            for index, image in zip(range(*self._span(number)), images, strict=True):
                save_png(image, self._png(index))
        write_part(self._part(number), images)
        return len(images)

    def _collect(self, stream: NpzStream | None, progress: tqdm, outcome: Outcome) -> bool:
        """Move the parts that come next into the file; whether there were any. Rank 0 itself draws again what it finds
        damaged.
        """
        moved = False
        while stream and stream.written < self.config.images:
            number = stream.written // self.config.batch_images
            if not (part := self._part(number)).exists():
                break
            images = self._good_part(number)
            if images is None:
                outcome.drawn += self._deliver(number, self._start(number))
                continue
            stream.append(images)
            part.unlink(missing_ok=True)
            progress.update(len(images))
            moved = True
        return moved

    def _collect_all(self, stream: NpzStream, progress: tqdm, outcome: Outcome) -> None:
        """Collect until nothing is missing, waiting for other ranks."""
        last = time.monotonic()
        while stream.written < self.config.images:
            if self._collect(stream, progress, outcome):
                last = time.monotonic()
            elif time.monotonic() - last > _PATIENCE_S:
                raise UserError(
                    f"{self.parts}: batch {stream.written // self.config.batch_images} has not come for "
                    f"{_PATIENCE_S} s; "
                    "if a rank died, start the job again: it goes on from here"
                )
            else:
                time.sleep(_POLL_S)

    def _draw_pictures(self, images: np.ndarray) -> None:
        """The grid, and single images that an earlier run, without png_folder, did not write."""
        for image in self._missing_pngs():
            save_png(images[image], self._png(image))
        if self.grid:
            save_png(
                draw_grid(
                    images, self.labels, self.class_names, rows=self.config.grid_rows, columns=self.config.grid_columns
                ),
                self.grid,
            )

    def _missing_pngs(self) -> Iterator[int]:
        return (
            (image for image in range(self.config.images) if not self._png(image).exists()) if self.pngs else iter(())
        )

    def _beside(self) -> set[str]:
        """The names of this job's files beside each other."""
        return {self.out.name, self.record.name, self.out.with_suffix(".png").name}

    def _has_leftovers(self) -> bool:
        names = "|".join(map(re.escape, self._beside()))
        leftover = re.compile(rf"\.(?:{names})\.\d+\.tmp")
        with contextlib.suppress(OSError):  # a folder that may not be listed
            return any(leftover.fullmatch(entry.name) for entry in self.out.parent.iterdir()) or bool(
                self.pngs and any(self.pngs.glob(".*.png.*.tmp"))
            )
        return False

    def _remove_leftovers(self, own_images: Iterator[int] | range) -> None:
        """Remove the temporary files that dead processes left of what only this rank writes: other ranks of this job
        are at work beside it.
        """
        if self.rank == 0:
            remove_leftovers(self.out.parent, self._beside())
        remove_leftovers(self.parts, {self._part(number).name for number in range(self.rank, self.batches, self.ranks)})
        if self.pngs:
            remove_leftovers(self.pngs, {self._png(image).name for image in own_images})

    def _remove_parts(self) -> None:
        """Remove the folder of parts of a job that is done, the lock last. Files that are not ours stay, and the folder
        with them.
        """
        try:
            if self.plan_file.exists() and read_plan(self.plan_file, "") != self.plan:
                return  # what another job, interrupted under this name, has drawn
            remove_leftovers(self.parts)
            for entry in self.parts.iterdir():
                if _OURS_IN_PARTS.fullmatch(entry.name):
                    entry.unlink(missing_ok=True)
            (self.parts / LOCK_FILE).unlink(missing_ok=True)
            self.parts.rmdir()
        except (OSError, StorageError):  # other ranks clean up too, and nothing depends on it
            return


def _say(line: str) -> None:
    """Tell the user, above the progress bar."""
    with contextlib.suppress(OSError):
        tqdm.write(printable(line), file=sys.stderr)

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
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from star_fast.errors import UserError, printable
from star_fast.generation.batch import EXACT_IMAGES, Drawer
from star_fast.generation.grid import draw_grid, save_png
from star_fast.generation.job_files import JobFiles
from star_fast.generation.label_plan import plan_labels
from star_fast.generation.limits import require_disk, require_drawable_grid, require_memory
from star_fast.generation.npz_file import LABELS_MEMBER, check_npz, map_images
from star_fast.generation.npz_stream import NpzStream, images_appended
from star_fast.generation.parts import read_part, write_part
from star_fast.generation.record import JobPlan, read_finished, read_plan, write_finished, write_plan
from star_fast.generation.render import Rendering
from star_fast.generation.sample_config import SampleConfig
from star_fast.locks import Busy, only_writer
from star_fast.storage import StorageError, explain_write_errors, read_json, require_regular

_POLL_S = 0.05
_PATIENCE_S = 3600  # rank 0 gives up when no other rank has delivered a batch for so long
_RECORD_HINT = (
    "expected the protocol record of an earlier sampling run; delete it and the .npz to draw again, or choose another "
    "--out"
)


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
        self.files = JobFiles(config)

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
        require_disk(self.config, self.drawer.image_shape, self.files.parts)
        require_memory(self.drawer)
        if self.files.grid:
            require_drawable_grid(self.config, self.drawer.image_shape, len(self.classes))
        outcome = Outcome()
        try:
            with only_writer(self.files.parts, "sampling"):
                if not self.finished():  # another process may have come first, or the other ranks may be done already
                    outcome = self._run()
                else:
                    self._check_finished()
                if self.files.out.exists():
                    self.files.remove_parts(self.plan)
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
        files = self.files
        with explain_write_errors(files.out):  # an over-long name
            if not files.out.exists():
                return False
        require_regular(files.out, "expected a name for the images' file; choose another --out")
        if not files.record.exists():
            raise UserError(
                f"{files.out}: exists without its protocol record {files.record.name}; choose another --out or delete "
                "it"
            )
        self.plan.require_same(
            read_finished(files.record, _RECORD_HINT)[0], files.record, "choose another --out or delete both files"
        )
        return True

    def _where_it_stands(self) -> str:
        files = self.files
        if files.out.exists():
            return f"all images are in {files.out}; the same command checks them"
        return (
            f"{self._appended()} of {self.config.images} images are safe in {files.parts}; the same command goes on "
            "from there"
        )

    def _require_own_record(self) -> None:
        """What lies under the record's name will be replaced: only a record may be."""
        files = self.files
        if files.record.exists() and not {"plan", "run"} <= read_json(files.record, _RECORD_HINT).keys():
            raise UserError(
                f"{files.record}: is no record of a sampling run, and would be replaced by one; choose another --out"
            )

    def _appended(self) -> int:
        """Images that are in the unfinished .npz for good."""
        config = self.config
        return images_appended(self.files.unfinished, config.images, self.drawer.image_shape, config.batch_images)

    def _check_finished(self) -> None:
        if self.rank:
            return  # rank 0 looks
        files = self.files
        checksums = read_finished(files.record, _RECORD_HINT)[1]
        hint = "delete it and run the same command again"
        least = self.config.images * int(np.prod(self.drawer.image_shape))
        if (there := require_regular(files.out, hint)) < least:  # before labels are planned for what a record claims
            raise StorageError(f"{files.out}: damaged: expected more than {least:,} bytes, it has {there:,}; {hint}")
        check_npz(
            files.out,
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
        files = self.files
        lacking = (files.grid is not None and not files.grid.exists()) or any(True for _ in files.missing_pngs())
        if not lacking and not files.parts.exists() and not files.has_leftovers():
            return
        try:
            with only_writer(files.parts, "sampling"):
                files.remove_leftovers(0, 1)
                if lacking:
                    self._draw_pictures(map_images(files.out, self.config.images, self.drawer.image_shape))
                files.remove_parts(self.plan)
        except (Busy, StorageError):  # somebody else is tidying, or the place is read-only: all images are there
            if lacking:
                raise

    def _run(self) -> Outcome:
        started, outcome = time.perf_counter(), Outcome()
        self._claim()
        self.files.remove_leftovers(self.rank, self.ranks)
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
            write_finished(self.files.record, self.plan, run, stream.crc, stream.frame_crc(**arrays))
            stream.finish(self.files.out, **arrays)
        return outcome

    def _claim(self) -> None:
        """Write the plan, or see that the parts that are there belong to the same one."""
        advice = f"delete {self.files.parts} to start again, or choose another --out"
        if self.files.plan_file.exists():
            self.plan.require_same(read_plan(self.files.plan_file, advice), self.files.plan_file, advice)
        else:
            write_plan(self.plan, self.files.plan_file)

    def _open_stream(self) -> NpzStream:
        stream = NpzStream(self.files.unfinished, self.config.images, self.drawer.image_shape, self.config.batch_images)
        if stream.lost or stream.cut > self.config.batch_images:
            _say(
                f"{self.files.unfinished}: {stream.cut} of {stream.cut + stream.written} images are not what the "
                "journal vouches for; they are drawn again"
            )
        return stream

    def _to_draw(self, stream: NpzStream | None) -> list[int]:
        """The batches to draw here: this rank's, and those that other ranks may have taken for safe in a file that rank
        0 has cut since.
        """
        lost = range(stream.written, stream.written + stream.lost) if stream else range(0)
        numbers = {
            *range(self.rank, self.files.batches, self.ranks),
            *(image // self.config.batch_images for image in lost[:: self.config.batch_images]),
        }
        return [number for number in sorted(numbers) if not self._drawn(number)]

    def _drawn(self, number: int) -> bool:
        """Whether a batch need not be drawn. Looks in the order in which a batch moves, so that one on the move is not
        missed.
        """
        return (
            self._good_part(number) is not None
            or self.files.out.exists()
            or self._appended() >= self.files.span(number)[1]
        )

    def _good_part(self, number: int) -> np.ndarray | None:
        """A batch's images from its part file; None where there is none. A damaged one is removed."""
        part = self.files.part(number)
        if not part.exists():
            return None
        first, end = self.files.span(number)
        try:
            return read_part(part, (end - first, *self.drawer.image_shape))
        except StorageError as error:
            if part.exists():  # rank 0 may have appended and removed it meanwhile
                _say(f"{error}; it is drawn again")
                with explain_write_errors(part):
                    part.unlink(missing_ok=True)
        return None

    def _start(self, number: int) -> Rendering:
        return self.drawer.start(*self.files.span(number), self.labels)

    def _deliver(self, number: int, rendering: Rendering) -> int:
        """Wait for a batch's pixels and put them on the disk; the part file comes last and says that all is there."""
        images = rendering.wait().numpy()
        if self.files.pngs:
            for index, image in zip(range(*self.files.span(number)), images, strict=True):
                save_png(image, self.files.png(index))
        write_part(self.files.part(number), images)
        return len(images)

    def _collect(self, stream: NpzStream | None, progress: tqdm, outcome: Outcome) -> bool:
        """Move the parts that come next into the file; whether there were any. Rank 0 itself draws again what it finds
        damaged.
        """
        moved = False
        while stream and stream.written < self.config.images:
            number = stream.written // self.config.batch_images
            if not (part := self.files.part(number)).exists():
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
                    f"{self.files.parts}: batch {stream.written // self.config.batch_images} has not come for "
                    f"{_PATIENCE_S} s; "
                    "if a rank died, start the job again: it goes on from here"
                )
            else:
                time.sleep(_POLL_S)

    def _draw_pictures(self, images: np.ndarray) -> None:
        """The grid, and single images that an earlier run, without png_folder, did not write."""
        for image in self.files.missing_pngs():
            save_png(images[image], self.files.png(image))
        if self.files.grid:
            save_png(
                draw_grid(
                    images, self.labels, self.class_names, rows=self.config.grid_rows, columns=self.config.grid_columns
                ),
                self.files.grid,
            )


def _say(line: str) -> None:
    """Tell the user, above the progress bar."""
    with contextlib.suppress(OSError):
        tqdm.write(printable(line), file=sys.stderr)

"""DeepSpeed's checkpoint files, written and read by this project's rules: nothing that a file holds is executed, and a full disk is an error, not a crash.

DeepSpeed's own engine unpickles freely (0.19.8: `weights_only=False`). This one takes its place; it is handed to the training engine once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from star_fast.model.torch_files import load_plain, write_archive
from star_fast.storage import StorageError, explain_write_errors

_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank")


def allowed_classes() -> list[Callable | tuple[Callable, str]]:
    """All that DeepSpeed 0.19 stores beyond tensors and plain data, ZeRO 0 to 2: three records without behaviour at loading."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def load(path: str | Path, map_location: Any = None) -> Any:
    """The content of one of DeepSpeed's .pt files.

    Raises:
        UserError: damaged, or it holds anything but tensors, plain data and the allowed classes.
    """
    return load_plain(Path(path), allowed=allowed_classes(), map_location=map_location)


def save(content: Any, path: str | Path) -> None:
    """Write a .pt file and flush it to the disk. Raises StorageError: the disk is full, or the place cannot be written."""
    with explain_write_errors(path), open(path, "wb", buffering=2**20) as file:
        write_archive(content, file)
        file.flush()
        os.fsync(file.fileno())


def take_over(engine: Any) -> CheckpointFiles:
    """Make `engine` (a DeepSpeedEngine) read and write its files through here; returns what stands in for DeepSpeed's checkpoint engine."""
    engine.checkpoint_engine = CheckpointFiles()
    engine._copy_recovery_script = lambda folder: None  # scripts have no place in a checkpoint: the masters are exported as safetensors
    return engine.checkpoint_engine


class CheckpointFiles:
    """What DeepSpeed calls a checkpoint engine (its interface, 0.16 to 0.19).

    Attributes: problem (the first error of a write since `begin`, in words, or None). DeepSpeed saves between barriers, where an exception of one rank
    would leave the others waiting: so errors are kept, and checkpoint.py lets all ranks agree on them afterwards.
    """

    name = "star_fast"

    def __init__(self) -> None:
        self.problem: str | None = None
        self._opened: dict[str, Any] = {}

    def begin(self) -> None:
        """Forget earlier problems."""
        self.problem = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, or keep the problem."""
        self._attempt(lambda: save(state_dict, path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder, or keep the problem."""
        self._attempt(lambda: os.makedirs(path, exist_ok=exist_ok), path)

    def open(self, folder: Path, rank: int) -> None:
        """Read the files that DeepSpeed will ask for, so that what is wrong with one is known before its collectives begin.

        Raises:
            UserError: see load.
        """
        self._opened = {str(path): load(path) for path in sorted(folder.glob("*.pt"))
                        if (match := _OF_RANK.search(path.name)) is None or int(match[1]) == rank}

    def load(self, path: str, map_location: Any = None) -> Any:
        """The content of one file, under the allow-list."""
        return self._opened.pop(str(path)) if str(path) in self._opened else load(path, map_location)

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def commit(self, info: Any) -> bool:
        """checkpoint.py makes the folder final."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """One replica writes what all have."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Writing ends before save returns."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """torch.save keeps tensors that share memory together, so DeepSpeed must copy views out first."""
        return True

    def set_commit_info(self, info: Any) -> None:
        """Of decoupled engines only."""

    def get_commit_info(self) -> None:
        """Of decoupled engines only."""

    def cleanup(self) -> None:
        """Nothing is held."""

    def _attempt(self, job: Callable[[], None], path: str | Path = "") -> None:
        try:
            with explain_write_errors(path):
                job()
        except StorageError as error:
            self.problem = self.problem or str(error)

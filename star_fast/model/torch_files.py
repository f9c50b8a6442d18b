"""torch's .pt files, read without running anything that they hold and without allocating more than their own bytes call for."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from star_fast.errors import UserError
from star_fast.storage import require_regular


def load_plain(path: Path, *, allowed: Sequence[Callable | tuple[Callable, str]] = (), map_location: Any = "cpu", meaning: str = "a torch checkpoint") -> Any:
    """The content of a .pt file: tensors, plain data and the `allowed` classes.

    Args:
        meaning: what the file should be, for messages.

    Raises:
        UserError: missing, no ordinary file, damaged, or it holds anything else.
    """
    require_regular(path, f"expected {meaning}")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        foreign = re.search(r"Unsupported (?:global|class|operand)[^.]*?: (?:GLOBAL )?([\w.]+)", str(error))
        if foreign:
            raise UserError(f"{path}: holds {foreign[1]}, which is neither tensor nor plain data; such files can run code and are not loaded") from error
        raise UserError(f"{path}: not {meaning}") from error
    except Exception as error:  # anything can come of garbage that is read as a pickle
        raise UserError(f"{path}: truncated or not {meaning} ({type(error).__name__}); copy or download it again") from error

"""One process group of one rank for the tests that build engines in this process. It stays: DeepSpeed keeps hold of the
first one for good.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[torch.device]:
    """The only rank's device. The environment is left as it was found: a launcher's variables would mislead later
    tests.
    """
    from star_fast.training.ranks import start_ranks

    before = {name: os.environ.pop(name, None) for name in RENDEZVOUS}
    try:
        yield start_ranks()[2]
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

"""One rank of a job that prepares codes, for tests: `python -m tests.data.ranks_main FOLDER OUT PAUSE_S`, rank and
ranks as a launcher sets them.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from star_fast.config import DataConfig
from star_fast.data.prepare import prepare
from star_fast.data.sources import ImageFolder
from star_fast.model.tokenizer import VQTokenizer
from tests.data.pictures import tiny_tokenizer

DATA = DataConfig(crop_ranges=(1.3,), held_out_share=0.25)


def main(folder: str, out: str, pause_s: float) -> None:
    """Prepare, waiting a little before each batch so that a test can kill in between; says when it begins."""
    encode = VQTokenizer.encode

    def slow(tokenizer: VQTokenizer, images: torch.Tensor) -> torch.Tensor:
        time.sleep(pause_s)
        return encode(tokenizer, images)

    VQTokenizer.encode = slow
    print("begins", flush=True)
    prepare(
        ImageFolder(Path(folder)),
        out,
        tiny_tokenizer(),
        DATA,
        chunk_images=2,
        batch_views=20,
        rank=int(os.environ["RANK"]),
        ranks=int(os.environ["WORLD_SIZE"]),
        progress=False,
    )
    print("done", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))

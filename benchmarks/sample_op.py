"""Token sampling against LlamaGen's way (sort, softmax, multinomial) and against reading the logits once.

    python benchmarks/sample_op.py [--quick]

Logits as a decoding step leaves them: in the caches of a CPU (4 MiB for 64 rows), as far as they fit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import llamagen_style, memory, timing
from benchmarks.rows import Given, Piece, Row
from star_fast.ops import dispatch, sample_tokens
from star_fast.ops.sample_tokens import cost

ROWS, VOCAB = 64, 16384
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k 2000": {"top_k": 2000},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 2000, top-p 0.9": {"top_k": 2000, "top_p": 0.9},
    "guidance 2.0, top-k 2000": {"top_k": 2000, "guidance": 2.0},
    "temperature 0": {"temperature": 0.0},
}


def measure(device: str, quick: bool, ceilings: timing.Ceilings) -> list[Row]:
    """The rows of all settings."""
    return [row for piece in pieces(Given(device, quick, ceilings)) for row in piece.run()]


def pieces(given: Given) -> list[Piece]:
    """For each setting: naive, the backends that run here, and one pass over the logits ("read once", their largest
    entry: the least of any sampler).
    """
    logits, uncond = _logits(given.device)
    return [
        Piece(f"sample_tokens {ROWS} x {VOCAB} float32, {name}", partial(_rows, name, logits, uncond, given))
        for name in SETTINGS
    ]


def _logits(device: str) -> Tensor:
    return (2 * torch.randn(2, ROWS, VOCAB, generator=torch.Generator().manual_seed(0))).to(device)


def _rows(setting: str, logits: Tensor, uncond: Tensor, given: Given) -> list[Row]:
    index, settings = torch.arange(ROWS, device=logits.device), SETTINGS[setting]
    asked = {**settings, **({"uncond": uncond} if "guidance" in settings else {})}
    candidates = {"naive": lambda: _naive(logits, **asked), "read once": lambda: _read(logits, asked.get("uncond"))}
    for backend in dispatch.backends("sample_tokens"):

        def run(backend: str = backend) -> Tensor:
            return sample_tokens(logits, seed=0, image_index=index, position=0, **asked, backend=backend)

        try:
            run()
        except dispatch.BackendUnavailable:
            continue
        candidates[backend] = run
    times = timing.compare(candidates, given.device, seconds=0.2 if given.quick else 2.0, repeats=(5, 200))
    peaks = {who: memory.allocated_mib(run, given.device) for who, run in candidates.items()}
    moved = cost({"logits": logits, **asked})
    least_ms = given.ceilings.least_ms(*moved, logits.dtype)
    return [
        Row(
            f"sample_tokens {ROWS} x {VOCAB} float32, {setting}",
            who,
            found.median_ms,
            found.spread,
            times["naive"].median_ms / found.median_ms,
            least_ms / found.median_ms,
            moved.bytes_moved / 1e6,
            moved.flops / 1e9,
            found.how,
            ceiling=given.ceilings.named(*moved, logits.dtype),
            peak_mib=peaks[who],
            memory_of=memory.ALLOCATOR,
        )
        for who, found in times.items()
    ]


def main_call(given: Given) -> Callable[[], object]:
    """For --profile: the draw of guided sampling."""
    logits, uncond = _logits(given.device)
    index = torch.arange(ROWS, device=given.device)
    return lambda: sample_tokens(
        logits, seed=0, image_index=index, position=0, uncond=uncond, **SETTINGS["guidance 2.0, top-k 2000"]
    )


def _naive(
    logits: Tensor,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    if uncond is not None:
        logits = uncond + guidance * (logits - uncond)
    if temperature == 0:
        return logits.argmax(-1)
    return llamagen_style.draw(logits / temperature, top_k, top_p)


def _read(logits: Tensor, uncond: Tensor | None) -> Tensor:
    return logits.amax() if uncond is None else torch.maximum(logits.amax(), uncond.amax())


def main() -> None:
    """The table, with each backend's distance from reading once."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--quick", action="store_true", help="few repeats: a check that all runs")
    quick, device = parser.parse_args().quick, "cuda" if torch.cuda.is_available() else "cpu"
    environment, ceilings = timing.environment(device), timing.ceilings(device, quick)
    print(
        ", ".join(f"{key} {value}" for key, value in environment.items()),
        f", read {ceilings.read_gb_per_s:.1f} GB/s from memory",
    )
    rows = measure(device, quick, ceilings)
    print(f"{'':62} {'backend':10} {'median ms':>10} {'spread':>7} {'x naive':>8} {'x read':>7}")
    read_ms = {row.name: row.median_ms for row in rows if row.backend == "read once"}
    for row in rows:
        print(
            f"{row.name:62} {row.backend:10} {row.median_ms:10.3f} {row.spread:7.0%} {row.ratio:8.1f} "
            f"{row.median_ms / read_ms[row.name]:7.1f}"
        )


if __name__ == "__main__":
    main()

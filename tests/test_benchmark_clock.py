"""The benchmarks' clock for a GPU (benchmarks/timing.py), run on the CUDA double in a process of its own: graphs where
that can be, reasons where not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_double import needs_no_gpu

ROOT = Path(__file__).resolve().parents[1]
pytestmark = needs_no_gpu

HEAD = """
import json, torch
from benchmarks import timing
from star_fast.ops import dispatch
from tests.cuda_double import CudaDouble
timing._FLUSH_BYTES, compare = 64, timing.compare
"""

FEW_TURNS = """
def few(candidates, device, seconds, repeats, **settings):
    return compare(candidates, device, 0.0, (2, 2), **settings)

timing.compare = few
"""

CLOCK = """
calls = {"captured": 0, "waiting": 0}
with CudaDouble(), torch.no_grad():
    x, total = torch.ones(5, device="cuda"), torch.zeros(1, device="cuda")

    def captured():
        calls["captured"] += 1
        total.add_((2 * x).sum())

    def waiting():
        calls["waiting"] += 1
        return float(x.sum())

    found = timing.compare({"captured": captured, "waiting": waiting}, "cuda", seconds=0.0, repeats=(3, 3))
    turns = float(total)
    plain = timing.compare({"captured": captured}, "cuda", seconds=0.0, repeats=(3, 3), replay=False)
    try:
        timing.replayed(lambda: [][0])
    except IndexError:
        broken = "told"
    mode = torch.cuda.get_sync_debug_mode()
print(json.dumps({"how": {name: row.how for name, row in found.items()},
                  "repeats": [row.repeats for row in found.values()],
                  "calls": calls, "turns": turns,
                  "positive": all(row.median_ms > 0 for row in found.values()), "plain": plain["captured"].how,
                  "broken": broken, "mode": mode}))
"""

OPS = (
    FEW_TURNS
    + """
from benchmarks import ops
from importlib import import_module
rows, ops.baselines.beside = [], lambda *_: ()  # which compile
ops.memory.allocated_mib = lambda *_: 0.0  # the double has no allocator
with CudaDouble():
    for subject in ops.SUBJECTS:
        call = import_module(f"star_fast.ops.{subject.file}").inputs("unit", torch.float32, "cuda")
        rows += ops._rows(subject, call, (), subject.file, "cuda", True, timing.Ceilings(1e3, 1e3, 1e5, 1e6))
print(json.dumps([row._asdict() for row in rows]))
"""
)

DECODING = (
    FEW_TURNS
    + """
from benchmarks import sampling_steps as sampling
sampling.IMAGES, sampling.SIZES = 2, {"B": (2, 2, 64)}
with CudaDouble(), dispatch.use_backend("reference"):
    steps = sampling.Steps(sampling.gpt("B", torch.float32, "cuda"), {"plain": ("plain", None)})
    at = sampling.step_times(steps, "cuda", True)
averaged = sampling._averaged([timing.Timing(2.0, 0.5, 7, "x"), timing.Timing(6.0, 0.1, 7, "y")])
print(json.dumps({"ms": {name: found.median_ms for name, found in at.items()}, "how": at["plain"].how,
                  "repeats": at["plain"].repeats, "averaged": averaged}))
"""
)

PIXELS = """
from benchmarks.llamagen_style import decode_pixels
from star_fast.config import TokenizerConfig
from star_fast.model.tokenizer import VQTokenizer
torch.manual_seed(0)
tokenizer = VQTokenizer(TokenizerConfig(base_channels=32, multipliers=(1, 2, 2), image_size=32)).eval()
codes = torch.randint(0, 16384, (2, 64))
print(json.dumps(float((decode_pixels(tokenizer, codes) - tokenizer.decode(codes)).abs().max())))
"""

BASELINES = """
from importlib import import_module
from unittest import mock
from torch.nn.attention import SDPBackend
from benchmarks import baselines
from star_fast.ops.masked_attention import inputs

def told(op, call):
    runner = lambda function: lambda: function(**call)
    return {name: found if isinstance(found, str) else "runs" for name, found in baselines.beside(op, call, runner)}

call = inputs("unit", torch.float32)
found = {"no GPU": told("masked_attention_qkv", call)}
with (mock.patch.object(torch.cuda, "is_available", lambda: True),
      mock.patch.object(torch, "compile", lambda function, **_: function),
      mock.patch.object(baselines, "_CUDNN", SDPBackend.MATH)):
    found["masks"] = told("masked_attention_qkv", call)
    with mock.patch.object(baselines.importlib.util, "find_spec", lambda name: None):
        found["swiglu"] = told("swiglu", import_module("star_fast.ops.swiglu").inputs("unit", torch.float32))
    causal = lambda keep: torch.ones(keep.shape[1], keep.shape[1], dtype=torch.bool).tril()[None]
    with mock.patch.object(baselines, "visible_pairs", causal):
        found["wrong mask"] = told("masked_attention_qkv", call)
print(json.dumps(found))
"""


def run(script: str) -> Any:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", HEAD + script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_call_is_captured_once_and_replayed_unless_it_waits() -> None:
    found = run(CLOCK)
    assert (
        found["how"]["captured"] == "replay of a CUDA graph"
        and found["how"]["waiting"] == "launched from Python: it waits for the device"
    )
    assert found["plain"] == "launched from Python" and found["broken"] == "told" and found["mode"] == 0
    assert found["repeats"] == [3, 3] and found["positive"]
    # "captured": twice to warm up, once for the graph; replays add to the total without Python. "waiting": the second
    # call ended at the sum.
    assert found["calls"] == {"captured": 3 + 4, "waiting": 2 + 4}
    assert found["turns"] == 10 * (2 + 4)


@pytest.mark.parametrize("backend", ["triton", "reference", "naive"])
def test_every_op_is_timed_as_a_replay(backend: str, rows: list[dict[str, Any]]) -> None:
    waiting = {row["name"] for row in rows if row["backend"] == backend and row["how"] != "replay of a CUDA graph"}
    # Naive slot_contrast reads its pairs on the host
    assert waiting == ({"slot_contrast"} if backend == "naive" else set())
    assert len([row for row in rows if row["backend"] == backend and row["median_ms"] > 0]) == 8


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found = run(OPS)
    assert not [row for row in found if row["error"]]
    return found


def test_the_baselines_pixels_are_ours() -> None:
    assert run(PIXELS) < 1e-4


def test_a_decoding_step_is_timed_as_a_replay() -> None:
    found = run(DECODING)
    assert found["how"] == "replay of a CUDA graph" and found["repeats"] == 4 * 2  # positions x turns
    assert found["averaged"] == [4.0, (2.0 * 0.5 + 6.0 * 0.1) / 8.0, 14, "y"]
    assert (
        set(found["ms"]) == {"LlamaGen style", "its products", "our products", "plain"}
        and min(found["ms"].values()) > 0
    )


def test_baselines_compute_the_same_or_say_why_they_are_left_out() -> None:
    found = run(BASELINES)
    assert found["no GPU"] == dict.fromkeys(
        ("compiled naive", "FlexAttention", "cuDNN SDPA"), "skipped: needs a CUDA device"
    )
    assert found["masks"] == dict.fromkeys(found["no GPU"], "runs")
    assert (
        found["wrong mask"]["FlexAttention"] == "runs"
        and "away from the naive one" in found["wrong mask"]["cuDNN SDPA"]
    )
    assert found["swiglu"] == {"compiled naive": "runs", "Liger": "skipped: liger-kernel is not installed"}

"""Every op on every backend that runs here, beside its naive composition and what others offer (baselines.py).

Time, bytes, FLOPs, share of this machine's ceilings; peak memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import baselines, naive, timing
from star_fast.ops import dispatch
from star_fast.ops.decode_attention import laid_out


class Subject(NamedTuple):
    """An op to measure: its file in star_fast/ops, its public function there and in naive.py, the arguments that get gradients."""

    file: str
    function: str
    gradients: tuple[str, ...]


SUBJECTS = [
    Subject("masked_attention", "masked_attention_qkv", ("qkv",)),
    Subject("decode_attention", "decode_attention", ()),
    Subject("linear_cross_entropy", "linear_cross_entropy", ("hidden", "weight")),
    Subject("feature_distance", "feature_distance", ("student",)),
    Subject("slot_contrast", "slot_contrast", ("anchor",)),
    Subject("add_rms_norm", "add_rms_norm", ("x", "residual", "weight")),
    Subject("swiglu", "swiglu", ("w1w3",)),
    Subject("ema_update", "ema_update", ()),
]
_CPU_ROWS = 2048  # of linear_cross_entropy's hidden states: the whole batch would take a CPU ten seconds a call
_MEMORY_SHAPE = (8192, 768, 16384)  # N, D, V of the peak memory comparison


class Row(NamedTuple):
    """One line of the table. ratio: naive time (or memory) over this one's; share: of the time that the ceilings allow, None where not defined."""

    name: str
    backend: str
    median_ms: float | None
    spread: float | None
    ratio: float | None
    share: float | None
    megabytes: float = 0.0
    gigaflops: float = 0.0
    how: str = ""  # on CUDA: a graph's replay, or why not; why a baseline has no figures
    error: str = ""  # why there is no figure; the run goes on and exits with 1


def measure(device: str, quick: bool, ceilings: timing.Ceilings) -> list[Row]:
    """All rows: forward alone without gradients, then forward and backward together where there are gradients."""
    preset, dtype = ("B" if quick else "XL", torch.bfloat16) if device == "cuda" else ("tiny" if quick else "B", torch.float32)
    rows = []
    for subject in SUBJECTS:
        call = importlib.import_module(f"star_fast.ops.{subject.file}").inputs(preset, dtype, device)
        where = f"{preset} {str(dtype)[6:]}"
        if device == "cpu" and subject.file == "linear_cross_entropy":
            call = {**call, "hidden": call["hidden"][:_CPU_ROWS], "target": call["target"][:_CPU_ROWS]}
        for gradients in ((), subject.gradients) if subject.gradients else ((),):
            name = f"{subject.file} {'forward + backward' if gradients else 'forward'}, {where}"
            rows += _rows(subject, call, gradients, name, device, quick, ceilings)
    return rows + ([_peak_memory_row(quick)] if device == "cpu" else [])


def _rows(subject: Subject, call: dict[str, Any], gradients: tuple[str, ...], name: str, device: str, quick: bool, ceilings: timing.Ceilings) -> list[Row]:
    module = importlib.import_module(f"star_fast.ops.{subject.file}")
    public = getattr(module, subject.function)
    candidates, failed = {"naive": _runner(getattr(naive, subject.function), call, gradients)}, []
    for backend in dispatch.backends(subject.function):
        suited = {**call, "cache": laid_out(call["cache"], backend)} if "cache" in call else call
        runner = _runner(lambda backend=backend, **kw: public(**kw, backend=backend), suited, gradients)
        try:
            runner()
        except dispatch.BackendUnavailable:
            continue
        except Exception as error:  # one broken kernel must not cost the figures of all others
            failed.append(Row(name, backend, None, None, None, None, error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))
            continue
        candidates[backend] = runner
    for baseline, found in baselines.beside(subject.function, call, lambda function: _runner(function, call, gradients)):
        if isinstance(found, str):
            failed.append(Row(name, baseline, None, None, None, None, how=found))
        else:
            candidates[baseline] = found
    times = timing.compare(candidates, device, seconds=0.3 if quick else 2.0, repeats=(5, 50))
    costs = [module.cost(call), *([module.cost(call, backward=True)] if gradients else [])]
    bytes_moved, flops = sum(cost.bytes_moved for cost in costs), sum(cost.flops for cost in costs)
    first = next(iter(v for v in _tensors(call) if v.is_floating_point()))
    least_ms = ceilings.least_ms(bytes_moved, flops, first.dtype)
    return failed + [Row(name, backend, found.median_ms, found.spread, times["naive"].median_ms / found.median_ms, least_ms / found.median_ms,
                         bytes_moved / 1e6, flops / 1e9, found.how) for backend, found in times.items()]


def _tensors(call: dict[str, Any]) -> list[Tensor]:
    return [item for value in call.values() for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, Tensor)]


def _runner(function: Callable[..., Any], call: dict[str, Any], gradients: tuple[str, ...]) -> Callable[[], object]:
    """A call without arguments; with `gradients` it runs forward and backward, from fixed cotangents."""
    if not gradients:
        def forward() -> object:
            with torch.no_grad():
                return function(**call)

        return forward
    leaves = {name: call[name].detach().clone().requires_grad_() for name in gradients}
    cotangents: list[Tensor] = []

    def forward_and_backward() -> object:
        out = function(**{**call, **leaves})
        outs = out if isinstance(out, tuple) else (out,)
        if not cotangents:
            cotangents.extend(torch.ones_like(o) for o in outs)
        return torch.autograd.grad(outs, list(leaves.values()), cotangents)

    return forward_and_backward


def _peak_memory_row(quick: bool) -> Row:
    """Peak memory of linear_cross_entropy forward and backward over the arguments, as a ratio: each in a process of its own."""
    n, d, v = (4096, 256, 8192) if quick else _MEMORY_SHAPE
    peaks = {who: _peak_megabytes(who, n, d, v) for who in ("naive", "reference")}
    return Row(f"linear_cross_entropy peak memory, N {n} D {d} V {v} float32", "reference", None, None, peaks["naive"] / peaks["reference"], None,
               peaks["reference"], 0.0)


def _peak_megabytes(who: str, n: int, d: int, v: int) -> float:
    command = [sys.executable, str(Path(__file__).resolve()), "--peak-memory", who, str(n), str(d), str(v)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _print_peak_megabytes(who: str, n: int, d: int, v: int) -> None:
    """Growth of this process's largest resident size over one call, gradients included; printed in MB."""
    from star_fast.ops.linear_cross_entropy import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).requires_grad_()
    weight = torch.randn(v, d, generator=generator).mul_(0.02).requires_grad_()
    target = torch.randint(v, (n,), generator=generator)
    small = torch.ones(64, 64, requires_grad=True)
    torch.autograd.grad((small @ small).sum(), [small])  # libraries load and autograd starts before the count does
    before = _largest_resident_bytes()
    loss = naive.linear_cross_entropy(hidden, weight, target) if who == "naive" else linear_cross_entropy(hidden, weight, target, backend=who)
    torch.autograd.grad(loss, [hidden, weight])
    print(json.dumps((_largest_resident_bytes() - before) / 1e6))


def _largest_resident_bytes() -> int:
    """VmHWM of this process. Not getrusage's ru_maxrss: a child starts with its parent's."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Peak memory of one call, in a process of its own; for everything else run benchmarks/throughput.py.")
    parser.add_argument("--peak-memory", nargs=4, required=True, metavar=("BACKEND", "N", "D", "V"))
    who, *sizes = parser.parse_args().peak_memory
    _print_peak_megabytes(who, *map(int, sizes))

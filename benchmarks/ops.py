"""Every op on every backend that runs here, beside its naive composition and what others offer (baselines.py).

Time, bytes, FLOPs, share of this machine's ceilings; peak memory of torch's allocator over one call, results included.
On the CPU freed memory is kept, as training keeps it: else each large result is mapped anew, which takes as long as
computing it. All candidates profit.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import baselines, memory, naive, timing
from benchmarks.rows import Given, Piece, Row, told, without_figures
from star_fast.host_memory import keep_freed_memory
from star_fast.ops import dispatch
from star_fast.ops.decode_attention import laid_out
from star_fast.ops.int8_linear import Int8Weight


class Subject(NamedTuple):
    """An op to measure: its file in star_fast/ops, its public function there and in naive.py, the arguments that get
    gradients.
    """

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
# For inference alone, where the tokenizer and 8-bit decoding need it; measured where there is a kernel.
INFERENCE_SUBJECTS = [
    Subject("group_norm_silu", "group_norm_silu", ()),
    Subject("int8_linear", "int8_linear", ()),
]
_CPU_ROWS = 2048  # of linear_cross_entropy's hidden states: the whole batch would take a CPU ten seconds a call
_MEMORY_SHAPE = (8192, 768, 16384)  # N, D, V of the peak memory comparison


def pieces(given: Given) -> list[Piece]:
    """Each op forward alone without gradients, then forward and backward together where there are gradients."""
    found = []
    for subject in subjects(given):
        for gradients in ((), subject.gradients) if subject.gradients else ((),):
            preset, dtype = setting(given, subject)
            name = f"{subject.file} {'forward + backward' if gradients else 'forward'}, {preset} {str(dtype)[6:]}"
            found.append(Piece(name, partial(_made_rows, subject, gradients, name, given)))
    return found + (
        [Piece("linear_cross_entropy peak memory", lambda: _peak_memory_rows(given.quick))]
        if given.device == "cpu"
        else []
    )


def subjects(given: Given) -> list[Subject]:
    """What has a kernel on the device."""
    device = torch.device(given.device)
    return SUBJECTS + [each for each in INFERENCE_SUBJECTS if dispatch.module_for(each.function, device) is not None]


def setting(given: Given, subject: Subject) -> tuple[str, torch.dtype]:
    """Preset and dtype of an op's arguments: on the CPU float32, but bfloat16 where 8 bits stand in for it."""
    if given.device == "cuda":
        return "B" if given.quick else "XL", torch.bfloat16
    return "tiny" if given.quick else "B", torch.bfloat16 if subject.file == "int8_linear" else torch.float32


def arguments(subject: Subject, given: Given) -> dict[str, Any]:
    """An op's call at the setting's training shape."""
    call = importlib.import_module(f"star_fast.ops.{subject.file}").inputs(*setting(given, subject), given.device)
    if given.device == "cpu" and subject.file == "linear_cross_entropy":
        call = {**call, "hidden": call["hidden"][:_CPU_ROWS], "target": call["target"][:_CPU_ROWS]}
    return call


def _made_rows(subject: Subject, gradients: tuple[str, ...], name: str, given: Given) -> list[Row]:
    keep_freed_memory()  # of this process for good
    return _rows(subject, arguments(subject, given), gradients, name, *given)


def _rows(
    subject: Subject,
    call: dict[str, Any],
    gradients: tuple[str, ...],
    name: str,
    device: str,
    quick: bool,
    ceilings: timing.Ceilings,
) -> list[Row]:
    module = importlib.import_module(f"star_fast.ops.{subject.file}")
    public = getattr(module, subject.function)
    in_8_bits = isinstance(call.get("weight"), Int8Weight)
    plain = {**call, "weight": naive.in_floats(call["weight"], call["x"].dtype)} if in_8_bits else call
    candidates, failed = {"naive": runner(getattr(naive, subject.function), plain, gradients)}, []
    for backend in dispatch.backends(subject.function):
        suited = {**call, "cache": laid_out(call["cache"], backend)} if "cache" in call else call
        run = runner(lambda backend=backend, **kw: public(**kw, backend=backend), suited, gradients)
        try:
            run()
        except dispatch.BackendUnavailable:
            continue
        except Exception as error:  # one broken kernel must not cost the figures of all others
            failed.append(without_figures(name, backend, error=told(error)))
            continue
        candidates[backend] = run
    # On the CPU none of them runs: no row says so for each.
    others = (
        baselines.beside(subject.function, call, lambda function: runner(function, call, gradients))
        if device == "cuda"
        else ()
    )
    for baseline, found in others:
        if isinstance(found, str):
            failed.append(without_figures(name, baseline, how=found))
        else:
            candidates[baseline] = found
    times = timing.compare(candidates, device, seconds=0.3 if quick else 2.0, repeats=(5, 50))
    peaks = {backend: memory.allocated_mib(run, device) for backend, run in candidates.items()}
    costs = [module.cost(call), *([module.cost(call, backward=True)] if gradients else [])]
    bytes_moved, flops = sum(cost.bytes_moved for cost in costs), sum(cost.flops for cost in costs)
    dtype = torch.int8 if in_8_bits else next(v for v in _tensors(call) if v.is_floating_point()).dtype
    least_ms = ceilings.least_ms(bytes_moved, flops, dtype)
    return failed + [
        Row(
            name,
            backend,
            found.median_ms,
            found.spread,
            times["naive"].median_ms / found.median_ms,
            least_ms / found.median_ms,
            bytes_moved / 1e6,
            flops / 1e9,
            found.how,
            ceiling=ceilings.named(bytes_moved, flops, dtype),
            peak_mib=peaks[backend],
            memory_of=memory.ALLOCATOR,
        )
        for backend, found in times.items()
    ]


def main_call(given: Given) -> Callable[[], object]:
    """For --profile: every op once by the backend that it would take, forward and backward, each under its name."""
    runs = {
        subject.function: runner(
            getattr(importlib.import_module(f"star_fast.ops.{subject.file}"), subject.function),
            arguments(subject, given),
            subject.gradients,
        )
        for subject in subjects(given)
    }

    def call() -> None:
        for name, run in runs.items():
            with torch.profiler.record_function(f"op: {name}"):
                run()

    return call


def _tensors(call: dict[str, Any]) -> list[Tensor]:
    return [
        item
        for value in call.values()
        for item in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(item, Tensor)
    ]


def runner(function: Callable[..., Any], call: dict[str, Any], gradients: tuple[str, ...]) -> Callable[[], object]:
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


def _peak_memory_rows(quick: bool) -> list[Row]:
    """Peak memory of linear_cross_entropy forward and backward over the arguments, as a ratio: each in a process of its
    own.
    """
    n, d, v = (4096, 256, 8192) if quick else _MEMORY_SHAPE
    peaks = {who: _peak_mib(who, n, d, v) for who in ("naive", "reference")}
    return [
        Row(
            f"linear_cross_entropy peak memory, N {n} D {d} V {v} float32",
            who,
            None,
            None,
            peaks["naive"] / peak,
            None,
            peak_mib=peak,
            memory_of=memory.PROCESS,
        )
        for who, peak in peaks.items()
    ]


def _peak_mib(who: str, n: int, d: int, v: int) -> float:
    command = [sys.executable, str(Path(__file__).resolve()), "--peak-memory", who, str(n), str(d), str(v)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _print_peak_mib(who: str, n: int, d: int, v: int) -> None:
    """Growth of this process's largest resident size over one call, gradients included; printed in MiB."""
    from star_fast.ops.linear_cross_entropy import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).requires_grad_()
    weight = torch.randn(v, d, generator=generator).mul_(0.02).requires_grad_()
    target = torch.randint(v, (n,), generator=generator)
    small = torch.ones(64, 64, requires_grad=True)
    torch.autograd.grad((small @ small).sum(), [small])  # libraries load and autograd starts before the count does
    before = memory.status_kib("VmHWM")
    loss = (
        naive.linear_cross_entropy(hidden, weight, target)
        if who == "naive"
        else linear_cross_entropy(hidden, weight, target, backend=who)
    )
    torch.autograd.grad(loss, [hidden, weight])
    print(json.dumps((memory.status_kib("VmHWM") - before) / 1024))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Peak memory of one call, in a process of its own; all else: benchmarks/throughput.py."
    )
    parser.add_argument("--peak-memory", nargs=4, required=True, metavar=("BACKEND", "N", "D", "V"))
    who, *sizes = parser.parse_args().peak_memory
    _print_peak_mib(who, *map(int, sizes))

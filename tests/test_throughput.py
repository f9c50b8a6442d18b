"""The benchmarks' entry (benchmarks/throughput.py) and its pages, in processes of their own: what a failure costs, what
is explained and fitted. (Comparing two runs: test_benchmark_comparing.py.)

No time that is measured here is held against anything.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.benchmark_process import run, start
from tests.cuda_double import needs_no_gpu

ARGUMENTS = """
import contextlib, io, json, sys
from benchmarks import throughput

def said(*arguments):
    sys.argv[1:] = arguments
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = throughput.main()
        except SystemExit as end:
            code = end.code
    return [code, errors.getvalue().splitlines()]

folder = sys.argv[1]
found = {name: said("--compare", f"{folder}/{name}", f"{folder}/{name}") for name in ("absent", "text", "list", "rows")}
found |= {"cuda": said("--device", "cuda"), "profile": said("--profile", "x", "--save"),
          "three": said("--compare", "a", "b", "c"),
          "json": said("--json", f"{folder}/none/x.json")}
print(json.dumps(found))
"""


@needs_no_gpu
def test_wrong_files_and_arguments_are_refused_in_a_line(tmp_path: Path) -> None:
    for name, content in (("text", "no JSON"), ("list", "[]"), ("rows", '{"rows": [{"name": "a"}]}')):
        (tmp_path / name).write_text(content)
    found = run(ARGUMENTS, tmp_path)
    assert [code for code, _ in found.values()] == [2] * 8
    for name in ("absent", "text", "list", "rows"):
        [line] = found[name][1]
        assert f"{tmp_path}/{name}: " in line and "throughput.py --json wrote" in line
    for name, told in (
        ("cuda", "torch finds no CUDA device"),
        ("profile", "give it alone"),
        ("three", "one or two files, got 3"),
        ("json", "its folder does not exist"),
    ):
        assert told in found[name][1][-1]


SUBJECTS = """
import json, sys, types
from pathlib import Path
from benchmarks import reasons, throughput, timing
from benchmarks.rows import NotHere, Piece, Row

def raising(error):
    def run():
        raise error
    return run

one, two = types.ModuleType("one"), types.ModuleType("two")
one.pieces = lambda given: [
    Piece("breaks", raising(ValueError("a wrong number\\nand more"))),
    Piece("absent", raising(NotHere("needs a moon"))),
    Piece("package", raising(ModuleNotFoundError("no", name="no_such.part"))),
    Piece("own package", raising(ModuleNotFoundError("no", name="star_fast.gone"))),
    Piece("works", lambda: [Row("fine", "cpp", 2.0, 0.1, 1.5, 0.9, ceiling="memory", peak_mib=3.0,
                                 memory_of="the process"),
                            Row("half", "cpp", 2.0, None, 1.0, 0.49), Row("slow", "naive", 2.0, None, 0.994, None),
                            Row("even", "naive", 2.0, None, 0.996, 0.5)])]
sys.modules |= {"one": one, "two": two}
throughput.SUBJECTS, throughput.RESULTS = {"one": "one", "two": "two"}, Path(sys.argv[1])
throughput.KEEP_MEMORY = ("one",)  # is measured last and stands first
timing.ceilings = lambda *_: timing.Ceilings(1.0, 2.0, 3.0, 4.0)
reasons.REASONS = [reasons.Reason("other", "", "", "wrong"), reasons.Reason("^half$", "cpp", "^cpu$", "it is a half")]
sys.argv[1:] = ["--device", "cpu", "--save", "--json", sys.argv[1] + "/rows.json"]
print(json.dumps({"code": throughput.main()}))
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], str, int]:
    """(rows by name, the page, exit code) of two subjects, one of which cannot even name its parts."""
    folder = tmp_path_factory.mktemp("throughput")
    code = run(SUBJECTS, folder)["code"]
    found = json.loads((folder / "rows.json").read_text())
    assert found == json.loads((folder / "throughput.json").read_text()) and found["ceilings"]["copy_gb_per_s"] == 2.0
    return {row["name"]: row for row in found["rows"]}, (folder / "throughput.md").read_text(), code


def test_what_fails_costs_no_other_row(kept: tuple[dict[str, dict[str, Any]], str, int]) -> None:
    rows, page, code = kept
    assert (
        list(rows) == ["breaks", "absent", "package", "own package", "fine", "half", "slow", "even", "two"]
        and code == 1
    )
    assert (
        rows["breaks"]["error"] == "ValueError: a wrong number"
        and "AttributeError" in rows["two"]["error"]
        and rows["two"]["subject"] == "two"
    )
    assert not rows["absent"]["error"] and rows["absent"]["how"] == "skipped: needs a moon"
    assert (
        rows["package"]["how"] == "skipped: no_such.part is not installed"
        and "ModuleNotFoundError" in rows["own package"]["error"]
    )
    assert (
        "| fine | cpp | 2.000 | 10% | 90.0% | 1.50 | 3.0 p | memory |" in page
        and "FAILED: ValueError: a wrong number" in page
    )
    assert all(f"| {name} |" in page for name in rows)


def test_what_falls_short_has_a_reason_or_says_that_it_has_none(
    kept: tuple[dict[str, dict[str, Any]], str, int],
) -> None:
    rows, page, _ = kept
    assert {name: row["reason"] for name, row in rows.items() if "reason" in row} == {
        "half": "it is a half",
        "slow": "not explained",
    }
    assert rows["half"]["short"] == "49.0% of the ceiling" and rows["slow"]["short"] == "0.99 x the baseline"
    assert page.endswith(
        "- it is a half\n  - half, cpp: 49.0% of the ceiling\n- not explained\n  - slow, naive: 0.99 x the baseline\n"
    )


OPS = """
import json, torch
from benchmarks import naive, ops, rows, timing
from star_fast.ops import dispatch
compare = timing.compare
timing.compare = lambda candidates, device, **_: compare(candidates, device, 0.0, (2, 2))
ops.SUBJECTS, ops.setting = ops.SUBJECTS[-2:-1], lambda given, subject: ("unit", torch.float32)
ops._peak_memory_rows = lambda quick: []
given = rows.Given("cpu", True, timing.Ceilings(1.0, 1.0, 1.0, 1.0))

def measured():
    return [row._asdict() for piece in ops.pieces(given) for row in rows.measured(piece)]

def breaks(*_, **__):
    raise RuntimeError("no such instruction")

found = {"whole": measured()}
class Broken:
    why_not, run = staticmethod(lambda *_, **__: None), staticmethod(breaks)
dispatch._OPS["swiglu"].loaded["cpp"] = Broken
found["broken backend"] = measured()
naive.swiglu = breaks
found["broken baseline"] = measured()
print(json.dumps(found))
"""


def test_a_broken_backend_leaves_the_others_their_figures() -> None:
    found = run(OPS)
    for name, rows in found.items():
        by_backend = {(row["name"].split(",")[0], row["backend"]): row for row in rows}
        for call in ("swiglu forward", "swiglu forward + backward"):
            if name == "broken baseline":
                assert by_backend[call, ""]["error"] == "RuntimeError: no such instruction"
                continue
            assert by_backend[call, "reference"]["median_ms"] > 0 and by_backend[call, "naive"]["ratio"] == 1
            if name == "broken backend":
                assert by_backend[call, "cpp"]["error"] == "RuntimeError: no such instruction"
    # forward keeps (N, F) float32 results and makes at least them: N = 3 * 2 * 17 rows of F = 256
    [forward] = [
        row for row in found["whole"] if row["name"].startswith("swiglu forward,") and row["backend"] == "reference"
    ]
    assert forward["peak_mib"] >= 3 * 2 * 17 * 256 * 4 / 2**20 and forward["megabytes"] == pytest.approx(
        3 * 102 * 256 * 4 / 1e6
    )


NAIVE = """
import json, os, torch
os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel would be a backend with a row, and take seconds
from benchmarks import naive, ops, rows, timing
from star_fast.ops.int8_linear import Int8Weight
torch.manual_seed(0)
apart = {}
for shape in ((5, 7), (40, 300)):
    weight = torch.randn(shape)
    back = naive.in_floats(Int8Weight(weight), torch.float32)
    apart[str(shape)] = float((back - weight).norm() / weight.norm())
ceilings = timing.Ceilings(1.0, 1.0, 2.0, 3.0, 5.0)
least = [ceilings.least_ms(0, 30, dtype) * 1e6 for dtype in (torch.float32, torch.bfloat16, torch.int8)]
without = ceilings._replace(int8_gop_per_s=None).least_ms(0, 30, torch.int8) * 1e6
compare = timing.compare
timing.compare = lambda candidates, device, **_: compare(candidates, device, 0.0, (2, 2))
ops.SUBJECTS, ops._peak_memory_rows = [], lambda quick: []
given = rows.Given("cpu", True, ceilings)
made = [row._asdict() for piece in ops.pieces(given) for row in rows.measured(piece)]
print(json.dumps({"apart": apart, "least": least, "without": without, "rows": made,
                  "names": [ceilings.named(1, 30, torch.int8), ceilings.named(100, 1, torch.int8)],
                  "on_cuda": [piece.name for piece in ops.pieces(given._replace(device="cuda"))]}))
"""


def test_ops_of_inference_alone_stand_beside_their_baselines() -> None:
    found = run(NAIVE)
    # 127 levels of a row's largest rotated entry, rounded: about 3.4 / 127 / sqrt(12) of the entries' own size
    assert all(0.001 < apart < 0.015 for apart in found["apart"].values())
    assert found["least"] == pytest.approx([15, 10, 6]) and found["without"] == pytest.approx(10)
    assert found["names"] == ["products, int8", "memory"] and found["on_cuda"] == [
        "group_norm_silu forward, B bfloat16"
    ]
    by_op: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        by_op.setdefault(row["name"], {})[row["backend"]] = row
    assert by_op.keys() == {"group_norm_silu forward, tiny float32", "int8_linear forward, tiny bfloat16"}
    for backends in by_op.values():
        assert backends.keys() == {"naive", "cpp", "reference"} and backends["naive"]["ratio"] == 1
        assert all(row["median_ms"] > 0 and row["share"] > 0 and not row["error"] for row in backends.values())
    # 64 rows, F = 512, D = 128: bytes of codes, correction and scale; x read and written in 16 bits; so many products
    [row] = {row["megabytes"] for row in by_op["int8_linear forward, tiny bfloat16"].values()}
    assert row == pytest.approx((1024 * 128 + 4 * 1024 + 64 * (128 + 1024) * 2) / 1e6)


MEMORY = """
import json, torch
from benchmarks.memory import allocated_mib
x, a = torch.ones(1024, 1024), torch.ones(512, 512, requires_grad=True)
print(json.dumps({"chain": allocated_mib(lambda: (x + 1) + 1, "cpu"),
                  "three": allocated_mib(lambda: torch.cat([x * 2, x * 3]).sum(), "cpu"),
                  "freed": allocated_mib(lambda: [(x + 1).sum() for _ in range(5)], "cpu")}))
"""


def test_peak_memory_counts_what_lives_at_once() -> None:
    found = run(MEMORY)
    assert found == {
        "chain": pytest.approx(8, abs=0.01),
        "three": pytest.approx(16, abs=0.01),
        "freed": pytest.approx(4, abs=0.01),
    }


WORK = """
import json, torch
from benchmarks import sampling_rows, scaling, scaling_curves as curves, timing
timing.compare = lambda candidates, *_, **__: {name: timing.Timing(1.0, 0.0, 1) for name in candidates}
curves.BASE = curves.BASE._replace(B=2, T=16, K=2, V=32, D=16, H=1, E=16, F=16)
laws = {f"{sweep.op} over {sweep.over}": scaling.exponent(list(sweep.sizes[:3]), curves.op_curve(sweep._replace(
            shape={letter: min(value, 32) for letter, value in sweep.shape.items()}), True).work)
    for sweep in curves.SWEEPS}
steps = {over: scaling.exponent(list(sizes), [curves.step_flops(curves.step_config(over, size)) for size in sizes])
         for over, (_, sizes) in curves.STEPS.items()}
fits = [scaling.exponent([1, 2, 4, 8], [3.0 * n**power for n in (1, 2, 4, 8)]) for power in (0.0, 1.0, 2.5)]
steep = [scaling.too_steep(curves.Curve("", "B", "", [1, 2, 4], [n**power for n in (1, 2, 4)], "ms", [1.0, 2.0, 4.0]))
         for power in (0.5, 1.14, 1.16)]
rates = timing.Ceilings(1.0, 1.0, 1e9, 1e9)
work = sampling_rows.Work((2, 4, 128), 3)
print(json.dumps({"laws": laws, "steps": steps, "fits": fits, "steep": steep, "decoder": sampling_rows.decoder_flops(),
                  "read_ms": work.step_ms(rates, 9, "bf16", "int8"), "kinds": {
                      name: sampling_rows._kinds(name) for name in (
                      "packed", "packed, int8 cache", "int8", "int8, int8 cache", "star-fast sample",
                      "star-fast sample, int8", "star-fast sample, fp32")}}))
"""


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return run(WORK)


def test_exponents_are_slopes_and_a_steeper_curve_is_marked(counted: dict[str, Any]) -> None:
    assert counted["fits"] == pytest.approx([0, 1, 2.5]) and counted["steep"] == [False, False, True]


def test_counted_work_grows_as_the_law_says(counted: dict[str, Any]) -> None:
    linear = {
        "masked_attention over B",
        "decode_attention over B",
        "decode_attention over T",
        "linear_cross_entropy over V",
        "linear_cross_entropy over B",
        "feature_distance over B",
        "add_rms_norm over B",
        "swiglu over B",
        "sample_tokens over V",
        "sample_tokens over B",
    }
    square = {"masked_attention over T", "slot_contrast over B", "slot_contrast over K", "ema_update over D"}
    assert set(counted["laws"]) == linear | square
    for name, slope in counted["laws"].items():
        # Its feed-forward width stays
        assert slope == pytest.approx(1 if name in linear else 2, abs=0.3 if name == "ema_update over D" else 0.1), name
    steps = counted["steps"]
    assert 1 < steps["B"] < 1.1 and 1 < steps["T"] < 1.3 and 0 < steps["V"] < 0.6 and 0 < steps["K"] < 0.2


def test_the_ceiling_of_sampling_counts_weights_caches_and_pixels(counted: dict[str, Any]) -> None:
    width, feed_forward, blocks, images = 128, 512, 2, 3  # 8/3 of 128 is 341, the next multiple of 256 is 512
    weights = blocks * (4 * width**2 + 3 * width * feed_forward) + width * 16384
    cached = 2 * images * blocks * 2 * width * 10  # guided rows, keys and values, positions 0 ... 9
    assert counted["read_ms"] == pytest.approx(1e3 * (2 * weights + cached) / 1e9)
    assert math.log10(counted["decoder"]) == pytest.approx(math.log10(253e9), abs=0.03)
    assert counted["kinds"] == {
        "packed": ["bf16", "bf16"],
        "packed, int8 cache": ["bf16", "int8"],
        "int8": ["int8", "bf16"],
        "int8, int8 cache": ["int8", "int8"],
        "star-fast sample": ["bf16", "bf16"],
        "star-fast sample, int8": ["int8", "int8"],
        "star-fast sample, fp32": ["fp32", "fp32"],
    }


@needs_no_gpu
def test_a_profile_is_a_trace_and_a_table(tmp_path: Path) -> None:
    done = start("benchmarks/throughput.py", "--profile", tmp_path / "made", "--subject", "sample_op", "--quick")
    assert done.returncode == 0 and "sample_op" in done.stdout, done.stderr[-3000:]
    names = {event["name"] for event in json.loads((tmp_path / "made/sample_op.json").read_text())["traceEvents"]}
    assert "star_fast::sample_tokens" in names
    table = (tmp_path / "made/sample_op.md").read_text()
    assert "| star_fast::sample_tokens |" in table and table.startswith("# sample_op: the draw of guided sampling")

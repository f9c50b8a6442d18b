"""ops.group_norm_silu: reference and compiled backends against the float64 formula; what a backend does not serve goes
elsewhere.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.ops import dispatch
from star_fast.ops.triton import group_norm_silu as kernels
from tests import contract
from tests.cuda_double import needs_no_gpu

op = importlib.import_module("star_fast.ops.group_norm_silu")
needs_extension = pytest.mark.skipif(find_spec("star_fast._C") is None, reason="star_fast._C is not built")
# Triton's interpreter stands in for a GPU
BACKENDS = [pytest.param("cpp", marks=needs_extension), pytest.param("triton", marks=needs_no_gpu)]
# (images, channels, height, width), groups: odd sizes, rows of several pixels, several parts of an image, one group,
# one channel a group, one column.
SHAPES = [
    ((2, 128, 9, 7), 32),
    ((3, 24, 8, 5), 2),
    ((1, 8, 4, 3), 2),
    ((2, 512, 5, 5), 32),
    ((1, 16, 70, 33), 1),
    ((2, 48, 1, 4), 48),
    ((1, 144, 17, 20), 4),
]


def call_of(
    shape: tuple[int, ...], groups: int, *, mean: float = 0.5, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = (mean + torch.randn(shape, generator=generator)).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = 1 + torch.randn(2, shape[1], generator=generator)
    return {"x": x, "weight": weight.to(dtype), "bias": bias.to(dtype), "groups": groups}


@needs_extension
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_error_rule(shape: tuple[int, ...], groups: int, dtype: torch.dtype, silu: bool) -> None:
    call = call_of(shape, groups) | {"silu": silu}
    contract.check_op(op, "cpp", call, (), dtype)
    rounded = {name: contract.cast(value, dtype) for name, value in call.items()}
    made = op.group_norm_silu(**rounded, backend="cpp")
    assert made.stride() == rounded["x"].stride()
    given = rounded["x"].clone()
    assert torch.equal(op.group_norm_silu(**rounded | {"x": given, "out": given}, backend="cpp"), made) and torch.equal(
        given, made
    )


# As above, with few groups, each of which is a program, and an interpreted one takes milliseconds: every rounding of a
# group's width and of a tile's columns, one pixel, parts that the last one does not fill.
KERNEL_SHAPES = [
    ((2, 128, 9, 7), 32),
    ((3, 24, 8, 5), 2),
    ((1, 12, 1, 4), 12),
    ((1, 16, 70, 33), 1),
    ((1, 144, 17, 20), 4),
    ((2, 8, 1, 1), 2),
    ((1, 130, 5, 3), 5),
    ((2, 32, 47, 46), 4),
]


@needs_no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "groups"), KERNEL_SHAPES)
def test_error_rule_of_the_kernels(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    for silu in (False, True):
        contract.check_op(op, "triton", call_of(shape, groups) | {"silu": silu}, (), dtype)


@needs_no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_write_into_x_and_make_of_an_image_the_same_beside_any_others(dtype: torch.dtype) -> None:
    call = call_of((3, 32, 25, 24), 4, dtype=dtype)  # parts of 128 pixels; three images as one would have parts of 256
    made, given = op.group_norm_silu(**call, backend="triton"), call["x"].clone()
    assert made.stride() == call["x"].stride() and made.dtype == dtype
    assert op.group_norm_silu(**call | {"x": given, "out": given}, backend="triton") is given
    assert torch.equal(given, made)
    for first in range(3):
        alone = op.group_norm_silu(**call | {"x": call["x"][first : first + 1]}, backend="triton")
        assert torch.equal(alone, made[first : first + 1])


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_instruction_sets(capability: str) -> None:
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    code = (
        "from tests.ops.test_group_norm_silu import SHAPES, test_error_rule as t; import torch\n"
        f"assert torch.backends.cpu.get_cpu_capability() == '{capability.upper()}'\n"
        "[t(*given, dtype, silu) for given in SHAPES for dtype in (torch.float32, torch.bfloat16) for silu in "
        "(True, False)]"
    )
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, check=True, timeout=300
    )


@pytest.mark.parametrize("silu", [True, False])
def test_formula_against_scalar_arithmetic(silu: bool) -> None:
    call = call_of((2, 6, 2, 3), 3, dtype=torch.float64) | {"silu": silu, "eps": 0.3}
    x, expected = call["x"], torch.empty(2, 6, 2, 3, dtype=torch.float64)
    for image in range(2):
        for group in range(3):
            values = [x[image, c, h, w].item() for c in (2 * group, 2 * group + 1) for h in range(2) for w in range(3)]
            mean = sum(values) / 12
            deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 12 + 0.3)
            for c in (2 * group, 2 * group + 1):
                for h in range(2):
                    for w in range(3):
                        n = (x[image, c, h, w].item() - mean) / deviation * call["weight"][c].item() + call["bias"][
                            c
                        ].item()
                        expected[image, c, h, w] = n / (1 + math.exp(-n)) if silu else n
    torch.testing.assert_close(op.reference(**call), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(op.group_norm_silu(**call), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mean", [300.0, -3000.0])
def test_a_mean_far_larger_than_the_deviation_costs_no_digits(mean: float, backend: str) -> None:
    """Sums of plain squares would lose all of the variance's: 9e6 + 1 in float32."""
    call = call_of((2, 32, 40, 40), 4, mean=mean)
    contract.check_op(op, backend, call, (), torch.float32)
    variance = call | {"weight": torch.ones(32), "bias": torch.zeros(32), "silu": False}
    assert op.group_norm_silu(**variance, backend=backend).double().square().mean().item() == pytest.approx(1, abs=2e-3)


@needs_no_gpu
def test_parts_far_apart_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of parts and channels thousands of deviations apart, more parts than are added at once: what Chan's formula
    adds for them is nearly all of the variance. In the other group the first pixel, which sums are taken about, is far.
    """
    monkeypatch.setattr(kernels, "GROUP_NORM_MOMENTS", kernels.GROUP_NORM_MOMENTS._replace(block=(256, 256, 8, 16)))
    monkeypatch.setattr(kernels, "GROUP_NORM_MERGE", kernels.GROUP_NORM_MERGE._replace(block=(64,)))
    monkeypatch.setattr(kernels, "_merge_settings", kernels._merge_settings.__wrapped__)  # keeps nothing of these tiles
    call = call_of((1, 16, 25, 39), 2)  # 61 parts, the last of 15 pixels; 8 are added at once
    call["x"][:, :8] += 1e3 * torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(1))
    call["x"][:, :8] += torch.linspace(0, 5e3, 25)[:, None]
    call["x"][0, 8:, 0, 0] = 1e4
    with dispatch.note_launches() as launches:
        contract.check_op(op, "triton", call, (), torch.float32)
    assert [launch.grid for launch in launches][:2] == [(61,), (2,)] and launches[1].call.constants["PARTS"] == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend: str) -> None:
    """SiLU over all that a normalised value may be, by weights that stretch it; and NaN, which stays in its image and
    its group.
    """
    ladder = torch.cat([torch.linspace(-120, 120, 60), torch.tensor([1e4, -1e4, 1e30, -1e30])])
    x = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2).expand(1, 64, 1, 2).contiguous(memory_format=torch.channels_last)
    contract.check_op(
        op, backend, {"x": x, "weight": ladder, "bias": torch.zeros(64), "groups": 64, "eps": 1e-12}, (), torch.float32
    )
    near = call_of((1, 64, 1, 2), 64) | {"x": x, "weight": torch.linspace(-45, 45, 64), "bias": torch.zeros(64)}
    got, truth = (
        op.group_norm_silu(**near, backend=backend).double(),
        op.reference(**{key: contract.cast(value, torch.float64) for key, value in near.items()}),
    )
    assert ((got - truth).abs() <= 3e-6 * truth.abs() + 1e-15).all()  # of each value itself, down to 45 e^-45
    spoilt = call_of((2, 32, 4, 4), 4)
    spoilt["x"][0, 9, 2, 1] = float("nan")
    nan = op.group_norm_silu(**spoilt, backend=backend).isnan()
    assert nan[0, 8:16].all() and nan.sum() == 8 * 16
    flat = call_of((1, 32, 3, 3), 2) | {
        "x": torch.full((1, 32, 3, 3), 7.25).contiguous(memory_format=torch.channels_last),
        "silu": False,
    }
    levels = flat["bias"].view(1, 32, 1, 1).expand(1, 32, 3, 3)
    # x * scale, rounded
    torch.testing.assert_close(
        op.group_norm_silu(**flat, backend=backend), levels, rtol=0, atol=7.25 / math.sqrt(1e-6) * 3 * 2**-24
    )


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_any_number_of_threads_and_beside_any_other_images(dtype: torch.dtype) -> None:
    call = call_of((5, 48, 61, 64), 12, dtype=dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(op.group_norm_silu(**call, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    alone = op.group_norm_silu(**call | {"x": call["x"][3:4]}, backend="cpp")
    assert torch.equal(alone, found[0][3:4])


@needs_extension
@pytest.mark.parametrize("backend", ["reference", None])
def test_gradient(backend: str | None) -> None:
    """Autograd's, wherever one is asked for: the compiled backend gives way."""
    call = call_of((2, 16, 2, 2), 4)
    exact = {key: contract.cast(value, torch.float64) for key, value in call.items()}
    leaves = tuple(exact[key].detach().requires_grad_() for key in ("x", "weight", "bias"))
    assert torch.autograd.gradcheck(lambda *values: op.group_norm_silu(*values, 4, backend=backend), leaves)
    call["weight"].requires_grad_()
    assert torch.equal(op.group_norm_silu(**call), op.reference(**call)) and op.group_norm_silu(**call).requires_grad
    with torch.no_grad():
        assert torch.equal(op.group_norm_silu(**call), op.group_norm_silu(**call, backend="cpp"))


@needs_extension
def test_plain_layout_keeps_torchs_bits() -> None:
    """Exact mode and training live on it."""
    call = call_of((2, 128, 9, 7), 32)
    call["x"] = call["x"].contiguous()
    expected = torch.nn.functional.silu(
        torch.nn.functional.group_norm(call["x"], 32, call["weight"], call["bias"], 1e-6)
    )
    assert torch.equal(op.group_norm_silu(**call), expected)
    # The backend's rounding
    assert not torch.equal(
        op.group_norm_silu(**call | {"x": call["x"].contiguous(memory_format=torch.channels_last)}), expected
    )
    single = call_of((2, 128, 1, 1), 32)  # one pixel lies in both layouts
    assert torch.equal(op.group_norm_silu(**single), op.reference(**single))
    with pytest.raises(dispatch.BackendUnavailable, match="nothing else"):
        op.group_norm_silu(**single, backend="cpp")


@needs_extension
def test_what_is_not_served_goes_elsewhere() -> None:
    usual = call_of((2, 24, 7, 7), 2)
    for changes, reason in (
        ({}, "multiple of 32"),
        ({"x": torch.zeros(2, 24, 4, 4)}, "channels last"),
        ({"x": torch.zeros(0, 24, 4, 4)}, "channels last"),
        ({key: value.double() for key, value in usual.items() if isinstance(value, Tensor)}, "float32 or bfloat16"),
        ({"x": usual["x"].clone().requires_grad_()}, "no gradient"),
    ):
        with pytest.raises(dispatch.BackendUnavailable, match=reason):
            op.group_norm_silu(**usual | changes, backend="cpp")
        op.group_norm_silu(**usual | changes)  # chosen automatically, the reference takes it


def test_what_the_kernels_do_not_serve_goes_elsewhere() -> None:
    """On CUDA, where they come first: told by fake tensors."""
    with FakeTensorMode(), torch.device("cuda"):
        usual = {
            name: torch.empty_like(x, device="cuda")
            for name, x in call_of((2, 32, 4, 4), 4).items()
            if name != "groups"
        }
        wide = torch.empty(1, 9000, 2, 2).contiguous(memory_format=torch.channels_last)
        for changes, reason in (
            ({"x": torch.empty(2, 32, 4, 4)}, "channels last"),
            ({"x": torch.empty(0, 32, 4, 4)}, "not empty"),
            ({name: x.double() for name, x in usual.items()}, "float16"),
            ({"weight": torch.empty(32, requires_grad=True)}, "no gradient"),
            (
                {"x": wide, "weight": torch.empty(9000), "bias": torch.empty(9000), "groups": 1},
                "at most 8192, got 9000",
            ),
        ):
            call = {**usual, "groups": 4, **changes}
            with pytest.raises(dispatch.BackendUnavailable, match=reason):
                op.group_norm_silu(**call, backend="triton")
            with dispatch.record() as calls:
                op.group_norm_silu(**call)
            assert [seen.backend for seen in calls] == ["reference"]
        with torch.no_grad(), dispatch.record() as calls:
            op.group_norm_silu(**usual | {"weight": torch.empty(32, requires_grad=True), "groups": 4})
        assert [seen.backend for seen in calls] == ["triton"]


@pytest.mark.parametrize(
    ("side", "channels", "programs"),
    [(256, 128, (4096, 256, 8192)), (16, 512, (256, 256, 256)), (64, 256, (512, 256, 1024))],
)
def test_eight_images_fill_the_largest_gpus(side: int, channels: int, programs: tuple[int, ...]) -> None:
    """At every level of VQ-16 more programs than any GPU has multiprocessors (148), and the same of each image."""
    for images in (8, 1):
        with FakeTensorMode(), dispatch.note_launches() as launches:
            x = torch.empty(images, side, side, channels, dtype=torch.bfloat16).permute(0, 3, 1, 2)
            weight = torch.empty(channels, dtype=torch.bfloat16)
            made = op.group_norm_silu(x, weight, weight, 32, backend="triton")
        assert made.stride() == x.stride() and made.dtype == x.dtype
        names = ["group_norm_moments", "group_norm_merge", "group_norm_scaled"]
        grids = [((count // 8 * images),) for count in programs]
        assert [(launch.kernel, launch.grid) for launch in launches] == list(zip(names, grids, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x": torch.zeros(2, 16, 3, 3, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"x": torch.zeros(2, 16, 3)}, ValueError, r"\(B, C, H, W\)"),
        ({"groups": 3}, ValueError, "3 groups"),
        ({"groups": 0}, ValueError, "0 groups"),
        ({"weight": torch.ones(16).double()}, TypeError, "weight must have"),
        ({"bias": torch.ones(15)}, ValueError, "bias must be"),
        ({"eps": 0.0}, ValueError, "eps must be"),
        ({"out": torch.zeros(2, 16, 3, 3)}, ValueError, "out must be like x"),
    ],
)
def test_bad_input_says_what_came(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"group_norm_silu: .*{says}"):
        op.group_norm_silu(**call_of((2, 16, 3, 3), 4) | changes)

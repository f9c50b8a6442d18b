"""ops.sample_tokens: what it takes, what it refuses in a line, and what serves where the extension is missing."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.ops import dispatch
from tests.ops.token_draws import BACKENDS, draw, logits_of, needs_extension

op = importlib.import_module("star_fast.ops.sample_tokens")


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_ties_zero_guidance_and_excluded_tokens(backend: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -math.inf], [-0.0, 0.0, -1.0, -math.inf]])
    assert draw(logits, backend, temperature=0.0).tolist() == [1, 0]
    assert draw(logits, backend, temperature=0.0, top_k=1, top_p=0.1).tolist() == [1, 0]
    tied = draw(logits[:1].expand(400, -1), backend, top_k=1)
    assert set(tied.tolist()) == {1, 2}  # both of the largest stay
    rows = torch.full((300, 50), -math.inf)
    rows[:, 7], rows[:, 31] = -4.0, -4.0
    assert set(draw(rows, backend).tolist()) == {7, 31}
    plain, other = logits_of(8, 100), logits_of(8, 100, 1)
    assert torch.equal(draw(plain, backend, uncond=other, guidance=1.0), draw(plain, backend))
    guided = other + 2.5 * (plain - other)
    assert torch.equal(draw(plain, backend, uncond=other, guidance=2.5), draw(guided, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_tensors_for_numbers_and_out(backend: str) -> None:
    wide, index = logits_of(6, 3 * 501).view(6, 3, 501), torch.arange(12)[::2]
    settings = {"seed": 9, "image_index": index, "position": 4, "top_k": 30}
    expected = draw(wide[:, 1].clone(), backend, **settings)
    assert expected.dtype == torch.int64 and expected.shape == (6,)
    assert torch.equal(draw(wide[:, 1], backend, **settings), expected)
    assert torch.equal(draw(wide[:, 1].t().contiguous().t(), backend, **settings), expected)
    out = torch.full((6,), -1)
    got = draw(wide[:, 1], backend, **{**settings, "seed": torch.tensor(9), "position": torch.tensor(4)}, out=out)
    assert got is out and torch.equal(out, expected)
    assert draw(wide[:0, 1], backend, image_index=index[:0]).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bad", "row"), [((1, math.nan), 1), ((2, math.inf), 2), ((0, None), 0)])
def test_bad_rows_raise(backend: str, bad: tuple[int, float | None], row: int) -> None:
    logits = logits_of(3, 40)
    logits[bad[0], 39 if bad[1] is not None else slice(None)] = -math.inf if bad[1] is None else bad[1]
    for settings in (
        {},
        {"temperature": 0.0},
        {"top_k": 3, "top_p": 0.5},
        {"uncond": logits_of(3, 40, 1), "guidance": 2.0},
    ):
        with pytest.raises(
            ValueError, match=f"row {row} of the .guided. logits holds NaN or .inf, or nothing but -inf"
        ):
            draw(logits, backend, **settings)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"logits": torch.zeros(3, 4, dtype=torch.float64)},
            TypeError,
            "logits must be float32, bfloat16 or float16, got torch.float64",
        ),
        ({"logits": torch.zeros(4)}, ValueError, r"logits must be \(B, V\)"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "1 <= V <= 65536"),
        ({"logits": torch.zeros(1, 65537)}, ValueError, "1 <= V <= 65536"),
        ({"image_index": torch.arange(2)}, ValueError, r"image_index must be \(3,\) on cpu, got \(2,\)"),
        ({"image_index": torch.arange(3).int()}, TypeError, "image_index must be an int64 tensor, got torch.int32"),
        ({"image_index": [0, 1, 2]}, TypeError, "image_index must be an int64 tensor, got list"),
        ({"seed": -1}, ValueError, "seed must be 0 or more"),
        ({"seed": 1.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
        (
            {"position": torch.zeros(1, dtype=torch.int64)},
            ValueError,
            "position must be an int or a 0-d int64 tensor on cpu",
        ),
        ({"position": 2**32}, ValueError, "position must be 0 or more and below 2.32"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0"),
        ({"temperature": 1e-6}, ValueError, "temperature must be 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be 0"),
        ({"top_k": -1}, ValueError, "top_k must be an int, 0"),
        ({"top_k": 2.0}, ValueError, "top_k must be an int, 0"),
        ({"top_p": 1.01}, ValueError, r"top_p must be in \[0, 1\]"),
        ({"top_p": math.nan}, ValueError, r"top_p must be in \[0, 1\]"),
        ({"guidance": 2.0}, ValueError, "guidance 2.0 needs uncond, got None"),
        ({"guidance": math.inf, "uncond": torch.zeros(3, 4)}, ValueError, "guidance must be in"),
        ({"guidance": 2.0, "uncond": torch.zeros(3, 5)}, ValueError, "uncond must match logits"),
        ({"out": torch.zeros(3)}, TypeError, "out must be an int64 tensor"),
        ({"out": torch.zeros(6, dtype=torch.int64)[::2]}, ValueError, "out must be contiguous"),
    ],
)
def test_bad_input_says_what_came(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"logits": torch.zeros(3, 4), "seed": 0, "image_index": torch.arange(3), "position": 0, **changes}
    with pytest.raises(error, match=message):
        op.sample_tokens(given.pop("logits"), **given)


@needs_extension
def test_opcheck() -> None:
    arguments = (
        logits_of(3, 100),
        None,
        torch.arange(3),
        None,
        5,
        torch.tensor(4),
        0,
        1.0,
        7,
        0.9,
        1.0,
        torch.zeros(3, dtype=torch.int64),
        None,
    )
    torch.library.opcheck(torch.ops.star_fast.sample_tokens.default, arguments)
    guided = (arguments[0].half(), arguments[0].half() + 1, *arguments[2:10], 3.0, *arguments[11:])
    torch.library.opcheck(torch.ops.star_fast.sample_tokens.default, guided)


@needs_extension
def test_the_operator_guards_its_memory() -> None:
    good = [
        logits_of(3, 100),
        None,
        torch.arange(3),
        None,
        5,
        None,
        0,
        1.0,
        7,
        0.9,
        1.0,
        torch.zeros(3, dtype=torch.int64),
        None,
    ]
    draw(good[0])  # loads the extension
    for place, bad in (
        (0, torch.zeros(3, 65537)),
        (0, torch.zeros(100, 3).t()),
        (1, torch.zeros(3, 99)),
        (2, torch.arange(2)),
        (3, torch.zeros(2).long()),
        (11, torch.zeros(2).long()),
        (11, torch.zeros(3)),
        (9, 1.5),
        (8, -1),
    ):
        with pytest.raises(ValueError, match="sample_tokens: "):
            torch.ops.star_fast.sample_tokens(*good[:place], bad, *good[place + 1 :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_cuda_tensors_need_no_driver(backend: str) -> None:
    if backend == "cpp" and not importlib.import_module("star_fast.ops.extension").HAS_CUDA:
        pytest.skip("star_fast._C was built without CUDA")
    with FakeTensorMode(), dispatch.record() as calls:
        logits, position = torch.empty(6, 16384, device="cuda"), torch.empty((), dtype=torch.int64, device="cuda")
        got = op.sample_tokens(
            logits,
            seed=1,
            image_index=torch.empty(6, dtype=torch.int64, device="cuda"),
            position=position,
            top_k=9,
            top_p=0.5,
            uncond=logits,
            guidance=2.0,
            backend=None if backend == "cpp" else backend,
        )
    assert got.shape == (6,) and got.dtype == torch.int64 and got.device.type == "cuda"
    launches = [dispatch.Launch("sample_tokens_kernel", (6,))] if backend == "cpp" else []
    assert calls == [dispatch.Recorded("sample_tokens", backend, launches)]


def test_without_the_extension_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(4, 50)
    expected = draw(logits, "reference")
    monkeypatch.setattr(dispatch._OPS["sample_tokens"], "loaded", {})
    monkeypatch.setitem(sys.modules, "star_fast.ops.extension", None)
    assert torch.equal(draw(logits, None), expected)
    with pytest.raises(dispatch.BackendUnavailable, match="cannot be imported"):
        draw(logits, "cpp")


def test_inputs_and_cost() -> None:
    call = op.inputs("tiny", torch.bfloat16)
    assert op.sample_tokens(**call).max() < call["logits"].shape[1]
    rows, vocab = call["logits"].shape
    assert op.cost(call) == dispatch.Cost(2 * rows * vocab + 16 * rows, 18 * rows * vocab)
    assert op.cost({**call, "uncond": call["logits"], "guidance": 2.0}).bytes_moved == 4 * rows * vocab + 16 * rows

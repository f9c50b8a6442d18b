"""ops.masked_attention: every backend against loops in float64, the mask's promise, and the launches."""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.ops import dispatch
from star_fast.ops.rotary import random_table, rotate
from tests import contract
from tests.access_counting import count_accesses

op = import_module("star_fast.ops.masked_attention")
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="runs the kernels on CPU tensors, in Triton's interpreter"
)
KERNELS = ["attention_prepare", "attention_forward", "attention_backward_queries", "attention_backward_keys"]


def call(
    shape: tuple[int, int, int, int], hidden: float | None = 0.3, rotary: bool = True, seed: int = 0
) -> dict[str, Tensor | None]:
    """Arguments for (B, T, H, E); `hidden`: share of keys hidden, None without a mask."""
    batch, positions, heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, positions, 3, heads, size, generator=generator)
    keep = None
    if hidden is not None:
        keep = torch.rand(batch, positions, generator=generator) >= hidden
        keep[:, 0] = True
    return {"qkv": qkv, "keep": keep, "rotary": random_table(positions, size, generator) if rotary else None}


def only_qkv(arguments: dict[str, Tensor | None]) -> SimpleNamespace:
    """The op as a function of qkv alone, so that the contract checks leave the rotary table in float32."""
    rest = {"keep": arguments["keep"], "rotary": arguments["rotary"]}
    return SimpleNamespace(
        __name__="masked_attention_qkv",
        reference=lambda qkv: op.reference(qkv, **rest),
        masked_attention_qkv=lambda qkv, backend: op.masked_attention_qkv(qkv, **rest, backend=backend),
    )


def loops(qkv: Tensor, keep: Tensor | None, rotary: Tensor | None) -> Tensor:
    """The definition, one number at a time."""
    batch, positions, _, heads, size = qkv.shape
    x = qkv.double().tolist()
    out = torch.zeros(batch, positions, heads, size, dtype=torch.float64)

    def turned(b: int, t: int, part: int, h: int) -> list[float]:
        vector = x[b][t][part][h]
        if rotary is None:
            return vector
        found = []
        for p in range(size // 2):
            cos, sin = rotary[t, p].tolist()
            found += [vector[2 * p] * cos - vector[2 * p + 1] * sin, vector[2 * p] * sin + vector[2 * p + 1] * cos]
        return found

    for b in range(batch):
        for h in range(heads):
            for t in range(positions):
                seen = [s for s in range(t + 1) if keep is None or keep[b, s]]
                scores = [
                    sum(a * c for a, c in zip(turned(b, t, 0, h), turned(b, s, 1, h), strict=True)) / math.sqrt(size)
                    for s in seen
                ]
                weights = [math.exp(score - max(scores)) for score in scores]
                for e in range(size):
                    out[b, t, h, e] = sum(w * x[b][s][2][h][e] for w, s in zip(weights, seen, strict=True)) / sum(
                        weights
                    )
    return out


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize(("hidden", "rotary"), [(None, False), (None, True), (0.4, False), (0.4, True)])
def test_loops_in_float64(backend: str, hidden: float | None, rotary: bool) -> None:
    arguments = call((2, 9, 2, 6), hidden, rotary)
    got = op.masked_attention_qkv(
        arguments["qkv"].double(), arguments["keep"], rotary=arguments["rotary"], backend=backend
    )
    torch.testing.assert_close(got, loops(**arguments), rtol=1e-12, atol=1e-13)


SHAPES = [  # B, T, H, E; odd T, several tiles of queries and keys, T = 1, every head size, padded ones included
    ((2, 65, 2, 64), 0.3, True),
    ((1, 131, 1, 32), 0.25, True),
    ((2, 17, 2, 80), 0.3, True),
    ((1, 33, 1, 96), 0.3, False),
    ((1, 37, 2, 100), None, True),
    ((2, 19, 1, 128), 0.3, True),
    ((1, 1, 2, 64), 0.0, True),
    ((1, 1, 1, 32), None, False),
    ((1, 70, 1, 64), None, False),
    ((0, 5, 2, 32), 0.3, True),
]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "hidden", "rotary"), SHAPES)
def test_error_rule(shape: tuple[int, int, int, int], hidden: float | None, rotary: bool, dtype: torch.dtype) -> None:
    arguments = call(shape, hidden, rotary)
    contract.check_op(only_qkv(arguments), "triton", {"qkv": arguments["qkv"]}, ("qkv",), dtype)


@interpreted
def test_one_visible_key() -> None:
    """With all but position 0 hidden every query returns v[0], whatever it asks."""
    arguments = call((2, 67, 1, 32), hidden=1.0)
    contract.check_op(only_qkv(arguments), "triton", {"qkv": arguments["qkv"]}, ("qkv",), torch.float32)
    out = op.masked_attention_qkv(**arguments, backend="triton")
    torch.testing.assert_close(out, arguments["qkv"][:, :1, 2].expand_as(out))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize(("hidden", "rotary"), [(0.4, True), (None, False)])
def test_gradcheck(backend: str, hidden: float | None, rotary: bool) -> None:
    arguments = call((1, 4, 1, 2), hidden, rotary, seed=1)
    contract.check_gradcheck(only_qkv(arguments), backend, {"qkv": arguments["qkv"]}, ("qkv",))


@interpreted
def test_any_strides_and_same_bits() -> None:
    arguments = call((2, 21, 2, 32))
    for strided in (
        torch.randn(2, 21, 3, 2, 48)[..., 8:40],
        torch.randn(3, 2, 2, 21, 32).permute(1, 3, 0, 2, 4),
        torch.randn(2, 21, 3, 32, 2).transpose(3, 4),
    ):
        assert not strided.is_contiguous()
        contract.check_op(only_qkv(arguments), "triton", {"qkv": strided}, ("qkv",), torch.float32)
    contract.check_same_bits(only_qkv(arguments), "triton", {"qkv": arguments["qkv"]}, ("qkv",))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_key_has_no_influence(backend: str, dtype: torch.dtype) -> None:
    """Change everything at a hidden position: all other positions keep their bits; its k and v get gradient 0, its q
    does not.
    """
    arguments = call((1, 40, 2, 32), hidden=0.0)
    arguments["keep"][0, 7] = False
    qkv = arguments["qkv"].to(dtype)
    changed = qkv.clone()
    changed[0, 7] = 50 * torch.randn(3, 2, 32)
    before, after = (
        op.masked_attention_qkv(x, arguments["keep"], rotary=arguments["rotary"], backend=backend)
        for x in (qkv, changed)
    )
    others = torch.arange(40) != 7
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, 7], after[:, 7])
    _, gradients = contract.run_with_gradients(
        lambda qkv: op.masked_attention_qkv(qkv, arguments["keep"], rotary=arguments["rotary"], backend=backend),
        {"qkv": qkv},
        ("qkv",),
    )
    assert not gradients["qkv"][0, 7, 1:].any()
    assert gradients["qkv"][0, 7, 0].any()


@interpreted
def test_kernels_always_see_position_0() -> None:
    """On CUDA keep's values are not checked; a hidden position 0 then counts as visible, in the kernels as in the
    reference.
    """
    kernels = import_module("star_fast.ops.triton.masked_attention")
    arguments = call((2, 20, 1, 32))
    expected = op.reference(**arguments)
    arguments["keep"][:, 0] = False
    torch.testing.assert_close(kernels.run(**arguments), expected)
    torch.testing.assert_close(op.reference(**arguments), expected, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize(("hidden", "rotary"), [(0.3, True), (None, True), (0.3, False), (None, False)])
def test_the_callers_qkv_is_overwritten_only_where_it_says_so(hidden: float | None, rotary: bool) -> None:
    """Same bits either way; kept, qkv is as it was; given away, v still is, and q and k are turned."""
    arguments = call((2, 35, 2, 32), hidden, rotary)
    results = []
    for overwrite in (False, True):
        qkv = arguments["qkv"].clone().requires_grad_()
        given = qkv.clone()  # as a product's result: not a leaf
        out = op.masked_attention_qkv(
            given, arguments["keep"], rotary=arguments["rotary"], overwrite=overwrite, backend="triton"
        )
        (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
        results.append((out, gradient))
        turned = overwrite and rotary
        assert torch.equal(given[:, :, 2], qkv[:, :, 2])
        assert torch.equal(given, qkv) != turned
        if turned:
            for part in (0, 1):
                torch.testing.assert_close(given[:, :, part], rotate(qkv[:, :, part], arguments["rotary"][:, None]))
    assert all(torch.equal(kept, given) for kept, given in zip(*results, strict=True))


@interpreted
def test_without_gradients_queries_are_not_written() -> None:
    arguments = call((1, 20, 2, 16))
    given = arguments["qkv"].clone()
    with torch.no_grad():
        op.masked_attention_qkv(given, arguments["keep"], rotary=arguments["rotary"], overwrite=True, backend="triton")
    assert torch.equal(given[:, :, 0], arguments["qkv"][:, :, 0])


@interpreted
@pytest.mark.parametrize("positions", [1, 32, 64, 65, 130])
def test_mask_is_packed_a_bit_a_key(positions: int) -> None:
    kernels = import_module("star_fast.ops.triton.masked_attention")
    arguments = call((3, positions, 1, 16), 0.5, rotary=False)
    arguments["keep"][1, 0] = False  # counts as visible
    words = kernels._prepare(arguments["qkv"], arguments["keep"], None)
    assert words.shape == (3, -(-positions // 64))
    for sequence in range(3):
        bits = [s for s in range(64 * words.shape[1]) if (words[sequence, s // 64].item() >> s % 64) & 1]
        assert bits == [s for s in range(positions) if s == 0 or arguments["keep"][sequence, s]]


@interpreted
def test_huge_scores_stay_finite() -> None:
    arguments = call((1, 40, 1, 32), rotary=False)
    arguments["qkv"] *= 100
    contract.check_op(only_qkv(arguments), "triton", {"qkv": arguments["qkv"]}, ("qkv",), torch.float32, floor=1e-5)


def test_separate_q_k_v() -> None:
    arguments = call((2, 9, 2, 16), rotary=False)
    q, k, v = (x.clone().requires_grad_() for x in arguments["qkv"].unbind(2))
    packed = arguments["qkv"].clone().requires_grad_()
    out, expected = op.masked_attention(q, k, v, arguments["keep"]), op.masked_attention_qkv(packed, arguments["keep"])
    assert torch.equal(out, expected)
    for got, want in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), packed)[0].unbind(2), strict=True
    ):
        assert torch.equal(got, want)


@interpreted
def test_triton_launches_its_kernels_forward_and_backward() -> None:
    arguments = call((1, 10, 1, 16))
    with count_accesses() as launches:
        contract.run_with_gradients(
            lambda qkv: op.masked_attention_qkv(qkv, arguments["keep"], rotary=arguments["rotary"], backend="triton"),
            {"qkv": arguments["qkv"]},
            ("qkv",),
        )
    assert [launch.kernel for launch in launches] == KERNELS


def test_backends_without_a_mask() -> None:
    arguments = call((2, 9, 2, 16), hidden=None)
    assert torch.equal(op.masked_attention_qkv(**arguments, backend="sdpa"), op.reference(**arguments))
    with pytest.raises(dispatch.BackendUnavailable, match="a key mask is given"):
        op.masked_attention_qkv(**call((2, 9, 2, 16)), backend="sdpa")
    with pytest.raises(
        dispatch.BackendUnavailable, match=r"flash-attn (is not installed|takes float16 or bfloat16 on CUDA)"
    ):
        op.masked_attention_qkv(**arguments, backend="flash")
    with pytest.raises(dispatch.BackendUnavailable, match="head sizes up to 128, got 130"):
        op.masked_attention_qkv(torch.zeros(1, 2, 3, 1, 130), backend="triton")


@pytest.mark.parametrize("masked", [True, False])
def test_fake_cuda(masked: bool) -> None:
    """Without a driver: the backend that CUDA tensors take, its launches, and the result's shape, dtype and device."""
    with FakeTensorMode(), dispatch.record() as recorded:
        qkv = torch.empty(2, 65, 3, 4, 64, dtype=torch.bfloat16, device="cuda")
        keep = torch.ones(2, 65, dtype=torch.bool, device="cuda") if masked else None
        out = op.masked_attention_qkv(qkv, keep, rotary=torch.empty(65, 32, 2, device="cuda"))
    assert (tuple(out.shape), out.dtype, out.device.type) == ((2, 65, 4, 64), torch.bfloat16, "cuda")
    ((name, chosen, launches, _),) = recorded
    assert (name, chosen) == ("masked_attention_qkv", "triton")
    # 65 positions are two words of the mask, four groups of 32 keys, and two tiles of 64 queries; 4 heads of 64 are two
    # blocks of 128 columns.
    assert launches == [
        dispatch.Launch("attention_prepare", (2 * 4, 2)),
        dispatch.Launch("attention_forward", (2 * 4 * 2,)),
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"qkv": torch.zeros(1, 2, 3, 1, 4, dtype=torch.int64)},
            TypeError,
            "qkv must be floating point, got torch.int64",
        ),
        ({"qkv": torch.zeros(1, 2, 2, 1, 4)}, ValueError, r"qkv must be \(B, T, 3, H, E\)"),
        ({"qkv": torch.zeros(1, 0, 3, 1, 4)}, ValueError, "with T, H, E >= 1"),
        ({"keep": torch.ones(1, 2)}, TypeError, "keep must be bool"),
        ({"keep": torch.ones(1, 3, dtype=torch.bool)}, ValueError, r"keep must be \(B, T\) = \(1, 2\)"),
        ({"keep": torch.tensor([[False, True]])}, ValueError, r"keep\[:, 0\] must be True .* got False in 1 rows"),
        ({"rotary": torch.zeros(2, 2, 2, dtype=torch.bfloat16)}, TypeError, "rotary must be float32"),
        ({"rotary": torch.zeros(1, 2, 2)}, ValueError, "2 positions or more"),
        ({"rotary": torch.zeros(2, 4, 2)}, ValueError, "4 / 2 pairs"),
        (
            {"keep": torch.ones(1, 2, dtype=torch.bool, device="meta")},
            ValueError,
            "keep must be on cpu like qkv, got meta",
        ),
    ],
)
def test_bad_input_says_what_came(arguments: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        op.masked_attention_qkv(**{"qkv": torch.zeros(1, 2, 3, 1, 4), **arguments})


def test_q_k_v_must_agree() -> None:
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="v must be like q"):
        op.masked_attention(q, q, q.double())
    with pytest.raises(ValueError, match=r"q must be \(B, T, H, E\)"):
        op.masked_attention(q[0], q[0], q[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "hidden", "rotary"), [((2, 256, 3, 64), 0.25, True), ((1, 577, 2, 64), 0.25, True), *SHAPES[2:6]]
)
def test_on_cuda(shape: tuple[int, int, int, int], hidden: float | None, rotary: bool, dtype: torch.dtype) -> None:
    arguments = {key: value if value is None else value.cuda() for key, value in call(shape, hidden, rotary).items()}
    contract.check_op(only_qkv(arguments), "triton", {"qkv": arguments["qkv"]}, ("qkv",), dtype)
    contract.check_same_bits(only_qkv(arguments), "triton", {"qkv": arguments["qkv"].to(dtype)}, ("qkv",))

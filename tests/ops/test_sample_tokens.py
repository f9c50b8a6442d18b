"""ops.sample_tokens: the five steps against plain loops, the backends against each other bit for bit, the contract.
(Draws: test_sample_tokens_draws.py.)
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star_fast.ops import dispatch

op = importlib.import_module("star_fast.ops.sample_tokens")
HAS_EXTENSION = importlib.util.find_spec("star_fast._C") is not None
needs_extension = pytest.mark.skipif(
    not HAS_EXTENSION, reason="star_fast._C is not built (python setup.py build_ext --inplace)"
)
BACKENDS = [pytest.param("cpp", marks=needs_extension), "reference"]
FAST = "cpp" if HAS_EXTENSION else "reference"


def logits_of(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, backend: str = FAST, **settings: Any) -> Tensor:
    given = {"seed": 1, "image_index": torch.arange(logits.shape[0]), "position": 0, **settings}
    return op.sample_tokens(logits, **given, backend=backend)


# The parts


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known answers, kat_vectors, philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert op.philox4x32(counter, key) == expected
    as_tensors = op.philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(word) for word in as_tensors) == expected


def test_multiply_high_is_exact() -> None:
    source = random.Random(0)
    for _ in range(500):
        fraction, total = source.getrandbits(64), source.getrandbits(source.randint(1, 57))
        signed = fraction - 2**64 if fraction >= 2**63 else fraction
        assert int(op.multiply_high(torch.tensor(signed), torch.tensor(total))) == fraction * total >> 64


def test_weights_are_the_exponential() -> None:
    spread = -30 * torch.rand(20000, generator=torch.Generator().manual_seed(0))
    below = torch.cat([spread, torch.tensor([0.0, -1e-30, -20.0, -27.0, -29.0, -1e30, -torch.inf])])
    for temperature in (1.0, 0.3, 7.0):
        exact = torch.exp(below.double() / temperature) * 2.0**40
        got = op.weights(below, temperature)
        # Polynomial 2e-7; rounding z = below * log2(e) / temperature twice, 2^-23 |z| ln 2; rounding to an integer,
        # 1/2.
        allowed = exact * (2e-7 + 2.0**-23 * (below.double() / temperature).abs().clamp(max=100)) + 0.5
        assert ((got - exact).abs() <= allowed).all()
        assert got[20000] == 2**40 and got[-1] == 0 and got[-2] == 0


def by_loops(logits: list[float], weights: list[int], bits: int, top_k: int, top_p: float) -> int:
    """Steps 3 to 5 with Python integers, one token at a time."""
    kept = list(range(len(logits)))
    if top_k:
        kept = [i for i in kept if sum(logits[j] > logits[i] for j in kept) < top_k]
    if top_p < 1:
        limit = int(top_p * 2**64) * sum(weights[i] for i in kept) >> 64
        kept = [i for i in kept if sum(weights[j] for j in kept if logits[j] > logits[i]) <= limit]
    threshold = bits * sum(weights[i] for i in kept) >> 64
    running = 0
    for i in kept:
        running += weights[i]
        if running > threshold:
            return i
    raise AssertionError("unreachable")


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_by_loops(backend: str) -> None:
    cases = [
        (1, 0, 1.0, 1.0),
        (9, 3, 1.0, 0.5),
        (23, 0, 0.7, 1.0),
        (23, 8, 0.6, 2.0),
        (40, 1, 0.5, 1.0),
        (40, 12, 0.0, 1.0),
    ]
    for case, (vocab, top_k, top_p, temperature) in enumerate(cases):
        logits = logits_of(12, vocab, case)
        logits[:4] = (2 * logits[:4]).round() / 2  # ties
        logits[4, : vocab // 2] = -math.inf
        tokens = draw(logits, backend, seed=2**63 - 1, position=case, top_k=top_k, top_p=top_p, temperature=temperature)
        weights = op.weights(logits - logits.amax(1, keepdim=True), temperature)
        for row in range(len(logits)):
            words = op.philox4x32((case, 0, row, 0), (0xFFFFFFFF, 0x7FFFFFFF))
            assert int(tokens[row]) == by_loops(
                logits[row].tolist(), weights[row].tolist(), words[0] << 32 | words[1], top_k, top_p
            )


# The backends agree bit for bit

SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 5, "top_p": 0.9, "temperature": 0.7},
    {"top_k": 2000, "top_p": 0.9, "guidance": 1.5},
    {"top_p": 0.5, "temperature": 1.3},
    {"top_p": 0.0},
    {"top_k": 10**12, "top_p": 0.999, "guidance": 3.0},
    {"temperature": 0.0},
    {"temperature": 0.0, "guidance": 7.5},
    {"top_k": 50, "top_p": 0.3, "temperature": 1e-5},
    {"top_k": 100, "temperature": 1e5},
]


@needs_extension
def test_random_bits_of_zero_draw_no_token_without_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The running sum has to exceed the threshold: at threshold 0 the tokens of weight 0 in front do not."""
    monkeypatch.setattr(op, "uniform64", lambda seed, image_index, position: torch.zeros_like(image_index))
    logits = torch.tensor([[-math.inf, 0.0, 1.0], [-100.0, -math.inf, 0.0], [0.0, 1.0, 2.0]])
    assert draw(logits, "reference").tolist() == [1, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 3, 257, 1000, 16384, 65536])
def test_cpp_equals_reference(vocab: int, dtype: torch.dtype) -> None:
    rows = 3 if vocab > 1000 else 8
    for scale in (0.3, 3.0, 30.0) if vocab <= 1000 else (2.0,):
        logits, uncond = logits_of(rows, vocab, 1, scale), logits_of(rows, vocab, 2, scale)
        if vocab > 2:
            logits[0, ::3] = -math.inf
            logits[1] = 0.0
            logits[1, 1] = -0.0
            uncond[0, 1] = -math.inf if dtype == torch.float32 else 0.0
            logits[0, 1] = -math.inf
            logits[2, 1:] = -math.inf
        for settings in SETTINGS:
            settings = {**settings, "seed": vocab, "position": 9, "image_index": torch.arange(rows) * 2**34 + 5}
            if "guidance" in settings:
                settings["uncond"] = uncond.to(dtype)
            assert torch.equal(
                draw(logits.to(dtype), "cpp", **settings), draw(logits.to(dtype), "reference", **settings)
            ), (vocab, dtype, scale, settings)


@needs_extension
def test_every_float16_converts() -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    pairs = torch.stack([finite, finite.float().neg().half()], 1)  # the larger of x and -x, found by argmax
    assert torch.equal(draw(pairs, "cpp", temperature=0.0), (pairs[:, 0].float() < pairs[:, 1].float()).long())
    others = torch.stack([finite, torch.nextafter(finite, torch.tensor(math.inf, dtype=torch.float16))], 1)
    others = others[others[:, 1].isfinite() & (others[:, 0] != others[:, 1])]
    assert (draw(others, "cpp", temperature=0.0) == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_size_and_threads_change_nothing(backend: str) -> None:
    logits, index = logits_of(24, 3001), torch.arange(24) + 100
    settings = {"top_k": 300, "top_p": 0.9, "position": 5}
    whole = draw(logits, backend, image_index=index, **settings)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(logits[order], backend, image_index=index[order], **settings), whole[order])
    assert torch.equal(
        torch.cat([draw(logits[i : i + 1], backend, image_index=index[i : i + 1], **settings) for i in range(24)]),
        whole,
    )
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(draw(logits, backend, image_index=index, **settings), whole)
    finally:
        torch.set_num_threads(threads)


PROGRAM = """
import torch
from star_fast.ops.sample_tokens import sample_tokens
logits = 2 * torch.randn(16, 5003, generator=torch.Generator().manual_seed(0))
settings = [(0, 1.0, 1.0), (700, 1.0, 1.0), (0, 0.9, 1.0), (700, 0.9, 3.0), (0, 1.0, 0.0)]
print(torch.backends.cpu.get_cpu_capability(), [
    sample_tokens(x, seed=4, image_index=torch.arange(16), position=1, top_k=k, top_p=p, temperature=t,
                  backend="cpp").tolist()
    for x in (logits, logits.bfloat16(), logits.half()) for k, p, t in settings])
"""


@needs_extension
def test_instruction_sets_change_nothing() -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "ATEN_CPU_CAPABILITY": name},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("default", "avx2", "avx512")
    ]
    outputs = [process.communicate(timeout=300)[0].split(maxsplit=1) for process in running]
    assert len({tokens for _, tokens in outputs}) == 1, outputs
    assert outputs[0][0] in ("DEFAULT", "NO") or "x86" not in os.uname().machine, outputs[0][0]


# The contract


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


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    for vocab, dtype in (
        (1, torch.float32),
        (257, torch.float16),
        (16384, torch.float32),
        (16384, torch.bfloat16),
        (65536, torch.float32),
    ):
        logits, uncond = logits_of(33, vocab, 1).to(dtype), logits_of(33, vocab, 2).to(dtype)
        for settings in SETTINGS:
            settings = {**settings, **({"uncond": uncond} if "guidance" in settings else {})}
            on_gpu = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in settings.items()}
            got = draw(
                logits.cuda(),
                "cpp",
                image_index=torch.arange(33, device="cuda"),
                position=torch.tensor(0, device="cuda"),
                **on_gpu,
            )
            assert torch.equal(got.cpu(), draw(logits, "reference", **settings)), (vocab, dtype, settings)
    op.raise_on_bad_rows("cuda")
    logits = logits_of(3, 100).cuda()
    logits[1, 5] = math.nan
    draw(logits, "cpp", image_index=torch.arange(3, device="cuda"))
    with pytest.raises(ValueError, match="discard this batch"):
        op.raise_on_bad_rows("cuda")


@pytest.mark.gpu
def test_cuda_graph_reads_the_position_from_the_device() -> None:
    logits, index = logits_of(8, 16384).cuda(), torch.arange(8, device="cuda")
    position, out = torch.zeros((), dtype=torch.int64, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
    draw(logits, "cpp", image_index=index, position=position, top_k=100, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw(logits, "cpp", image_index=index, position=position, top_k=100, out=out)
    for step in range(4):
        position.fill_(step)
        graph.replay()
        assert torch.equal(out.cpu(), draw(logits.cpu(), "reference", position=step, top_k=100))

"""ops.sample_tokens: the five steps against plain loops, the backends against each other bit for bit.
(Draws: test_sample_tokens_draws.py; what it takes and refuses: test_sample_tokens_contract.py.)
"""

from __future__ import annotations

import importlib
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.ops.token_draws import BACKENDS, draw, logits_of, needs_extension

op = importlib.import_module("star_fast.ops.sample_tokens")


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


def test_random_bits_of_zero_draw_no_token_without_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The running sum has to exceed the threshold: at threshold 0 the tokens of weight 0 in front do not."""
    monkeypatch.setattr(op, "uniform64", lambda seed, image_index, position: torch.zeros_like(image_index))
    logits = torch.tensor([[-math.inf, 0.0, 1.0], [-100.0, -math.inf, 0.0], [0.0, 1.0, 2.0]])
    assert draw(logits, "reference").tolist() == [1, 2, 0]


@needs_extension
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

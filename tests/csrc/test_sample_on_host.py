"""csrc/sample_cuda.cu on the host: the file that nvcc compiles, with real threads for CUDA's, under sanitizers, against
the CPU op and the reference.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from star_fast.ops.sample_tokens import reference, sample_tokens

HERE = Path(__file__).parent
SANITIZERS = {"thread": "thread", "address": "address,undefined"}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@dataclass
class Call:
    """One call of the op; `threads` names the block size that the host build knows."""

    logits: Tensor
    threads: int = 64
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    uncond: Tensor | None = None
    guidance: float = 1.0
    seed: int = 2**62 + 12345
    position: int = 77
    image_index: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.image_index = torch.arange(self.logits.shape[0]) * 2**33 + 3

    def packed(self) -> bytes:
        """As sample_on_host.cpp reads it."""
        header = struct.pack(
            "8q3d",
            *self.logits.shape,
            TYPES[self.logits.dtype],
            self.uncond is not None,
            self.seed,
            self.position,
            self.top_k,
            self.threads,
            self.temperature,
            self.top_p,
            self.guidance,
        )
        tensors = [self.logits, *([] if self.uncond is None else [self.uncond]), self.image_index]
        return header + b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)

    def settings(self) -> dict:
        """Arguments of the op."""
        return {
            "seed": self.seed,
            "image_index": self.image_index,
            "position": self.position,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "uncond": self.uncond,
            "guidance": self.guidance,
        }


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host build of the kernel under one sanitizer."""
    binary = tmp_path_factory.mktemp("sample_on_host") / request.param
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-g",
            "-ffp-contract=off",
            f"-fsanitize={SANITIZERS[request.param]}",
            "-fno-sanitize-recover=all",
            "-pthread",
            "-x",
            "c++",
            f"-I{HERE}",
            str(HERE / "sample_on_host.cpp"),
            "-o",
            str(binary),
        ],
        check=True,
    )
    return binary


def run(program: Path, calls: list[Call]) -> list[tuple[Tensor, int]]:
    """Tokens and bad-row flag of each call; fails on anything that the sanitizer reports."""
    given, got = program.with_suffix(".in"), program.with_suffix(".out")
    given.write_bytes(b"".join(call.packed() for call in calls))
    done = subprocess.run([program, given, got], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, f"exit code {done.returncode}\n{done.stderr[-4000:]}"
    numbers, answers = torch.frombuffer(bytearray(got.read_bytes()), dtype=torch.int64), []
    for call in calls:
        rows = call.logits.shape[0]
        answers.append((numbers[:rows], int(numbers[rows])))
        numbers = numbers[rows + 1 :]
    assert not len(numbers)
    return answers


def random_logits(rows: int, vocab: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def good_calls() -> list[Call]:
    """Random and adversarial rows, all block sizes, dtypes and settings."""
    one_finite = torch.full((1, 301), -torch.inf)
    one_finite[0, 177] = -3.0
    sparse = random_logits(2, 515, 1)
    sparse[:, ::3] = -torch.inf
    # One bin, two neighbouring floats
    two_values = torch.where(torch.arange(700) % 7 == 0, 1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)))[
        None
    ]
    signed_zeros = torch.tensor([[-0.0, 0.0, -0.0, -1e-40, 1e-40, -5.0]])
    spread = torch.linspace(-80, 80, 1000)[None]
    long = random_logits(1, 16384, 2)
    calls = [
        Call(random_logits(2, 1, 3), threads=32, top_k=1, top_p=0.5),
        Call(random_logits(2, 3, 4), threads=32, top_p=0.4),
        Call(random_logits(3, 1023, 5), threads=32, top_k=200, top_p=0.8),
        Call(random_logits(3, 1023, 5), threads=32),
        Call(random_logits(2, 1021, 6).bfloat16(), top_k=100, top_p=0.9, temperature=1.7),
        Call(random_logits(2, 1021, 7).half(), top_p=0.3, temperature=0.5),
        Call(random_logits(2, 260, 8), uncond=random_logits(2, 260, 9), guidance=3.5, top_k=20),
        Call(
            random_logits(2, 261, 8).bfloat16(),
            uncond=random_logits(2, 261, 9).bfloat16(),
            guidance=1.5,
            top_p=0.7,
            threads=32,
        ),
        Call(torch.zeros(2, 777), top_k=5, top_p=0.5),
        Call(torch.zeros(1, 777), temperature=0.0),
        Call(one_finite, top_k=7, top_p=0.9),
        Call(sparse, top_k=400, top_p=0.99, threads=32),
        Call(sparse, temperature=0.0),
        Call(two_values, top_k=50, top_p=0.5),
        Call(two_values, top_p=0.001, threads=32),
        Call(signed_zeros, top_k=2),
        Call(signed_zeros, temperature=0.0),
        Call(spread, top_k=900, top_p=0.5),
        Call(spread, top_k=999, temperature=20.0, threads=32),
        Call(random_logits(2, 300, 10), top_k=10**9, top_p=1.0),
        Call(random_logits(2, 300, 11), top_p=0.0),
        Call(random_logits(2, 300, 12), top_k=1),
        Call(random_logits(2, 300, 13, scale=1000.0), temperature=1e5, top_k=17, top_p=0.5),
        Call(long, top_k=2000, top_p=0.9),
        Call(random_logits(1, 16387, 14), threads=32, top_k=2000, top_p=0.9),
        Call(random_logits(1, 5000, 15), threads=1024, top_k=100, top_p=0.9),
    ]
    return calls


def test_equals_the_reference_and_the_cpu_op(program: Path) -> None:
    calls = good_calls()
    for call, (tokens, bad) in zip(calls, run(program, calls), strict=True):
        what = f"{tuple(call.logits.shape)} {call.logits.dtype}, {call.settings()}"
        assert bad == 0, what
        assert torch.equal(tokens, reference(call.logits, **call.settings(), out=None)), what
        assert torch.equal(tokens, sample_tokens(call.logits, **call.settings())), what


def test_bad_rows_set_the_flag_and_leave_the_others_alone(program: Path) -> None:
    rows = random_logits(4, 130, 20)
    nan, infinite, nothing = rows.clone(), rows.clone(), rows.clone()
    nan[2, 129] = -torch.nan
    infinite[0, 5] = torch.inf
    nothing[3] = -torch.inf
    calls = [
        Call(nan, top_k=5),
        Call(infinite),
        Call(nothing, top_p=0.5),
        Call(nothing, temperature=0.0),
        Call(rows, uncond=infinite, guidance=2.0),
        Call(rows, top_k=5),
    ]
    good = reference(rows, **Call(rows, top_k=5).settings(), out=None)
    answers = run(program, calls)
    assert [bad for _, bad in answers] == [1, 1, 1, 1, 1, 0]
    assert answers[0][0].tolist() == [*good[:2].tolist(), 0, good[3].item()]
    assert answers[1][0][0] == 0 and answers[2][0][3] == 0 and answers[3][0][3] == 0 and answers[4][0][0] == 0


def test_the_sanitizer_sees_a_missing_barrier(program: Path, tmp_path: Path) -> None:
    """The proof that a race would be found: the same file without the barrier after its histogram is cleared."""
    if program.name != "thread":
        pytest.skip("races are ThreadSanitizer's business")
    source = (HERE.parent.parent / "csrc" / "sample_cuda.cu").read_text()
    barrier = "s.low[b] = s.high[b] = 0;\n  __syncthreads();"
    assert source.count(barrier) == 1
    (tmp_path / "sample_cuda.cu").write_text(source.replace(barrier, "s.low[b] = s.high[b] = 0;"))
    (tmp_path / "driver.cpp").write_text(
        (HERE / "sample_on_host.cpp").read_text().replace("../../csrc/sample_cuda.cu", "sample_cuda.cu")
    )
    csrc = HERE.parent.parent / "csrc"
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-g",
            "-ffp-contract=off",
            "-fsanitize=thread",
            "-pthread",
            "-x",
            "c++",
            f"-I{HERE}",
            f"-I{csrc}",
            "driver.cpp",
            "-o",
            "racy",
        ],
        check=True,
        cwd=tmp_path,
    )
    (tmp_path / "in").write_bytes(Call(random_logits(1, 999, 5), top_k=200, top_p=0.8).packed())
    done = subprocess.run(["./racy", "in", "out"], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode != 0 and "data race" in done.stderr

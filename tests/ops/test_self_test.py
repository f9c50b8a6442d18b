"""`star-fast doctor --self-test`: every backend that can run here is run; a kernel that is wrong, crashes or gives NaN
is named.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from star_fast import cli
from star_fast.ops import dispatch, self_test, swiglu_cpp
from star_fast.ops.triton.launching import interpreting

CPP = {
    ("add_rms_norm", "cpp"),
    ("decode_attention", "cpp"),
    ("group_norm_silu", "cpp"),
    ("int8_linear", "cpp"),
    ("sample_tokens", "cpp"),
    ("swiglu", "cpp"),
    ("masked_attention_qkv", "sdpa"),
}


def checks() -> dict[tuple[str, str], list[self_test.Checked]]:
    found: dict[tuple[str, str], list[self_test.Checked]] = {}
    for each in self_test.self_test("cpu"):
        found.setdefault((each.op, each.backend), []).append(each)
    return found


def test_every_backend_of_every_op_is_looked_at() -> None:
    found = checks()
    assert set(found) == {(op, backend) for op in dispatch.op_names() for backend in dispatch.module_paths(op)}
    for each in CPP:
        assert any(check.passed for check in found[each]) and not any(check.passed is False for check in found[each]), (
            found[each]
        )
    if interpreting():
        assert all(
            check.passed for (_, backend), checks_of in found.items() if backend == "triton" for check in checks_of
        )
    # Two dtypes, and the calls beside the usual one.
    assert len(found["swiglu", "cpp"]) == 2 and len(found["decode_attention", "cpp"]) == 4
    assert {check.call for check in found["masked_attention_qkv", "sdpa"] if check.passed} == {
        "float32, nothing hidden",
        "bfloat16, nothing hidden",
    }
    assert all(check.told for checks_of in found.values() for check in checks_of)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda right: right * 1.001, "is allowed"),
        (lambda right: right * torch.nan, "error nan"),
        (None, "RuntimeError: no kernel image"),
    ],
)
def test_a_kernel_that_fails_is_named(
    wrong: object, says: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """A result off by a thousandth, one that is no number, a crash: only that op fails, and the command says so in one
    line.
    """
    right = swiglu_cpp.run

    def run(*arguments: object, **more: object) -> torch.Tensor:
        if wrong is None:
            raise RuntimeError("no kernel image is available\nmore lines")
        return wrong(right(*arguments, **more))

    monkeypatch.setattr(swiglu_cpp, "run", run)
    monkeypatch.setattr(dispatch, "op_names", lambda: ["swiglu", "sample_tokens"])
    monkeypatch.setattr("star_fast.doctor.examination.examine", lambda needed, weights: [])
    monkeypatch.setattr("star_fast.generation.device.take_device", lambda name: SimpleNamespace(type="cpu"))
    assert cli.main(["doctor", "--self-test"]) == 2
    said = capfd.readouterr()
    failed = [line for line in said.out.splitlines() if line.startswith("FAILED")]
    assert failed and all("swiglu [cpp" in line for line in failed) and any(says in line for line in failed), said.out
    assert len(said.err.strip().splitlines()) == 1 and "a kernel failed" in said.err

"""Memory-bound kernels move no more than they must: bytes counted in the interpreter against each op's `cost`, within 10 %."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton

from star_fast.ops import add_rms_norm, dispatch, ema_update, swiglu
from tests import contract
from tests.access_counting import Launch, count_accesses

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="accesses are counted in Triton's interpreter")
ALLOWED = 1.10


def forward_and_backward(op: Any, call: dict[str, Any], wanted: tuple[str, ...]) -> list[Launch]:
    """The kernel launches of one call with gradients on the triton backend."""
    public = getattr(op, op.__name__.rsplit(".", 1)[-1])
    with count_accesses() as launches:
        contract.run_with_gradients(lambda **kw: public(**kw, backend="triton"), call, wanted)
    return launches


def assert_least(launches: list[Launch], least: dispatch.Cost, distinct: bool = False) -> None:
    """The launches together move `least.bytes_moved`, within 10 % (and not less: then the cost would be wrong)."""
    moved, names = sum(launch.moved_bytes(distinct) for launch in launches), [launch.kernel for launch in launches]
    assert least.bytes_moved * 0.999 <= moved <= ALLOWED * least.bytes_moved, f"{names} move {moved} bytes, {least.bytes_moved} are the least"


def test_the_counter_counts_active_lanes_and_distinct_addresses() -> None:
    call = {"w1w3": torch.randn(3, 2 * 5)}
    (launch,) = forward_and_backward(swiglu, call, ())
    assert (launch.kernel, launch.loaded_bytes(), launch.stored_bytes()) == ("swiglu_forward", 3 * 10 * 4, 3 * 5 * 4)
    repeated = Launch("twice", {4: launch.loads[4] * 2}, {})
    assert (repeated.loaded_bytes(), repeated.loaded_bytes(distinct=True)) == (240, 120)


def test_swiglu() -> None:
    call = swiglu.inputs("unit", torch.bfloat16)
    forward, backward = forward_and_backward(swiglu, call, ("w1w3",))
    assert (forward.kernel, backward.kernel) == ("swiglu_forward", "swiglu_backward")
    assert_least([forward], swiglu.cost(call))
    assert_least([backward], swiglu.cost(call, backward=True))


@pytest.mark.parametrize(("residual", "dropout"), [(True, 0.1), (True, 0.0), (False, 0.0)])
def test_add_rms_norm(residual: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from star_fast.ops.triton import add_rms_norm as kernels

    # As many rows a program as in training, where 16384 rows meet 2048 programs forward and 512 backward.
    monkeypatch.setattr(kernels, "ADD_RMS_NORM", kernels.ADD_RMS_NORM._replace(block=(8, 12, 3)))
    call = {**add_rms_norm.inputs("unit", torch.bfloat16), "dropout": dropout}
    call["residual"] = call["residual"] if residual else None
    forward, backward = forward_and_backward(add_rms_norm, call, ("x", "residual", "weight") if residual else ("x", "weight"))
    assert (forward.kernel, backward.kernel) == ("add_rms_norm_forward", "add_rms_norm_backward")
    assert_least([forward], add_rms_norm.cost(call))
    assert_least([backward], add_rms_norm.cost(call, backward=True))


def test_ema_update() -> None:
    call = ema_update.inputs("unit", torch.bfloat16)
    with count_accesses() as launches:
        ema_update.ema_update(**call, backend="triton")
    assert [launch.kernel for launch in launches] == ["ema_update_all"]
    assert_least(launches, ema_update.cost(call))
    assert ema_update.cost(call).bytes_moved == 14 * sum(t.numel() for t in call["teacher"])

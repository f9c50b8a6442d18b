"""Memory-bound kernels move no more than they must: bytes counted in the interpreter against each op's `cost`, within
10 %.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import triton

from star_fast.ops import dispatch
from star_fast.ops.rotary import random_table
from tests import contract
from tests.access_counting import Launch, count_accesses

# The package's own names are the functions; the modules hold `inputs` and `cost`.
add_rms_norm, decode_attention, ema_update, feature_distance = (
    import_module(f"star_fast.ops.{name}")
    for name in ("add_rms_norm", "decode_attention", "ema_update", "feature_distance")
)
linear_cross_entropy, masked_attention, slot_contrast, swiglu = (
    import_module(f"star_fast.ops.{name}")
    for name in ("linear_cross_entropy", "masked_attention", "slot_contrast", "swiglu")
)

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="accesses are counted in Triton's interpreter"
)
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
    assert least.bytes_moved * 0.999 <= moved <= ALLOWED * least.bytes_moved, (
        f"{names} move {moved} bytes, {least.bytes_moved} are the least"
    )


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
    monkeypatch.setattr(kernels, "ADD_RMS_NORM", kernels.ADD_RMS_NORM._replace(block=(8, 3, 1)))
    call = {**add_rms_norm.inputs("unit", torch.bfloat16), "dropout": dropout}
    call["x"], call["residual"] = call["x"][:24], call["residual"][:24] if residual else None
    forward, *backward = forward_and_backward(
        add_rms_norm, call, ("x", "residual", "weight") if residual else ("x", "weight")
    )
    assert [launch.kernel for launch in (forward, *backward)] == [
        "add_rms_norm_forward",
        "add_rms_norm_backward",
        "add_rms_norm_weight",
    ]
    assert_least([forward], add_rms_norm.cost(call))
    assert_least(backward, add_rms_norm.cost(call, backward=True))


def test_ema_update() -> None:
    call = ema_update.inputs("unit", torch.bfloat16)
    with count_accesses() as launches:
        ema_update.ema_update(**call, backend="triton")
    assert [launch.kernel for launch in launches] == ["ema_update_all"]
    assert_least(launches, ema_update.cost(call))
    assert ema_update.cost(call).bytes_moved == 14 * sum(t.numel() for t in call["teacher"])


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_decode_attention(cache_dtype: torch.dtype | None) -> None:
    call = decode_attention.inputs("unit", torch.bfloat16, cache_dtype=cache_dtype)
    with count_accesses() as launches:
        decode_attention.decode_attention(**call, backend="triton")
    assert [launch.kernel for launch in launches] == ["decode_attention_step"]
    rotary_rows = call["rotary"][0].numel() * 4  # one row, which every program reads: from DRAM once
    repeats = 2 * call["qkv"].shape[0] * call["qkv"].shape[2] - 1
    least = decode_attention.cost(call)
    assert_least(launches, dispatch.Cost(least.bytes_moved + repeats * rotary_rows, least.flops))
    assert_least(launches, least, distinct=True)


def test_feature_distance() -> None:
    call = feature_distance.inputs("unit", torch.bfloat16)
    with count_accesses() as launches, torch.no_grad():
        feature_distance.feature_distance(**call, backend="triton")
    rows = call["student"].shape[0]  # a float32 distance each, summed afterwards
    assert_least(launches, dispatch.Cost(feature_distance.cost(call).bytes_moved + 4 * rows, 0))
    forward, backward = forward_and_backward(feature_distance, call, ("student",))
    assert (forward.kernel, backward.kernel) == ("feature_distance_forward", "feature_distance_backward")
    least = feature_distance.cost(call).bytes_moved + feature_distance.cost(call, backward=True).bytes_moved
    assert_least([forward, backward], dispatch.Cost(least + 4 * rows, 0))


def test_linear_cross_entropy_reads_and_overwrites_each_logit_once() -> None:
    call = linear_cross_entropy.inputs("unit", torch.bfloat16)
    (rows, _), (vocab, _) = call["hidden"].shape, call["weight"].shape
    launches = forward_and_backward(linear_cross_entropy, call, ("hidden", "weight"))
    assert {launch.kernel for launch in launches} == {"cross_entropy_rows"}
    assert_least(launches, dispatch.Cost(rows * (2 * 2 * vocab + 8 + 4), 0))  # logits and gradient, target, loss
    (loss_alone,) = forward_and_backward(linear_cross_entropy, call, ())
    assert_least([loss_alone], dispatch.Cost(rows * (2 * vocab + 8 + 4), 0))


def test_slot_contrast_inputs() -> None:
    call = slot_contrast.inputs("unit", torch.bfloat16)
    forward, backward = forward_and_backward(slot_contrast, call, ("anchor",))
    assert (forward.kernel, backward.kernel) == ("slot_contrast_forward", "slot_contrast_backward")
    inputs_bytes = 2 * (call["anchor"].numel() + call["key"].numel()) + 8 * call["pairs"].numel()
    loaded = forward.loaded_bytes(distinct=True)
    assert inputs_bytes * 0.999 <= loaded <= ALLOWED * inputs_bytes, (
        f"{loaded} distinct bytes loaded, inputs have {inputs_bytes}"
    )


def test_masked_attention_factor(record_property: pytest.RecordProperty) -> None:
    """Not memory-bound at these shapes: keys are loaded again for every tile of queries, from the cache. The factor is
    reported and bounded.

    Forward and rotary pass over 7 tensors where 4 are the least: keys are turned in memory, and queries left turned for
    backward.
    """
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(1, 256, generator=generator) > 0.25
    keep[:, 0] = True
    call = {
        "qkv": torch.randn(1, 256, 3, 1, 64, generator=generator).bfloat16(),
        "keep": keep,
        "rotary": random_table(256, 64, generator),
    }
    with count_accesses() as launches:
        contract.run_with_gradients(
            lambda **kw: masked_attention.masked_attention_qkv(**kw, backend="triton"), call, ("qkv",)
        )
    forward, backward = launches[:2], launches[2:]  # the forward's first launch turns the keys
    assert [launch.kernel for launch in forward] == ["attention_prepare", "attention_forward"]
    for name, found, least in (
        ("forward", forward, masked_attention.cost(call)),
        ("backward", backward, masked_attention.cost(call, backward=True)),
    ):
        asked, distinct = (
            sum(launch.moved_bytes(once) for launch in found) / least.bytes_moved for once in (False, True)
        )
        print(
            f"masked_attention {name}: {asked:.2f} times the least bytes asked for, {distinct:.2f} times with "
            "each address once a launch"
        )
        record_property(f"masked_attention {name} bytes factor", round(asked, 3))
        assert asked <= {"forward": 2.6, "backward": 4.0}[name] and distinct <= {"forward": 1.9, "backward": 1.8}[name]

"""ops.all_slots_contrast against plain sums over pairs, images and slots in float64."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from star_fast.ops import dispatch
from tests import contract
from tests.ops.slots import PAIRS, call, unit

op = import_module("star_fast.ops.all_slots_contrast")


def plain_sums(
    anchor: Tensor, key: Tensor, pairs: Tensor, temperature: float, row_offset: int
) -> tuple[list[float], Tensor]:
    """Each pair's value, and the derivative of their sum by the anchors, by the formulas, with Python numbers."""
    z, k = ([[unit(vector) for vector in slot] for slot in x.tolist()] for x in (anchor, key))
    values, dz = [], torch.zeros(anchor.shape, dtype=torch.float64)
    for a, s in pairs.tolist():
        value = 0.0
        for b in range(anchor.shape[1]):
            own = row_offset + b
            candidates = [k[s][own]] + [slot[other] for slot in k for other in range(key.shape[1]) if other != own]
            logits = [
                math.fsum(x * y for x, y in zip(z[a][b], vector, strict=True)) / temperature for vector in candidates
            ]
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            value += math.log(math.fsum(weights)) + top - logits[0]
            for number, (vector, weight) in enumerate(zip(candidates, weights, strict=True)):
                share = (weight / math.fsum(weights) - (number == 0)) / temperature / anchor.shape[1]
                dz[a, b] += share * torch.tensor(vector, dtype=torch.float64)
        values.append(value / anchor.shape[1])
    z = torch.tensor(z, dtype=torch.float64)
    norm = anchor.double().norm(dim=-1, keepdim=True)
    projected = (dz - z * (z * dz).sum(-1, keepdim=True)) / norm
    return values, torch.where(norm < 1e-12, 0.0, projected)


@pytest.mark.parametrize(("rows", "keys", "row_offset"), [(5, 12, 4), (3, 3, 0), (1, 2, 1)])
def test_against_plain_sums(rows: int, keys: int, row_offset: int) -> None:
    exact = {key: contract.cast(value, torch.float64) for key, value in call(rows, keys, 6, row_offset).items()}
    if rows == 5:
        # An anchor, a negative of all, a positive of one and negative of others
        exact["anchor"][2, 1], exact["key"][0, 3], exact["key"][1, 5] = 0, 0, 0
        exact["anchor"][2, 2] *= 5e-13 / exact["anchor"][2, 2].norm()  # too short
    values, gradient = plain_sums(**exact)
    exact["anchor"].requires_grad_()
    out = op.all_slots_contrast(**exact, reduction="pair")
    torch.testing.assert_close(out.detach(), torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad(out.sum(), [exact["anchor"]])
    torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-14)
    assert not got[1].any() and (rows < 5 or not got[2, 1:3].any())
    mean = op.all_slots_contrast(**exact)
    assert mean.item() == pytest.approx(math.fsum(values) / 4, rel=1e-12)


def test_gradcheck_and_error_in_float32_and_bfloat16() -> None:
    contract.check_gradcheck(op, "reference", call(2, 3, 2, row_offset=1, reduction="pair"), ("anchor",))
    # bfloat16: of the rounded inputs, everything after them is float32
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        rounded = {key: contract.cast(value, dtype) for key, value in call(5, 12, 6, 4).items()}
        values, gradient = plain_sums(
            **{**rounded, "anchor": rounded["anchor"].double(), "key": rounded["key"].double()}
        )
        out, gradients = contract.run_with_gradients(
            op.all_slots_contrast, {**rounded, "reduction": "pair"}, ("anchor",)
        )
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), torch.tensor(values, dtype=torch.float64), rtol=bound, atol=bound)
        assert gradients["anchor"].dtype == dtype and gradients["anchor"].isfinite().all() and gradient.any()


def test_one_image_has_no_negatives_and_alike_ones_a_known_value() -> None:
    one = torch.randn(1, 1, 8)
    arguments = call(1, 1, 8, anchor=one.expand(3, 1, 8), key=torch.randn(2, 1, 8), reduction="pair")
    out, gradients = contract.run_with_gradients(op.all_slots_contrast, arguments, ("anchor",))
    assert not out.any() and not gradients["anchor"].any()
    out = op.all_slots_contrast(**call(4, 9, 8, anchor=one.expand(3, 4, 8), key=one.expand(2, 9, 8), reduction="pair"))
    # Two slots of eight other images
    torch.testing.assert_close(out, torch.full((4,), math.log(1 + 2 * 8)), rtol=1e-5, atol=0)


def test_small_losses_keep_their_digits() -> None:
    """Each anchor is its positive, the other images point elsewhere: exp(-gap) itself, of which log-sum-exp minus
    positive would leave nothing.
    """
    key = torch.eye(4)[None].expand(2, 4, 4)
    arguments = call(4, 4, 4, anchor=key[[0, 1, 1]], key=key, temperature=0.05)
    assert op.all_slots_contrast(**arguments).item() == pytest.approx(6 * math.exp(-20), rel=1e-4)


def test_keys_get_no_gradient_and_kernels_do_not_exist() -> None:
    arguments = call(2, 3, 4)
    leaves = [arguments[name].requires_grad_() for name in ("anchor", "key")]
    gradients = torch.autograd.grad(op.all_slots_contrast(**arguments), leaves, allow_unused=True)
    assert gradients[0].any() and gradients[1] is None
    with (
        dispatch.use_backend("triton"),
        pytest.raises(dispatch.BackendUnavailable, match="all_slots_contrast: no backend 'triton'; it has reference"),
    ):
        op.all_slots_contrast(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"row_offset": 2}, ValueError, "all_slots_contrast: row_offset"),
        ({"temperature": 0}, ValueError, "all_slots_contrast: temperature"),
        ({"pairs": PAIRS + 2}, ValueError, "all_slots_contrast: pairs"),
        ({"key": torch.zeros(2, 3, 5)}, ValueError, "all_slots_contrast: key"),
        ({"reduction": "sum"}, ValueError, "all_slots_contrast: reduction"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        op.all_slots_contrast(**{**call(2, 3, 4), **change})

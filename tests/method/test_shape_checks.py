"""Whoever calls a function of the method or an op with wrong shapes is told so in the name of that very function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from star_fast import ops
from star_fast.config import MethodConfig, ModelConfig
from star_fast.method import Features, Projector, Student, Teacher, masking, objective
from star_fast.method.shape_checks import check_shapes
from star_fast.model.transformer import Transformer

F = torch.float32
N, T, D, V = 4, 6, 8, 11
METHOD = MethodConfig(contrast_positions=2, projector_width=16)
NO_CONTRAST = MethodConfig(contrast_weight=0.0)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


CALLS: list[tuple[str, Callable[[], object], str]] = [
    (
        "autoregressive_loss",
        lambda: objective.autoregressive_loss(r(N, D), r(V, D), ints(N, T)),
        r"hidden must be \(B\*M, T, D\)",
    ),
    (
        "autoregressive_loss",
        lambda: objective.autoregressive_loss(r(N, T, D), r(V, D + 1), ints(N, T)),
        r"weight must be .* with D = 8.*got shape \(11, 9\)",
    ),
    (
        "autoregressive_loss",
        lambda: objective.autoregressive_loss(r(N, T, D), r(V, D), ints(N, T - 1)),
        r"targets must be \(B\*M, T\) with B\*M = 4, T = 6",
    ),
    (
        "autoregressive_loss",
        lambda: objective.autoregressive_loss(r(N, T, D), r(V, D), ints(N, T).int()),
        "targets must be int64, got torch.int32",
    ),
    (
        "autoregressive_loss",
        lambda: objective.autoregressive_loss(r(N, T, D), r(V, D).double(), ints(N, T)),
        "weight must be torch.float32 like hidden",
    ),
    (
        "masked_feature_loss",
        lambda: objective.masked_feature_loss(r(N, T, D), r(N, T + 1, D)),
        r"teacher_last must be .* got shape \(4, 7, 8\)",
    ),
    (
        "masked_feature_loss",
        lambda: objective.masked_feature_loss(r(N, T, D), r(N, T, D), ints(N - 1, 2)),
        r"hidden must be \(4, n\).*got shape \(3, 2\)",
    ),
    (
        "masked_feature_loss",
        lambda: objective.masked_feature_loss(r(N, T, D), None),
        "teacher_last must be a tensor .*, got NoneType",
    ),
    ("hidden_positions", lambda: objective.hidden_positions(ints(N, T), 1), "keep must be bool, got torch.int64"),
    (
        "hidden_positions",
        lambda: objective.hidden_positions(torch.ones(N, T, dtype=torch.bool), T + 1),
        r"count must be in 1 \.\.\. 6",
    ),
    (
        "gather_slots",
        lambda: objective.gather_slots(r(N, T, D), ints(2), 3),
        "must hold 3 views of each image.*got 4 sequences",
    ),
    ("gather_slots", lambda: objective.gather_slots(r(N, T, D), r(2), 2), "positions must be int64"),
    ("slots_first", lambda: objective.slots_first(r(N, T, D)), r"features_BMKD must be \(B, M, K, D\)"),
    (
        "contrastive_losses",
        lambda: objective.contrastive_losses(r(4, 3), r(4, 3, D), 2, 0.2),
        r"anchor must be \(S, B, D\)",
    ),
    (
        "contrastive_losses",
        lambda: objective.contrastive_losses(r(4, 3, D), r(6, 3, D), 2, 0.2),
        r"key must be \(S, B_all, D\) with S = 4, D = 8",
    ),
    (
        "contrastive_losses",
        lambda: objective.contrastive_losses(r(4, 3, D), r(4, 3, D), 3, 0.2),
        "a multiple of views = 3, got 4",
    ),
    (
        "contrastive_losses",
        lambda: objective.contrastive_losses(r(4, 3, D), r(4, 3, D), 2, -1.0),
        "temperature must be finite and > 0",
    ),
    (
        "contrastive_losses",
        lambda: objective.contrastive_losses(r(4, 3, D), r(4, 3, D), 2, 0.2, 1),
        "row_offset must be in 0",
    ),
    (
        "contrastive_losses",
        lambda: objective.contrastive_losses(r(2, 3, D), r(2, 3, D), 2, 0.2),
        "step needs two positions a view or more, got 1",
    ),
    (
        "contrastive_losses",
        lambda: objective.contrastive_losses(r(2, 3, D), r(2, 3, D), 1, 0.2),
        "view needs two views or more, got 1",
    ),
    (
        "contrastive_losses",
        lambda: objective.contrastive_losses(r(4, 3, D), r(4, 3, D), 2, 0.2, step=False, view=False),
        "got neither",
    ),
    (
        "contrastive_losses",
        lambda: objective.contrastive_losses(r(4, 3, D), r(4, 3, D), 2, 0.2, negatives="some"),
        "negatives must be 'slot' or 'all_slots'",
    ),
    (
        "contrastive_losses",
        lambda: objective.contrastive_losses(
            r(4, 3, D), r(4, 3, D), 2, 0.2, pairs=objective.pair_table(2, 2, view=False)
        ),
        "pairs must be pair_table's 8 rows",
    ),
    (
        "objective",
        lambda: objective.objective(r(N, T, D), r(V, D), ints(N, T), r(N, T, D), None, None, None, NO_CONTRAST),
        "teacher_last must be given where",
    ),
    (
        "objective",
        lambda: objective.objective(r(N, T, D), r(V, D), ints(N, T), r(N, T, D), None, r(N, T, D), None, METHOD),
        "anchor and key must be given",
    ),
    (
        "objective",
        lambda: objective.objective(r(N, T, D), r(V, D), ints(N), r(N, T, D), None, None, None, METHOD),
        r"targets must be \(B\*M, T\)",
    ),
    (
        "epoch_order",
        lambda: masking.epoch_order(0, 0, [1, 2]),
        r"images must be an array \(B,\) of whole numbers, got list",
    ),
    (
        "choose_views",
        lambda: masking.choose_views(0, 0, np.zeros((2, 2), dtype=np.int64), 1, 2),
        r"images must be .* got int64 of shape \(2, 2\)",
    ),
    (
        "key_mask",
        lambda: masking.key_mask(0, 0, np.zeros(2), 2, T, 0.25),
        r"images must be .* got float64 of shape \(2,\)",
    ),
    (
        "key_mask",
        lambda: masking.key_mask(0, 0, np.arange(2), 2, T, 1.0),
        r"ratio must be a share in \[0, 1\), got 1.0",
    ),
    ("label_drop", lambda: masking.label_drop(0, 0, ints(2), 2, 0.1), "images must be .* got Tensor"),
    (
        "position_set",
        lambda: masking.position_set(0, 0, T, T + 1),
        r"count must be in 1 \.\.\. 6, the positions there are, got 7",
    ),
    (
        "masked_attention",
        lambda: ops.masked_attention(r(2, 5, 2, 4), r(2, 5, 2, 4), r(2, 5, 2, 4), torch.ones(2, 4, dtype=torch.bool)),
        "keep must be",
    ),
    ("masked_attention_qkv", lambda: ops.masked_attention_qkv(r(2, 5, 2, 2, 4)), r"qkv must be \(B, T, 3, H, E\)"),
    (
        "masked_attention_qkv",
        lambda: ops.masked_attention_qkv(r(2, 5, 3, 2, 4), torch.ones(2, 4, dtype=torch.bool)),
        "keep must be",
    ),
    ("masked_attention_qkv", lambda: ops.masked_attention_qkv(r(2, 5, 3, 2, 4), rotary=r(4, 2, 2)), "rotary must be"),
    ("slot_contrast", lambda: ops.slot_contrast(r(4, 3), r(4, 3, D), ints(1, 2), 0.2), "anchor must be"),
    ("all_slots_contrast", lambda: ops.all_slots_contrast(r(4, 3), r(4, 3, D), ints(1, 2), 0.2), "anchor must be"),
    ("feature_distance", lambda: ops.feature_distance(r(4, 3), r(4, 2)), "teacher must be"),
    ("linear_cross_entropy", lambda: ops.linear_cross_entropy(r(4, 3), r(5, 2), ints(4)), "weight must be"),
    ("swiglu", lambda: ops.swiglu(r(4, 3)), "w1w3 must be"),
    ("add_rms_norm", lambda: ops.add_rms_norm(r(4, 3), r(4, 2), r(3), 1e-5), "residual must be|residual"),
    ("ema_update", lambda: ops.ema_update([r(3)], [r(4)], 0.9), "student"),
    (
        "decode_attention",
        lambda: ops.decode_attention(r(2, 2, 4), ops.KVCache(r(2, 2, 5, 4), r(2, 2, 5, 4)), 0, rotary=r(5, 2, 2)),
        "qkv must be",
    ),
    ("group_norm_silu", lambda: ops.group_norm_silu(r(4, 3), r(3), r(3), 1), r"x must be \(B, C, H, W\)"),
    ("int8_linear", lambda: ops.int8_linear(r(4, 3), ops.Int8Weight(r(5, 2))), r"x must be \(R, 2\)"),
    ("Int8Weight", lambda: ops.Int8Weight(r(4)), r"expected \(N, K\)"),
    ("sample_tokens", lambda: ops.sample_tokens(r(4), seed=0, image_index=ints(4), position=0), "logits must be"),
]


@pytest.mark.parametrize(
    ("function", "call", "message"), CALLS, ids=[f"{number}-{call[0]}" for number, call in enumerate(CALLS)]
)
def test_the_function_that_was_called_is_named(function: str, call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert str(error.value).startswith(f"{function}: ") and "\n" not in str(error.value)


def test_every_op_is_among_them() -> None:
    public = {name for name in ops.__all__ if name not in ("KVCache", "use_backend")}
    assert public <= {function for function, *_ in CALLS}


def test_letters_are_bound_once_and_returned() -> None:
    assert check_shapes("f", a=(r(2, 3), "A B"), b=(ints(3), "B", torch.int64), c=(r(2, 5), "2 C")) == {
        "A": 2,
        "B": 3,
        "C": 5,
    }
    with pytest.raises(ValueError, match=r"^f: a must be \(A,\), every size at least 1, got shape \(0,\)$"):
        check_shapes("f", a=(r(0), "A"))
    with pytest.raises(ValueError, match=r"^f: b must be on cpu like a, got meta$"):
        check_shapes("f", a=(r(2), "A"), b=(r(2).to("meta"), "A"))


def small_student(model: torch.nn.Module | None = None, method: MethodConfig = METHOD) -> Student:
    config = ModelConfig(blocks=2, heads=2, width=D, vocab=V, positions=T, num_classes=3, dropout=0.0)
    return Student(model or Transformer(config), Projector.of_method(D, method), method, 1)


def test_student_and_teacher_name_what_is_missing() -> None:
    student, data = small_student(), (ints(N, T - 1), ints(N), ints(N, T))
    teacher_last, keys = r(N, T, D), r(4, 2, D)
    with pytest.raises(ValueError, match=r"^Student: positions and keys must be given"):
        student(*data, teacher_last=teacher_last, keys=keys)
    with pytest.raises(
        ValueError, match=r"^Student: tokens must be \(4, 5\), every size at least 1, got shape \(4, 6\)"
    ):
        student(ints(N, T), *data[1:])
    with pytest.raises(ValueError, match=r"^Student: label must be \(B\*M,\) with B\*M = 4"):
        student(data[0], ints(3), data[2])
    with pytest.raises(
        ValueError, match=r"^Student: targets must hold 2 views of each image \(method\.views\), got 3 sequences"
    ):
        student(ints(3, T - 1), ints(3), ints(3, T))
    with pytest.raises(TypeError, match=r"^Student: keep must be bool"):
        student(*data, keep=ints(N, T))
    teacher = Teacher(student.transformer, METHOD, 1)
    with pytest.raises(ValueError, match=r"^Teacher\.features: positions must be given"):
        teacher.features(*data[:2], None)
    with pytest.raises(ValueError, match=r"^Teacher\.update: expected attach or attach_whole"):
        teacher.update(list(student.transformer.parameters()), 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": r(N, T - 1, D)}, r"hidden must be \(4, 6, D\)"),
        ({"last": r(N, T, D + 1)}, "last must be"),
        ({"middle": None}, "middle must be a tensor .*, got NoneType"),
    ],
)
def test_a_strange_model_is_told_what_its_features_lack(wrong: dict[str, torch.Tensor | None], message: str) -> None:
    class Strange(torch.nn.Module):
        output = torch.nn.Linear(D, V, bias=False)

        def features(
            self,
            tokens: torch.Tensor,
            label: torch.Tensor,
            keep: torch.Tensor | None = None,
            *,
            block: int = 0,
            last: bool = True,
        ) -> Features:
            return Features(**({"hidden": r(N, T, D), "last": r(N, T, D), "middle": r(N, T, D)} | wrong))

    with pytest.raises((ValueError, TypeError), match=rf"^Strange\.features: {message}"):
        small_student(Strange())(
            ints(N, T - 1),
            ints(N),
            ints(N, T),
            teacher_last=r(N, T, D),
            keys=r(4, 2, D),
            positions=torch.tensor([0, 3]),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_teacher_is_the_running_mean(dtype: torch.dtype) -> None:
    """attach_whole, then three updates: the closed form in float64, rounded once to the model's dtype."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).to(dtype)
    teacher = Teacher(model, MethodConfig(ema_decay=0.9, ema_warmup=False), 1)
    teacher.attach_whole()
    expected = model.weight.detach().double()
    for step in range(3):
        masters = [parameter.detach().float() + torch.randn(parameter.shape) for parameter in model.parameters()]
        teacher.update(masters, step)
        expected = expected + (1 - 0.9) * (masters[0].double() - expected)
    got = teacher.model.weight
    assert got.dtype == dtype and not torch.equal(got, model.weight)
    torch.testing.assert_close(
        got.double(), expected.to(dtype).double(), rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-7
    )
    assert (teacher.masters[0] is got) == (dtype == torch.float32)

"""What the paper leaves open and config.py can choose otherwise, against plain loops over b, m, i, j in float64: values
and gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from star_fast.config import ConfigError, MethodConfig, ModelConfig, RunConfig
from star_fast.method import masking, objective
from star_fast.method.batch_norm import BatchNorm
from star_fast.method.student import Projector, Student
from star_fast.model.transformer import Transformer
from star_fast.presets import plain
from star_fast.records import from_dict

B, M, K, T, D, V = 3, 2, 3, 9, 8, 11
TAU, RATIO = 0.2, 0.4  # three of eight positions hidden


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def nce(z: Tensor, k: Tensor, m: int, i: int, n: int, j: int, negatives: str) -> Tensor:
    """NCE(m,i -> n,j); z, k are (B, M, K, D). The denominator is the positive and, of every other image, its key at (n,
    j) or all of its keys.
    """
    terms = []
    for b in range(B):
        positive = torch.exp(cosine(z[b, m, i], k[b, n, j]) / TAU)
        slots = [(n, j)] if negatives == "slot" else [(x, y) for x in range(M) for y in range(K)]
        others = [
            torch.exp(cosine(z[b, m, i], k[other, x, y]) / TAU) for other in range(B) if other != b for x, y in slots
        ]
        terms.append(-torch.log(positive / (positive + sum(others))))
    return sum(terms) / B


def naive_contrast(z: Tensor, k: Tensor, negatives: str) -> tuple[Tensor, Tensor]:
    step = [nce(z, k, m, i, m, j, negatives) for m in range(M) for i in range(K) for j in range(K) if i != j]
    view = [nce(z, k, m, i, n, i, negatives) for i in range(K) for m in range(M) for n in range(M) if m != n]
    return sum(step) / len(step), sum(view) / len(view)


def naive_mim(last: Tensor, teacher_last: Tensor, keep: Tensor, positions: str) -> Tensor:
    terms = [
        1 - cosine(last[s, t], teacher_last[s, t])
        for s in range(B * M)
        for t in range(T)
        if positions == "all" or not keep[s, t]
    ]
    return sum(terms) / len(terms)


def naive_projection(projector: Projector, x_BMKD: Tensor, norm: str) -> Tensor:
    """By the weights alone: linear, (feature minus its mean over all rows, by its deviation, scaled and shifted,) SiLU;
    the last layer linear alone.
    """
    weights = {name.split(".")[0]: {} for name, _ in projector.named_parameters()}
    for name, value in projector.named_parameters():
        number, kind = name.split(".")
        weights[number][kind] = value
    layers, norms = ([part for part in weights.values() if part["weight"].ndim == rank] for rank in (2, 1))
    assert len(layers) == 3 and len(norms) == (2 if norm == "batch" else 0)
    rows = [x_BMKD[b, m, i] for b in range(B) for m in range(M) for i in range(K)]
    for number, layer in enumerate(layers):
        rows = [layer["weight"] @ row + layer.get("bias", 0) for row in rows]
        if number == 2:
            break
        if norm == "batch":
            assert "bias" not in layer
            mean = sum(rows) / len(rows)
            deviation = (sum((row - mean) ** 2 for row in rows) / len(rows) + 1e-5).sqrt()
            rows = [(row - mean) / deviation * norms[number]["weight"] + norms[number]["bias"] for row in rows]
        rows = [row / (1 + torch.exp(-row)) for row in rows]
    return torch.stack(rows).view(B, M, K, D)


def small_student(method: MethodConfig) -> Student:
    torch.manual_seed(1)
    transformer = Transformer(
        ModelConfig(blocks=2, heads=2, width=D, vocab=V, positions=T, num_classes=3, dropout=0.0)
    ).double()
    projector = Projector(D, 6, method.projector_layers, method.projector_norm).double()
    # Init leaves the output matrix zero: move everything
    for parameter in (*transformer.parameters(), *projector.parameters()):
        torch.nn.init.normal_(parameter, std=0.4)
    return Student(transformer, projector, method, contrast_depth=1)


CHOICES = {"mim_positions": "hidden", "negatives": "all_slots", "projector_norm": "batch"}


@pytest.mark.parametrize(
    "choice",
    [{}, *({name: value} for name, value in CHOICES.items()), CHOICES],
    ids=lambda choice: "+".join(choice) or "default",
)
def test_student_forward_is_the_sum_of_naive_terms(choice: dict[str, str]) -> None:
    method = MethodConfig(
        mim_weight=0.7, contrast_weight=0.4, contrast_positions=K, temperature=TAU, mask_ratio=RATIO, **choice
    )
    student, generator = small_student(method), torch.Generator().manual_seed(3)
    targets = torch.randint(0, V, (B * M, T), generator=generator)
    keep = torch.from_numpy(masking.key_mask(0, 0, torch.arange(B).numpy(), M, T, RATIO)).flatten(0, 1)
    data = {
        "tokens": targets[:, :-1],
        "label": torch.randint(0, 4, (B * M,), generator=generator),
        "targets": targets,
        "keep": keep,
    }
    teacher_last = torch.randn(B * M, T, D, dtype=torch.float64, generator=generator)
    keys = torch.randn(B, M, K, D, dtype=torch.float64, generator=generator)
    positions = torch.tensor([0, 4, 7])
    losses = student(**data, teacher_last=teacher_last, keys=objective.slots_first(keys), positions=positions)
    losses.total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}

    student.zero_grad()
    out = student.transformer(data["tokens"], data["label"], keep, blocks=(1,), logits=False)
    ar = F.cross_entropy((out.hidden @ student.transformer.output.weight.T).flatten(0, 1), targets.flatten())
    mim = naive_mim(out.last, teacher_last, keep, method.mim_positions)
    slots = torch.stack(
        [
            torch.stack([torch.stack([out.features[1][b * M + m, i] for i in positions]) for m in range(M)])
            for b in range(B)
        ]
    )
    step, view = naive_contrast(
        naive_projection(student.projector, slots, method.projector_norm), keys, method.negatives
    )
    for ours, naive in ((losses.ar, ar), (losses.mim, mim), (losses.step, step), (losses.view, view)):
        torch.testing.assert_close(ours.double(), naive, rtol=1e-9, atol=0)
    (ar + 0.7 * mim + 0.4 * (step + view) / 2).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-8, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )
    # A choice that changed nothing would be proved by nothing.
    assert (abs(naive_mim(out.last, teacher_last, keep, "all") - mim) > 1e-3) == (method.mim_positions == "hidden")
    usual = naive_contrast(naive_projection(student.projector, slots, method.projector_norm), keys, "slot")
    assert all(abs(a - b) > 1e-3 for a, b in zip(usual, (step, view), strict=True)) == (method.negatives == "all_slots")


def test_hidden_positions_are_those_that_the_mask_hides() -> None:
    keep = torch.from_numpy(masking.key_mask(1, 2, torch.arange(5).numpy(), M, 17, 0.3)).flatten(0, 1)
    found = objective.hidden_positions(keep, masking.hidden_count(17, 0.3))
    assert found.shape == (10, 4)
    assert found.tolist() == [[t for t in range(17) if not row[t]] for row in keep]
    with pytest.raises(ValueError, match="mim_positions 'hidden' needs the key mask, got none"):
        objective.objective(
            torch.zeros(2, 3, 4),
            torch.zeros(5, 4),
            torch.zeros(2, 3, dtype=torch.int64),
            torch.ones(2, 3, 4),
            None,
            torch.ones(2, 3, 4),
            None,
            MethodConfig(mim_positions="hidden", contrast_weight=0.0),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batch_norm_on_one_rank_is_torchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = BatchNorm(5).to(dtype)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = (3 + torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    weights = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    out = norm(x)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    got = torch.autograd.grad((out * weights).sum(), [x, norm.weight, norm.bias])
    exact = [value.detach().double().requires_grad_() for value in (x, norm.weight, norm.bias)]
    expected = F.batch_norm(exact[0].view(-1, 5), None, None, exact[1], exact[2], training=True).view_as(x)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)
    for ours, plain_gradient in zip(got, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        torch.testing.assert_close(ours.double(), plain_gradient, rtol=bound, atol=3 * bound)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(norm, (x,))


def test_batch_norm_of_a_single_feature_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"method\.projector_norm: expected 'none' for a micro-batch of a single projected feature"
    ):
        BatchNorm(5)(torch.zeros(1, 1, 1, 5))


def test_projector_norm_adds_modules_and_takes_the_biases_it_would_cancel() -> None:
    def shapes(norm: str) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, tuple(value.shape)) for name, value in Projector(8, 6, 3, norm).named_parameters()]

    assert shapes("none") == [
        ("0.weight", (6, 8)),
        ("0.bias", (6,)),
        ("2.weight", (6, 6)),
        ("2.bias", (6,)),
        ("4.weight", (8, 6)),
        ("4.bias", (8,)),
    ]
    assert [kind.__name__ for kind in map(type, Projector(8, 6, 3, "batch"))] == [
        "Linear",
        "BatchNorm",
        "SiLU",
        "Linear",
        "BatchNorm",
        "SiLU",
        "Linear",
    ]
    assert shapes("batch")[:3] == [("0.weight", (6, 8)), ("1.weight", (6,)), ("1.bias", (6,))] and shapes("batch")[
        -1
    ] == ("6.bias", (8,))
    # An output layer alone
    assert [name for name, _ in Projector(8, 6, 1, "batch").named_parameters()] == ["0.weight", "0.bias"]
    torch.manual_seed(0)
    projector = Projector(8, 6, 3, "batch")
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter)
    projector.init_weights(torch.Generator().manual_seed(0))
    assert (projector[1].weight == 1).all() and not projector[1].bias.any() and not projector[6].bias.any()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"mim_positions": "hidden", "mask_ratio": 0.0},
            r"method\.mim_positions: expected 'all', since method\.mask_ratio 0 hides nothing, got 'hidden'",
        ),
        ({"mim_positions": "some"}, r"method\.mim_positions: expected 'all' or 'hidden', got 'some'"),
        ({"negatives": "none"}, r"method\.negatives: expected 'slot' or 'all_slots'"),
        ({"projector_norm": "layer"}, r"method\.projector_norm: expected"),
        ({"teacher_label": "true"}, r"method\.teacher_label: expected 'same' or 'kept'"),
    ],
)
def test_choices_that_do_not_exist_or_contradict(method: dict[str, Any], message: str) -> None:
    for make in (lambda: MethodConfig(**method), lambda: from_dict(MethodConfig, method, "method.")):
        with pytest.raises(ConfigError, match=message):
            make()


def test_a_mask_too_small_to_hide_anything_is_told_once_the_positions_are_known() -> None:
    method = MethodConfig(mim_positions="hidden", mask_ratio=0.1)
    with pytest.raises(
        ConfigError,
        match=r"method\.mim_positions: expected 'all', since method\.mask_ratio 0\.1 hides none of "
        r"model\.positions = 9",
    ):
        RunConfig(ModelConfig(positions=9), method)
    assert RunConfig(ModelConfig(positions=11), method)
    assert plain(RunConfig(ModelConfig(positions=11), method)).method.mim_weight == 0

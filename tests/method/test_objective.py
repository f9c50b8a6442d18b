"""method.objective and method.student against plain loops over b, m, i, j in float64: values and gradients."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from star_fast.config import MethodConfig, ModelConfig
from star_fast.method import objective
from star_fast.method.student import Projector, Student
from star_fast.model.transformer import Transformer

B, M, K, T, D, V = 3, 2, 3, 9, 8, 11
TAU = 0.2


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def nce(z: Tensor, k: Tensor, m: int, i: int, n: int, j: int) -> Tensor:
    """NCE(m,i -> n,j) as method.md writes it; z, k are (B, M, K, D)."""
    terms = []
    for b in range(B):
        scores = [torch.exp(cosine(z[b, m, i], k[other, n, j]) / TAU) for other in range(B)]
        terms.append(-torch.log(scores[b] / sum(scores)))
    return sum(terms) / B


def naive_contrast(z: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    step = [nce(z, k, m, i, m, j) for m in range(M) for i in range(K) for j in range(K) if i != j]
    view = [nce(z, k, m, i, n, i) for i in range(K) for m in range(M) for n in range(M) if m != n]
    return sum(step) / len(step), sum(view) / len(view)


def test_contrastive_losses_and_their_gradient() -> None:
    torch.manual_seed(0)
    z = torch.randn(B, M, K, D, dtype=torch.float64, requires_grad=True)
    k = torch.randn(B, M, K, D, dtype=torch.float64)
    expected = naive_contrast(z, k)
    got = objective.contrastive_losses(objective.slots_first(z), objective.slots_first(k), M, TAU)
    for ours, naive in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            torch.autograd.grad(ours, z, retain_graph=True)[0], torch.autograd.grad(naive, z)[0], rtol=1e-10, atol=1e-13
        )


def test_numbers_of_pairs() -> None:
    assert len(objective.step_pairs(2, 4)) == 2 * 4 * 3
    assert len(objective.view_pairs(2, 4)) == 4 * 2
    assert set(objective.view_pairs(2, 2)) == {(0, 2), (2, 0), (1, 3), (3, 1)}


def test_each_contrast_can_be_off_alone() -> None:
    torch.manual_seed(0)
    z, k = torch.randn(M * K, B, D, dtype=torch.float64), torch.randn(M * K, B, D, dtype=torch.float64)
    both = objective.contrastive_losses(z, k, M, TAU)
    only_step = objective.contrastive_losses(z, k, M, TAU, view=False)
    only_view = objective.contrastive_losses(z, k, M, TAU, step=False)
    torch.testing.assert_close(only_step[0], both[0])
    torch.testing.assert_close(only_view[1], both[1])
    assert only_step[1] == 0
    assert only_view[0] == 0


def small_student(method: MethodConfig, blocks: int = 2) -> Student:
    torch.manual_seed(1)
    transformer = Transformer(
        ModelConfig(blocks=blocks, heads=2, width=D, vocab=V, positions=T, num_classes=3, dropout=0.0)
    ).double()
    for parameter in transformer.parameters():  # init leaves the output matrix zero: move everything
        torch.nn.init.normal_(parameter, std=0.3)
    projector = None
    if method.contrasts:
        projector = Projector(D, 6, method.projector_layers).double()
        for parameter in projector.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return Student(transformer, projector, method, contrast_depth=1)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, V, (B * M, T), generator=generator)
    keep = torch.rand(B * M, T, generator=generator) > 0.3
    keep[:, 0] = True
    return {
        "tokens": targets[:, :-1],
        "label": torch.randint(0, 4, (B * M,), generator=generator),
        "targets": targets,
        "keep": keep,
    }


@pytest.mark.parametrize("off", ["nothing", "mim", "step", "view", "contrast"])
def test_student_forward_is_the_weighted_sum_of_naive_terms(off: str) -> None:
    method = MethodConfig(
        mim_weight=0.0 if off == "mim" else 0.7,
        contrast_weight=0.0 if off == "contrast" else 0.4,
        step_contrast=off != "step",
        view_contrast=off != "view",
        contrast_positions=K,
        temperature=TAU,
    )
    student, data = small_student(method), batch()
    generator = torch.Generator().manual_seed(3)
    teacher_last = torch.randn(B * M, T, D, dtype=torch.float64, generator=generator)
    keys = torch.randn(B, M, K, D, dtype=torch.float64, generator=generator)
    positions = torch.tensor([0, 4, 7])
    losses = student(**data, teacher_last=teacher_last, keys=objective.slots_first(keys), positions=positions)

    out = student.transformer(data["tokens"], data["label"], data["keep"], blocks=(1,))
    ar = sum(
        -math.log(
            math.exp(out.logits[s, t, data["targets"][s, t]].item())
            / sum(math.exp(x) for x in out.logits[s, t].tolist())
        )
        for s in range(B * M)
        for t in range(T)
    ) / (B * M * T)
    mim = sum(1 - cosine(out.last[s, t], teacher_last[s, t]) for s in range(B * M) for t in range(T)) / (B * M * T)
    step = view = torch.zeros(())
    if method.contrasts:
        z = torch.stack(
            [
                torch.stack(
                    [
                        torch.stack([student.projector(out.features[1][b * M + m, i]) for i in positions])
                        for m in range(M)
                    ]
                )
                for b in range(B)
            ]
        )
        step, view = naive_contrast(z, keys)
        step, view = (step if method.step_contrast else 0 * step), (view if method.view_contrast else 0 * view)
    torch.testing.assert_close(losses.ar.item(), ar, rtol=1e-6, atol=0)  # logits are float32 by contract
    if off != "mim":
        torch.testing.assert_close(losses.mim, mim, rtol=1e-10, atol=0)
    torch.testing.assert_close(losses.step.double(), step.double(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses.view.double(), view.double(), rtol=1e-10, atol=1e-12)
    total = losses.ar + method.mim_weight * mim + method.contrast_weight * (step + view) / 2
    torch.testing.assert_close(losses.total.double(), total.double(), rtol=1e-10, atol=0)
    losses.total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    out = student.transformer(data["tokens"], data["label"], data["keep"], blocks=(1,), logits=False)
    naive = torch.nn.functional.cross_entropy(
        (out.hidden @ student.transformer.output.weight.T).flatten(0, 1), data["targets"].flatten()
    )
    if method.mim_weight:
        naive = naive + method.mim_weight * sum(
            1 - cosine(out.last[s, t], teacher_last[s, t]) for s in range(B * M) for t in range(T)
        ) / (B * M * T)
    if method.contrasts:
        slots = objective.gather_slots(out.features[1], positions, M)
        step, view = naive_contrast(student.projector(slots), keys)
        naive = naive + method.contrast_weight * (step * method.step_contrast + view * method.view_contrast) / 2
    naive.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-8, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_without_the_method_nothing_of_it_exists() -> None:
    """M = 1, r = 0, weights 0: the loss and all gradients are bit-equal to the transformer's alone."""
    method = MethodConfig(views=1, mask_ratio=0.0, mim_weight=0.0, contrast_weight=0.0)
    assert not method.has_teacher
    student, data = small_student(method), batch()
    assert student.projector is None
    losses = student(data["tokens"], data["label"], data["targets"])
    losses.total.backward()
    transformer = small_student(method).transformer
    out = transformer(data["tokens"], data["label"], logits=False)
    plain = objective.autoregressive_loss(out.hidden, transformer.output.weight, data["targets"])
    plain.backward()
    assert torch.equal(losses.total, plain)
    for name, parameter in transformer.named_parameters():
        assert torch.equal(parameter.grad, student.transformer.get_parameter(name).grad), name


def test_projector_must_fit_the_method() -> None:
    student = small_student(MethodConfig())
    with pytest.raises(ValueError, match="projector exists exactly where"):
        Student(student.transformer, None, dataclasses.replace(student.method), 1)

"""With the method switched off, training is LlamaGen's: equal to a loop written by hand, in float64."""

from __future__ import annotations

import torch
from torch.nn.utils import clip_grad_norm_

from star_fast.config import MethodConfig, ModelConfig, OptimConfig, RunConfig
from star_fast.method.student import Student
from star_fast.model.transformer import Transformer
from star_fast.training.engine import build_optimizer, parameter_groups
from tests.method import plain_llamagen


def test_plain_training_is_llamagens_to_1e_10() -> None:
    method = MethodConfig(views=1, mask_ratio=0.0, mim_weight=0.0, contrast_weight=0.0)
    config = RunConfig(
        ModelConfig(2, 2, 16, vocab=7, positions=9, num_classes=3, dropout=0.0),
        method,
        OptimConfig(lr_per_256_images=0.01),
    )
    transformer = Transformer(config.model).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    student = Student(transformer, None, method, 1).train()
    weights = {name: value.clone().requires_grad_() for name, value in transformer.state_dict().items()}
    ours = build_optimizer(parameter_groups(student, config.optim.weight_decay), config, torch.device("cpu"))
    theirs = plain_llamagen.AdamW(weights, config.lr, 0.9, 0.95, 1e-8, 0.05)
    for _ in range(4):
        tokens = torch.randint(0, 7, (3, 9), generator=generator)
        label = torch.randint(0, 4, (3,), generator=generator)
        losses = student(tokens[:, :-1], label, tokens)
        losses.total.backward()
        clip_grad_norm_(student.parameters(), config.optim.clip_norm)
        ours.step()
        ours.zero_grad()
        plain = plain_llamagen.loss(weights, tokens, label, 2, 2, 3)
        theirs.step(dict(zip(weights, torch.autograd.grad(plain, list(weights.values())), strict=True)), 1.0)
        assert abs(losses.total.item() - plain.item()) <= 1e-10
    for name, value in transformer.state_dict().items():
        assert (value - weights[name]).abs().max().item() <= 1e-10, name

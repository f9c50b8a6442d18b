"""A DeepSpeed engine behind four calls: step, evaluate, masters, and the state that checkpoint.py saves.

The ZeRO settings are derived from the run's config; nothing else in the project knows DeepSpeed's JSON.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from star_fast.config import RunConfig
from star_fast.method import objective
from star_fast.method.masking import dropout_seed
from star_fast.method.objective import Losses
from star_fast.method.student import Projector, Student
from star_fast.method.teacher import Teacher
from star_fast.model.transformer import Transformer
from star_fast.training import deepspeed_files, zero1
from star_fast.training.batches import MicroBatch
from star_fast.training.host_memory import keep_freed_memory
from star_fast.training.masters import Masters
from star_fast.training.ranks import import_deepspeed
from star_fast.training.ranks import start_ranks as start_ranks  # beside the engine that needs it
from star_fast.training.watch import Diverged


def build_student(config: RunConfig) -> Student:
    """A freshly initialised student, the same on every rank."""
    generator = torch.Generator().manual_seed(config.train.seed)
    transformer = Transformer(config.model)
    transformer.init_weights(generator)
    transformer.block_checkpointing = config.train.block_checkpointing
    projector = None
    if config.method.contrasts:
        projector = Projector(config.model.width, config.method.projector_width, config.method.projector_layers, config.method.projector_norm)
        projector.init_weights(generator)
    return Student(transformer, projector, config.method, config.contrast_depth)


def clips_outside(config: RunConfig) -> bool:
    """Whether the gradient norm is taken and clipped here: DeepSpeed clips float32 gradients without ZeRO too, but does not tell the norm."""
    return config.train.precision == "fp32" and config.train.zero_stage == 0


def _float32_gradients(config: RunConfig) -> bool:
    return config.train.precision == "fp32" or config.train.gradient_precision == "fp32"


def deepspeed_settings(config: RunConfig, micro_images: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's JSON for this run."""
    return {
        "train_micro_batch_size_per_gpu": micro_images,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if clips_outside(config) else config.optim.clip_norm,
        # A gradient goes into its float32 place as soon as it is made; infinities are looked for on the device (zero1.py) and where numbers are read anyway.
        "bf16": {"enabled": config.train.precision == "bf16", "immediate_grad_update": True, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32" if _float32_gradients(config) else "bf16"},
        "communication_data_type": "fp32" if _float32_gradients(config) else "bf16",
        "zero_optimization": {"stage": config.train.zero_stage, "round_robin_gradients": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def parameter_groups(student: Student, weight_decay: float) -> list[dict[str, Any]]:
    """Transformer with and without weight decay (rank >= 2 decays), then projector likewise; empty groups are left out."""
    groups = []
    for part in (student.transformer, student.projector):
        parameters = list(part.parameters()) if part is not None else []
        for decays in (True, False):
            chosen = [parameter for parameter in parameters if (parameter.ndim >= 2) == decays]
            if chosen:
                groups.append({"params": chosen, "weight_decay": weight_decay if decays else 0.0})
    return groups


def build_optimizer(groups: list[dict[str, Any]], config: RunConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW: NVIDIA apex's fused one where it is really installed and the device is CUDA, else torch's."""
    optim = config.optim
    settings = {"lr": config.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if device.type == "cuda":
        try:
            import amp_C  # noqa: F401  apex's compiled module: `apex` on PyPI is something else
            from apex.optimizers import FusedAdam
            return FusedAdam(groups, adam_w_mode=True, **settings)
        except ImportError:
            pass
    return torch.optim.AdamW(groups, fused=True, **settings)


class Engine:
    """Student and teacher under DeepSpeed: one call an optimizer step."""

    def __init__(self, config: RunConfig, student: Student, device: torch.device, micro_images: int, accumulation: int) -> None:
        deepspeed = import_deepspeed()
        if device.type == "cpu":
            keep_freed_memory()
        self.config, self.device, self.rank, self.ranks = config, device, dist.get_rank(), dist.get_world_size()
        teacher_source = student.transformer
        groups = parameter_groups(student, config.optim.weight_decay)
        self.deepspeed, *_ = deepspeed.initialize(
            model=student.to(device), optimizer=build_optimizer(groups, config, device),
            config=deepspeed_settings(config, micro_images, accumulation), dist_init_required=False)
        zero1.take_over(self.deepspeed.optimizer)
        self.files = deepspeed_files.take_over(self.deepspeed)
        self.student, self.clips_here = student, clips_outside(config)
        transformer_groups = list(range(len(groups) - (2 if student.projector is not None else 0)))
        self.masters = Masters(self.deepspeed.optimizer, student.transformer, transformer_groups)
        self.teacher: Teacher | None = None
        if config.method.has_teacher:
            self.teacher = Teacher(teacher_source, config.method, config.contrast_depth)
            self.masters.attach(self.teacher)

    def state_bytes(self) -> int:
        """Bytes of this rank's weights, masters, optimizer moments and teacher: what stays between two steps, gradients left out."""
        optimizer = getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)
        tensors = [*self.student.parameters(), *(parameter for group in optimizer.param_groups for parameter in group["params"])]
        tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        if self.teacher is not None:
            tensors += [*self.teacher.model.parameters(), *self.teacher.masters]
        return sum(nbytes for nbytes in {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())

    def losses(self, batch: MicroBatch) -> Losses:
        """The student's losses on one micro-batch; the teacher runs first and hands over features only."""
        batch = batch.to(self.device)
        torch.manual_seed(dropout_seed(self.config.train.seed, self.rank, batch.images_seen))
        teacher_last = keys = None
        if self.teacher is not None:
            label = batch.label if batch.teacher_label is None else batch.teacher_label
            teacher_last, keys = self.teacher.features(batch.tokens, label, batch.positions)
            keys = self._of_all_ranks(keys)
        images = batch.label.shape[0] // self.config.method.views
        return self.deepspeed(batch.tokens, batch.label, batch.targets, batch.keep, teacher_last, keys, batch.positions, self.rank * images)

    def step(self, batches: list[MicroBatch], step: int, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step over its micro-batches.

        Returns:
            The losses (total, ar, mim, step, view), this rank's means over the micro-batches, (5,) float32 on the device; the gradient
            norm before clipping, 0-d.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.train()
        collected, grad_norm = [], None
        for index, batch in enumerate(batches):
            losses = self.losses(batch)
            self.deepspeed.backward(losses.total)
            if self.clips_here and index + 1 == len(batches):
                grad_norm = clip_grad_norm_(self.student.parameters(), self.config.optim.clip_norm or float("inf"))
            self.deepspeed.step()
            collected.append(torch.stack([term.detach().float() for term in losses]))
        if self.teacher is not None:
            self.teacher.update(self.masters.tensors(), step)
        return torch.stack(collected).mean(0), torch.as_tensor(self.deepspeed.get_global_grad_norm() if grad_norm is None else grad_norm)

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch]) -> float:
        """Mean next-token loss (nats) of the student without mask, dropout or label drop, over the given micro-batches of all ranks."""
        self.student.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            batch = batch.to(self.device)
            out = self.student.transformer(batch.tokens, batch.label, logits=False)
            mean = objective.autoregressive_loss(out.hidden, self.student.transformer.output.weight, batch.targets)
            total += torch.tensor([mean.item() * batch.targets.numel(), batch.targets.numel()], dtype=torch.float64)
        self.student.train()
        total = total.to(self.device)
        dist.all_reduce(total)
        return (total[0] / total[1]).item()

    @torch.no_grad()
    def require_finite(self, step: int, what: str = "") -> None:
        """A collective, before anything is saved or exported: raises Diverged if a master weight of student or teacher is not finite.

        `what` stands before the message in place of the step.
        """
        problem = torch.zeros(2, device=self.device)
        for index, masters in enumerate((self.masters.tensors(), self.teacher.masters if self.teacher is not None else [])):
            # Smallest and largest value: NaN passes through both, and no temporary of the weights' size is made.
            ends = [end for master in masters if master.numel() for end in torch.aminmax(master)]
            if ends:
                problem[index] = (~torch.isfinite(torch.stack(ends))).any()
        if self.ranks > 1:
            dist.all_reduce(problem)
        named = [name for name, bad in zip(("the student's", "the teacher's"), problem.tolist(), strict=True) if bad]
        if named:
            raise Diverged(f"{what or f'step {step}'}: {' and '.join(named)} weights are not finite", step)

    def _of_all_ranks(self, keys: Tensor | None) -> Tensor | None:
        """(S, B, D) -> (S, B_all, D), rank 0's images first."""
        if keys is None or self.ranks == 1:
            return keys
        gathered = keys.new_empty(self.ranks * keys.shape[0], *keys.shape[1:])
        dist.all_gather_into_tensor(gathered, keys)
        return gathered.unflatten(0, (self.ranks, -1)).transpose(0, 1).flatten(1, 2)

"""A DeepSpeed engine behind four calls: step, evaluate, masters, and the state that checkpoint.py saves.

The ZeRO settings are derived from the run's config; nothing else in the project knows DeepSpeed's JSON.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from star_fast.config import RunConfig
from star_fast.host_memory import keep_freed_memory
from star_fast.method.batch import Batch
from star_fast.method.masking import dropout_seed
from star_fast.method.objective import Losses
from star_fast.method.student import Projector, Student
from star_fast.method.teacher import Teacher
from star_fast.model.transformer import Transformer
from star_fast.ops import error_flag
from star_fast.training import deepspeed_settings, zero1
from star_fast.training.masters import masters_of
from star_fast.training.ranks import import_deepspeed
from star_fast.training.watch import Diverged

Result = TypeVar("Result")


def build_student(config: RunConfig) -> Student:
    """A freshly initialised student, the same on every rank."""
    generator = torch.Generator().manual_seed(config.train.seed)
    transformer = Transformer(config.model)
    transformer.init_weights(generator)
    transformer.block_checkpointing, transformer.keep_attention = (
        config.train.block_checkpointing,
        config.train.keep_attention,
    )
    if config.train.compile:
        # What is left between our own ops; a block's dropout seeds would compile it anew each step
        for block in transformer.layers:
            cast("nn.Module", block.feed_forward).compile()
    return Student(
        transformer,
        Projector.of_method(config.model.width, config.method, generator),
        config.method,
        config.contrast_depth,
    )


class Inside(nn.Module):
    """What DeepSpeed is given: its forward runs a job among its own modules. Under ZeRO-3 a weight exists in there
    only, the teacher's too.
    """

    def __init__(self, student: Student, teacher: Transformer | None = None) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, job: Callable[[], Result]) -> Result:
        """The job's result."""
        return job()

    def train(self, mode: bool = True) -> Inside:
        """As nn.Module's, but the teacher never trains."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def parameter_groups(student: Student, weight_decay: float) -> list[dict[str, Any]]:
    """Transformer with and without weight decay (rank >= 2 decays), then projector likewise; empty
    groups are left out.
    """
    groups = []
    for part in (cast("nn.Module", student.transformer), student.projector):
        parameters = list(part.parameters()) if part is not None else []
        for decays in (True, False):
            chosen = [parameter for parameter in parameters if (parameter.ndim >= 2) == decays]
            if chosen:
                groups.append({"params": chosen, "weight_decay": weight_decay if decays else 0.0})
    return groups


def build_optimizer(groups: list[dict[str, Any]], config: RunConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW: NVIDIA apex's fused one where it is really installed and the device is CUDA, else torch's."""
    optim = config.optim
    settings: dict[str, Any] = {"lr": config.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
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

    def __init__(
        self, config: RunConfig, student: Student, device: torch.device, micro_images: int, accumulation: int
    ) -> None:
        deepspeed = import_deepspeed()
        if device.type == "cpu":
            keep_freed_memory()
        self.config, self.device, self.rank, self.ranks = config, device, dist.get_rank(), dist.get_world_size()
        self.doing: Callable[[str], None] = lambda what: None  # told what begins within a step
        # A signal to one rank is for all: asked each step, over the hosts, so that no GPU waits.
        # Every rank is a member: it is a group indeed
        self.hosts = (
            cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
            if device.type == "cuda" and self.ranks > 1
            else None
        )
        self.student, self.clips_here = student, deepspeed_settings.clips_outside(config)
        self.settings = deepspeed_settings.settings(config, micro_images, accumulation)
        self.teacher: Teacher | None = None
        module = Inside(student)
        if config.train.zero_stage == 3:
            # The output matrix is read by the student's forward, not by the layer's own. The teacher is sharded with
            # the student.
            deepspeed.zero.register_external_parameter(student, student.transformer.output.weight)
            self._make_teacher()
            module.teacher = self.teacher.model if self.teacher is not None else None
        module.to(device)
        optimizer = build_optimizer(parameter_groups(student, config.optim.weight_decay), config, device)
        self.optimizer_name = f"{type(optimizer).__module__.split('.')[0]} {type(optimizer).__name__}"
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=self.settings, dist_init_required=False
            )
        zero1.take_over(self.deepspeed.optimizer)
        self.masters = masters_of(self.deepspeed.optimizer, student)
        if self.teacher is None:
            self._make_teacher()  # from weights in the working dtype
        if self.teacher is not None:
            self.masters.attach(self.teacher)

    def _make_teacher(self) -> None:
        if self.config.method.has_teacher:
            self.teacher = Teacher(self.student.transformer, self.config.method, self.config.contrast_depth)

    def state_bytes(self) -> int:
        """Bytes of this rank's weights, masters, optimizer moments and teacher: what stays between two steps, gradients
        left out.
        """
        tensors = [*self.student.parameters(), *(shard.tensor for shard in self.masters.shards())]
        tensors += [
            value
            for state in self.deepspeed.basic_optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        if self.teacher is not None:
            tensors += [*cast("nn.Module", self.teacher.model).parameters(), *self.teacher.masters]
        tensors = [getattr(tensor, "ds_tensor", tensor) for tensor in tensors]
        return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())

    def losses(self, batch: Batch) -> Losses:
        """The student's losses on one micro-batch; the teacher runs first and hands over features only."""
        self.settle()
        batch = batch.to(self.device)
        torch.manual_seed(dropout_seed(self.config.train.seed, self.rank, batch.images_seen))
        return self.deepspeed(lambda: self._losses(batch))

    def _losses(self, batch: Batch) -> Losses:
        teacher_last, keys = None, None
        if self.teacher is not None:
            teacher_last, slots = self.teacher.features(*batch.teacher_inputs)
            keys = self._of_all_ranks(slots)
        images = batch.label.shape[0] // self.config.method.views
        return self.student(
            batch.tokens,
            batch.label,
            batch.targets,
            batch.keep,
            teacher_last,
            keys,
            batch.positions,
            self.rank * images,
        )

    def step(self, batches: list[Batch], step: int, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step over its micro-batches.

        Returns:
            The losses (total, ar, mim, step, view), this rank's means over the micro-batches, (5,) float32 on the
            device; the gradient norm before clipping, 0-d.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.train()
        collected, grad_norm = [], None
        for index, batch in enumerate(batches):
            self.doing(f"forward pass of micro-batch {index + 1}, with the all-gather of the teacher's keys")
            losses = self.losses(batch)
            self.doing(f"backward pass of micro-batch {index + 1}, with the reduction of its gradients")
            self.deepspeed.backward(losses.total)
            self.doing("optimizer step, with the all-gather of the weights")
            if self.clips_here and index + 1 == len(batches):
                gradients = [parameter.grad for parameter in self.student.parameters() if parameter.grad is not None]
                grad_norm = zero1.global_norm(gradients)
                zero1.scale_in_step(self.deepspeed.optimizer, gradients, grad_norm, self.config.optim.clip_norm)
            self.deepspeed.step()
            collected.append(torch.stack([term.detach().float() for term in losses]))
        if self.teacher is not None:
            self.teacher.update(self.masters.tensors(), step)
        return torch.stack(collected).mean(0), torch.as_tensor(
            self.deepspeed.get_global_grad_norm() if grad_norm is None else grad_norm
        )

    def any_rank(self, flag: bool) -> bool:
        """Whether it is so on any rank. A collective of the hosts."""
        if self.ranks == 1:
            return flag
        found = torch.tensor([int(flag)])
        dist.all_reduce(found, group=self.hosts)
        return bool(found.item())

    def raise_if_noted(self) -> None:
        """Raise IndexError on every rank if a kernel on any rank noted a bad value (ops/error_flag.py): one that
        stopped alone would leave the others waiting in their next collective. A collective of the hosts."""
        own = error_flag.noted(self.device)
        if self.any_rank(bool(own)):
            raise IndexError(own or "a kernel on another rank noted a bad value; that rank says which")

    def settle(self) -> None:
        """Wait until the weights of student and teacher that are on their way from other ranks have arrived."""
        if hasattr(self.deepspeed.optimizer, "wait_for_weights"):
            self.deepspeed.optimizer.wait_for_weights()
        if self.teacher is not None:
            self.teacher.settle()

    def publish(self) -> None:
        """After the masters of student and teacher were loaded: make the weights that work equal to
        them. A collective.
        """
        self.masters.publish()
        if self.teacher is not None:
            self.teacher.refresh()
        self.settle()

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """Mean next-token loss (nats) of the student without mask, dropout or label drop, over the given micro-batches
        of all ranks.

        Under ZeRO-3, where a forward pass is a collective, a rank with fewer batches joins in with one that does not
        count.
        """
        self.settle()
        self.deepspeed.eval()
        total = torch.zeros(2, dtype=torch.float64)
        idle = torch.zeros(1, self.config.model.positions, dtype=torch.int64)
        for index in range(self._most(len(batches))):
            counted = index < len(batches)
            batch = (batches[index] if counted else Batch(idle[:, 1:], idle[:, 0], idle, None, idle[0], 0)).to(
                self.device
            )
            losses = self.deepspeed(
                lambda batch=batch: self.student(batch.tokens, batch.label, batch.targets, only_ar=True)
            )
            if counted:
                total += torch.tensor(
                    [losses.ar.item() * batch.targets.numel(), batch.targets.numel()], dtype=torch.float64
                )
        self.deepspeed.train()
        total = total.to(self.device)
        dist.all_reduce(total)
        return (total[0] / total[1]).item()

    @torch.no_grad()
    def require_finite(self, step: int, what: str = "") -> None:
        """A collective, before anything is saved or exported: raises Diverged if a master weight of student or teacher
        is not finite.

        `what` stands before the message in place of the step.
        """
        self.settle()
        problem = torch.zeros(2, device=self.device)
        students = [shard.tensor.detach() for shard in self.masters.shards()]  # the projector's too
        for index, masters in enumerate((students, self.teacher.masters if self.teacher is not None else [])):
            # Smallest and largest value: NaN passes through both, and no temporary of the weights' size is made.
            ends = [end for master in masters if master.numel() for end in torch.aminmax(master)]
            if ends:
                problem[index] = (~torch.isfinite(torch.stack(ends))).any()
        if self.ranks > 1:
            dist.all_reduce(problem)
        named = [name for name, bad in zip(("the student's", "the teacher's"), problem.tolist(), strict=True) if bad]
        if named:
            raise Diverged(f"{what or f'step {step}'}: {' and '.join(named)} weights are not finite", step)

    def _of_all_ranks(self, keys: Tensor | None) -> Tensor | Callable[[], Tensor] | None:
        """(S, B, D) -> (S, B_all, D), rank 0's images first; on several ranks a function that waits for them, as they
        travel while the student runs.
        """
        if keys is None or self.ranks == 1:
            return keys
        gathered = keys.new_empty(self.ranks * keys.shape[0], *keys.shape[1:])
        arrival = dist.all_gather_into_tensor(gathered, keys, async_op=True)

        def arrived() -> Tensor:
            assert arrival is not None, "async_op"
            arrival.wait()
            return gathered.unflatten(0, (self.ranks, -1)).transpose(0, 1).flatten(1, 2)

        return arrived

    def _most(self, count: int) -> int:
        """`count`, or under ZeRO-3 the largest of all ranks."""
        if self.config.train.zero_stage < 3 or self.ranks == 1:
            return count
        most = torch.tensor(count, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

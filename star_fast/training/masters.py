"""Where DeepSpeed keeps the transformer's float32 master weights, and how the teacher mirrors them.

Three layouts exist. Whole: one float32 tensor a parameter (fp32 or bf16 without ZeRO). Flat: one padded flat buffer a parameter group, of which this rank
holds an equal shard in float32 (ZeRO-1 and 2). Partitioned: this rank's shard of every parameter, whose working weights are sharded too (ZeRO-3). The
teacher's masters take the student's layout, so that the average is updated where the masters are, and only rounded copies travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from star_fast.method.teacher import Teacher

# Of DeepSpeed's optimizers for ZeRO-1 and 2: this rank's float32 shards, by group -> (the groups' flat working buffers, their parameters).
_SHARDS = {"single_partition_of_fp32_groups": ("bit16_groups_flat", "bit16_groups"),
           "fp32_groups_flat_partition": ("bf16_groups_flat", "bf16_groups")}  # bf16, ZeRO-1, float32 gradients


@dataclass
class _Flat:
    """One parameter group of a ZeRO-1/2 optimizer."""

    working: Tensor  # the whole flat buffer in the working dtype, padded to equal shards
    parameters: list[tuple[str, nn.Parameter]]  # views into `working`

    def offset(self, parameter: Tensor) -> int:
        return (parameter.data_ptr() - self.working.data_ptr()) // self.working.element_size()

    def shard(self, flat: Tensor) -> Tensor:
        return flat.view(dist.get_world_size(), -1)[dist.get_rank()]


class Masters:
    """The student transformer's float32 masters under one DeepSpeed engine, in whole tensors.

    Args:
        optimizer: the engine's optimizer (DeepSpeed's wrapper or a plain torch optimizer).
        transformer: the trained transformer, after deepspeed.initialize.
        groups: indices of the optimizer's parameter groups that hold the transformer's parameters.
    """

    sharded = False  # whether each rank holds a part

    def __init__(self, optimizer: Any, transformer: nn.Module, groups: list[int]) -> None:
        self._optimizer, self._groups = optimizer, groups
        self._named = list(transformer.named_parameters())

    def tensors(self) -> list[Tensor]:
        """The float32 masters this rank holds, in a fixed order. Fresh at each call: loading a checkpoint may replace them."""
        if hasattr(self._optimizer, "fp32_groups"):  # bf16 without ZeRO
            by_working = {id(working): master for groups in zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
                          for working, master in zip(*groups, strict=True)}
            return [by_working[id(parameter)].detach() for _, parameter in self._named]
        if any(parameter.dtype == torch.bfloat16 for _, parameter in self._named):
            raise RuntimeError(f"Masters: {type(self._optimizer).__name__} keeps its float32 weights in an unknown place")
        return [parameter.detach() for _, parameter in self._named]

    def attach(self, teacher: Teacher) -> None:
        """Give `teacher` masters in this layout, equal to the student's, and a model that receives their rounded copies."""
        twins = dict(teacher.model.named_parameters())
        whole = [twins[name].data for name, _ in self._named]
        if all(tensor.dtype != torch.bfloat16 for tensor in whole):
            teacher.attach(whole, None)
        else:
            teacher.attach([master.clone() for master in self.tensors()], whole)
        teacher.refresh()

    def gather(self, masters: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 tensor on the CPU) of every transformer parameter, from masters in this layout. A collective under ZeRO."""
        yield from ((name, master.float().cpu()) for (name, _), master in zip(self._named, masters, strict=True))


class FlatMasters(Masters):
    """Shards of flat buffers: ZeRO-1 and 2."""

    sharded = True

    def __init__(self, optimizer: Any, transformer: nn.Module, groups: list[int]) -> None:
        super().__init__(optimizer, transformer, groups)
        self._shards = next(name for name in _SHARDS if hasattr(optimizer, name))
        names = {id(parameter): name for name, parameter in self._named}
        flats, members = (getattr(optimizer, name) for name in _SHARDS[self._shards])
        self._flats = [_Flat(flats[g], [(names[id(p)], p) for p in members[g]]) for g in groups]

    def tensors(self) -> list[Tensor]:
        """See Masters."""
        return [getattr(self._optimizer, self._shards)[g].detach() for g in self._groups]

    def attach(self, teacher: Teacher) -> None:
        """See Masters."""
        twins, flats, shards = dict(teacher.model.named_parameters()), [], []
        for flat in self._flats:
            twin = flat.working.detach().clone()
            for name, parameter in flat.parameters:
                start = flat.offset(parameter)
                twins[name].data = twin[start : start + parameter.numel()].view_as(parameter)
            flats.append(twin)
            shards.append(flat.shard(twin))

        def publish() -> list[Any]:
            if dist.get_world_size() == 1:
                return []
            return [dist.all_gather_into_tensor(twin, shard, async_op=True) for twin, shard in zip(flats, shards, strict=True)]

        teacher.attach([master.clone() for master in self.tensors()], shards, publish)
        teacher.refresh()

    def gather(self, masters: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """See Masters."""
        for flat, shard in zip(self._flats, masters, strict=True):
            whole = torch.empty(flat.working.numel(), dtype=torch.float32, device=flat.working.device)
            dist.all_gather_into_tensor(whole, shard.to(whole.device, copy=True))
            for name, parameter in flat.parameters:
                start = flat.offset(parameter)
                yield name, whole[start : start + parameter.numel()].view_as(parameter).cpu()


class PartitionedMasters(Masters):
    """This rank's shard of every parameter: ZeRO-3. The next forward gathers what is written into a parameter's `ds_tensor`."""

    sharded = True

    def tensors(self) -> list[Tensor]:
        """See Masters."""
        return [self._optimizer.get_local_fp32_param(parameter).detach().view(-1) for _, parameter in self._named]

    def attach(self, teacher: Teacher) -> None:
        """See Masters."""
        twins = dict(teacher.model.named_parameters())
        masters, shards = [master.clone() for master in self.tensors()], [twins[name].ds_tensor.data for name, _ in self._named]
        for (name, _), master, shard in zip(self._named, masters, shards, strict=True):
            if master.shape != shard.shape:
                raise RuntimeError(f"Masters: {name} is sharded into {tuple(master.shape)} for the student and {tuple(shard.shape)} for the teacher")
        teacher.attach(masters, shards)
        teacher.refresh()

    def gather(self, masters: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """See Masters."""
        for (name, parameter), shard in zip(self._named, masters, strict=True):
            whole = torch.empty(dist.get_world_size() * shard.numel(), dtype=torch.float32, device=parameter.device)
            dist.all_gather_into_tensor(whole, shard.to(whole.device, copy=True))
            yield name, whole[: parameter.ds_numel].view(parameter.ds_shape).cpu()


def masters_of(optimizer: Any, transformer: nn.Module, groups: list[int]) -> Masters:
    """The layout that this optimizer uses; arguments as of Masters."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return PartitionedMasters(optimizer, transformer, groups)
    return (FlatMasters if any(hasattr(optimizer, name) for name in _SHARDS) else Masters)(optimizer, transformer, groups)

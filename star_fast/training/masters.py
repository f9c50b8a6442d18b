"""Where DeepSpeed keeps the student's float32 master weights, and how the teacher mirrors them.

Three layouts exist. Whole: one float32 tensor a parameter (fp32 or bf16 without ZeRO). Flat: one padded flat buffer a
parameter group, of which this rank holds an equal shard in float32 (ZeRO-1 and 2). Partitioned: this rank's shard of
every parameter, whose working weights are sharded too (ZeRO-3). The teacher's masters take the layout of the student's
transformer, so that the average is updated where the masters are, and only rounded copies travel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from star_fast.method.student import Student
from star_fast.method.teacher import Teacher

TRANSFORMER = "transformer."  # names of the student's parameters that the teacher has too

# Of DeepSpeed's optimizers for ZeRO-1 and 2: this rank's float32 shards, by group -> (the groups' flat working buffers,
# their parameters).
_SHARDS = {
    "single_partition_of_fp32_groups": ("bit16_groups_flat", "bit16_groups"),
    "fp32_groups_flat_partition": ("bf16_groups_flat", "bf16_groups"),  # bf16, ZeRO-1, float32 gradients
}


class Piece(NamedTuple):
    """Neighbouring elements of one parameter, and where they lie in a shard."""

    name: str
    first: int  # in the flattened parameter
    length: int
    place: int  # in the flattened shard


class Shard(NamedTuple):
    """A float32 tensor that this rank's optimizer steps (the object that its state is kept under), and what is in it;
    the rest is padding.
    """

    tensor: Tensor
    pieces: list[Piece]


class Masters:
    """The student's float32 masters under one DeepSpeed engine, in whole tensors.

    Args:
        optimizer: the engine's optimizer (DeepSpeed's wrapper or a plain torch optimizer).
        student: the trained module, after deepspeed.initialize.
    """

    sharded = False  # whether each rank holds a part

    def __init__(self, optimizer: Any, student: Student) -> None:
        self._optimizer = optimizer
        self.named = dict(student.named_parameters())
        self._of_transformer = {
            name: parameter for name, parameter in self.named.items() if name.startswith(TRANSFORMER)
        }

    def shapes(self) -> dict[str, torch.Size]:
        """Of all parameters, whole."""
        return {name: parameter.shape for name, parameter in self.named.items()}

    def shards(self) -> list[Shard]:
        """All that this rank holds, in a fixed order. Fresh at each call: loading a checkpoint may replace them."""
        if hasattr(self._optimizer, "fp32_groups"):  # bf16 without ZeRO
            by_working = {
                id(working): master
                for groups in zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
                for working, master in zip(*groups, strict=True)
            }
            masters = [by_working[id(parameter)] for parameter in self.named.values()]
        elif any(parameter.dtype == torch.bfloat16 for parameter in self.named.values()):
            raise RuntimeError(
                f"Masters: {type(self._optimizer).__name__} keeps its float32 weights in an unknown place"
            )
        else:
            masters = list(self.named.values())
        return [
            Shard(master, [Piece(name, 0, master.numel(), 0)]) for name, master in zip(self.named, masters, strict=True)
        ]

    def tensors(self) -> list[Tensor]:
        """The transformer's masters on this rank, laid out as the teacher's."""
        return [shard.tensor.detach() for shard in self.shards() if shard.pieces[0].name.startswith(TRANSFORMER)]

    def teacher_shards(self, teacher: Teacher) -> list[Shard]:
        """The teacher's masters and what is in them, under the names of the student's parameters."""
        mine = [shard for shard in self.shards() if shard.pieces[0].name.startswith(TRANSFORMER)]
        return [Shard(master, shard.pieces) for master, shard in zip(teacher.masters, mine, strict=True)]

    def publish(self) -> None:
        """After the masters were loaded: the working weights become the rounded masters, on all ranks."""
        for shard, parameter in zip(self.shards(), self.named.values(), strict=True):
            if shard.tensor is not parameter:
                parameter.data.copy_(shard.tensor.data)

    def attach(self, teacher: Teacher) -> None:
        """Give `teacher` masters in this layout, equal to the student's, and a model that receives their rounded
        copies.
        """
        whole = [self._twin(teacher, name).data for name in self._of_transformer]
        if all(tensor.dtype != torch.bfloat16 for tensor in whole):
            teacher.attach(whole, None)
        else:
            teacher.attach([master.clone() for master in self.tensors()], whole)
        teacher.refresh()

    def gather(self, masters: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 tensor on the CPU) of every transformer parameter, from masters as of `tensors`. A
        collective under ZeRO.
        """
        yield from (
            (name.removeprefix(TRANSFORMER), master.float().cpu())
            for name, master in zip(self._of_transformer, masters, strict=True)
        )

    @staticmethod
    def _twin(teacher: Teacher, name: str) -> nn.Parameter:
        return cast("nn.Module", teacher.model).get_parameter(name.removeprefix(TRANSFORMER))


class FlatMasters(Masters):
    """Shards of flat buffers: ZeRO-1 and 2."""

    sharded = True

    def __init__(self, optimizer: Any, student: Student) -> None:
        super().__init__(optimizer, student)
        self._shards_name = next(name for name in _SHARDS if hasattr(optimizer, name))
        names = {id(parameter): name for name, parameter in self.named.items()}
        flats, members = (getattr(optimizer, name) for name in _SHARDS[self._shards_name])
        # By group: the flat working buffer, and (name, where it starts) of the parameters that are views into it.
        self._flats = [
            (flat, [(names[id(p)], (p.data_ptr() - flat.data_ptr()) // flat.element_size()) for p in group])
            for flat, group in zip(flats, members, strict=True)
        ]

    def shards(self) -> list[Shard]:
        """See Masters."""
        found = []
        for tensor, (_, members) in zip(getattr(self._optimizer, self._shards_name), self._flats, strict=True):
            begin = dist.get_rank() * tensor.numel()
            pieces = []
            for name, start in members:
                first, last = max(start, begin), min(start + self.named[name].numel(), begin + tensor.numel())
                # A parameter of which this rank has nothing is named as well: the group's first name tells whose it is.
                pieces.append(
                    Piece(
                        name, max(0, first - start), max(0, last - first), max(0, first - begin) if last > first else 0
                    )
                )
            found.append(Shard(tensor, pieces))
        return found

    def tensors(self) -> list[Tensor]:
        """See Masters. Asked in every step, so without the pieces."""
        shards = getattr(self._optimizer, self._shards_name)
        return [
            tensor.detach()
            for tensor, (_, members) in zip(shards, self._flats, strict=True)
            if members[0][0].startswith(TRANSFORMER)
        ]

    def publish(self) -> None:
        """See Masters."""
        self._optimizer.update_lp_params()

    def attach(self, teacher: Teacher) -> None:
        """See Masters."""
        flats, shards = [], []
        for flat, members in self._flats:
            if members[0][0].startswith(TRANSFORMER):
                twin = flat.detach().clone()
                for name, start in members:
                    self._twin(teacher, name).data = twin[start : start + self.named[name].numel()].view_as(
                        self.named[name]
                    )
                flats.append(twin)
                shards.append(twin.view(dist.get_world_size(), -1)[dist.get_rank()])

        def publish() -> list[Any]:
            if dist.get_world_size() == 1:
                return []
            return [
                dist.all_gather_into_tensor(twin, shard, async_op=True)
                for twin, shard in zip(flats, shards, strict=True)
            ]

        teacher.attach([master.clone() for master in self.tensors()], shards, publish)
        teacher.refresh()

    def gather(self, masters: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """See Masters."""
        of_transformer = [(flat, members) for flat, members in self._flats if members[0][0].startswith(TRANSFORMER)]
        for (flat, members), shard in zip(of_transformer, masters, strict=True):
            whole = torch.empty(flat.numel(), dtype=torch.float32, device=flat.device)
            dist.all_gather_into_tensor(whole, shard.to(whole.device, copy=True))
            for name, start in members:
                yield (
                    name.removeprefix(TRANSFORMER),
                    whole[start : start + self.named[name].numel()].view_as(self.named[name]).cpu(),
                )


class PartitionedMasters(Masters):
    """This rank's shard of every parameter: ZeRO-3. The next forward gathers what is written into a parameter's
    `ds_tensor`.
    """

    sharded = True
    named: dict[str, Any]  # parameters, with what DeepSpeed has hung onto them: ds_shape, ds_numel, ds_tensor
    _of_transformer: dict[str, Any]

    def shapes(self) -> dict[str, torch.Size]:
        """See Masters."""
        return {name: parameter.ds_shape for name, parameter in self.named.items()}

    def shards(self) -> list[Shard]:
        """See Masters."""
        found = [Shard(tensor, []) for tensor in self._optimizer.fp32_partitioned_groups_flat]
        for name, parameter in self.named.items():
            group, place, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            found[group].pieces.append(self._piece(name, place))
        return found

    def _piece(self, name: str, place: int) -> Piece:
        parameter = self.named[name]
        size, first = parameter.ds_tensor.numel(), dist.get_rank() * parameter.ds_tensor.numel()
        return Piece(name, min(first, parameter.ds_numel), max(0, min(size, parameter.ds_numel - first)), place)

    def tensors(self) -> list[Tensor]:
        """See Masters."""
        return [
            self._optimizer.get_local_fp32_param(parameter).detach().view(-1)
            for parameter in self._of_transformer.values()
        ]

    def teacher_shards(self, teacher: Teacher) -> list[Shard]:
        """See Masters."""
        return [
            Shard(master, [self._piece(name, 0)])
            for name, master in zip(self._of_transformer, teacher.masters, strict=True)
        ]

    def publish(self) -> None:
        """See Masters."""
        for parameter in self.named.values():
            parameter.ds_tensor.data.copy_(self._optimizer.get_local_fp32_param(parameter).detach().view(-1))

    def attach(self, teacher: Teacher) -> None:
        """See Masters."""
        masters, shards = (
            [master.clone() for master in self.tensors()],
            [cast("Any", self._twin(teacher, name)).ds_tensor.data for name in self._of_transformer],
        )
        for name, master, shard in zip(self._of_transformer, masters, shards, strict=True):
            if master.shape != shard.shape:
                raise RuntimeError(
                    f"Masters: {name} is sharded into {tuple(master.shape)} for the student and "
                    f"{tuple(shard.shape)} for the teacher"
                )
        teacher.attach(masters, shards)
        teacher.refresh()

    def gather(self, masters: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """See Masters."""
        for (name, parameter), shard in zip(self._of_transformer.items(), masters, strict=True):
            whole = torch.empty(dist.get_world_size() * shard.numel(), dtype=torch.float32, device=parameter.device)
            dist.all_gather_into_tensor(whole, shard.to(whole.device, copy=True))
            yield name.removeprefix(TRANSFORMER), whole[: math.prod(parameter.ds_shape)].view(parameter.ds_shape).cpu()


def masters_of(optimizer: Any, student: Student) -> Masters:
    """The layout that this optimizer uses; arguments as of Masters."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return PartitionedMasters(optimizer, student)
    return (FlatMasters if any(hasattr(optimizer, name) for name in _SHARDS) else Masters)(optimizer, student)

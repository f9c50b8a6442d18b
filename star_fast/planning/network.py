"""Training over many GPUs: what they send each other in a step, how long that takes, and what becomes of the speed.
Predicted, not measured.

All sums go round a ring of the GPUs, so what one GPU sends crosses each link between two neighbours: NVLink inside a
machine, the network between machines, whose whole rate counts, since rings run side by side over all its cards.
"""

from __future__ import annotations

from typing import NamedTuple

from star_fast.config import RunConfig
from star_fast.errors import UserError
from star_fast.planning.gpus import Gpu
from star_fast.planning.sizes import number_bytes, parameters
from star_fast.planning.states import float32_gradients
from star_fast.planning.work import sent_bytes


class Network(NamedTuple):
    """What joins the GPUs."""

    gbit_per_s: float = 400.0  # from each machine to the others, in one direction: an assumption
    gpus_a_machine: int = 8


class Reach(NamedTuple):
    """A step of the same run on so many GPUs."""

    gpus: int
    stage: int  # of ZeRO
    micro_images: int
    accumulation: int
    compute_s: float  # arithmetic at the share assumed or memory at its peak, whichever takes longer
    sent_bytes_a_gpu: int
    network_s: float
    images_per_s: float  # of all, where nothing is hidden: first compute, then send
    hidden_images_per_s: float  # where all that can be is sent while something is computed

    @property
    def step_s(self) -> float:
        """Where nothing is hidden."""
        return self.compute_s + self.network_s


def check(network: Network) -> Network:
    """The same network. Raises UserError for a rate or a number of GPUs that cannot be."""
    if not 0.001 <= network.gbit_per_s <= 1e6:
        raise UserError(f"--network-gbit-per-s: expected 0.001 ... 1000000, got {network.gbit_per_s:g}")
    if not 1 <= network.gpus_a_machine <= 2**20:
        raise UserError(f"--gpus-per-machine: expected 1 ... {2**20}, got {network.gpus_a_machine}")
    return network


def stage_bytes(config: RunConfig, stage: int, gpus: int, accumulation: int) -> int:
    """Bytes that one GPU sends in a step under ZeRO `stage`.

    Stage 0: gradients summed everywhere, twice their size in a ring. Stage 1: that, and the new weights of student and
    teacher. Stage 2: gradients only to their owner, after each micro-batch. Stage 3: that, and in each micro-batch the
    student's weights forward and back, the teacher's forward.
    """
    found, size = parameters(config), number_bytes(config)
    wide = 4 if float32_gradients(config) and stage else size  # without ZeRO DeepSpeed reduces in the weights' type
    P, Q = found.student, found.transformer if config.method.has_teacher else 0
    if stage == 1:
        return sent_bytes(config, gpus)
    if stage == 0:
        sent = 2 * wide * P
    elif stage == 2:
        sent = accumulation * wide * P + size * (P + Q)
    else:
        sent = accumulation * (wide * P + size * (2 * P + Q))
    return sent * (gpus - 1) // gpus


def network_s(sent: int, gpus: int, gpu: Gpu, network: Network) -> float:
    """Seconds that `sent` bytes of each GPU take over the slowest link that they cross; 0 on one GPU."""
    if gpus == 1:
        return 0.0
    if gpus <= network.gpus_a_machine:
        return sent / gpu.nvlink_bytes_per_s
    return sent / min(gpu.nvlink_bytes_per_s, network.gbit_per_s * 1e9 / 8)


def reach(
    config: RunConfig,
    gpus: int,
    stage: int,
    micro_images: int,
    accumulation: int,
    compute_s: float,
    gpu: Gpu,
    network: Network,
) -> Reach:
    """One row of the curve."""
    sent = stage_bytes(config, stage, gpus, accumulation)
    sending_s, images = network_s(sent, gpus, gpu, network), config.train.images_per_step
    return Reach(
        gpus,
        stage,
        micro_images,
        accumulation,
        compute_s,
        sent,
        sending_s,
        images / (compute_s + sending_s),
        images / max(compute_s, sending_s),
    )

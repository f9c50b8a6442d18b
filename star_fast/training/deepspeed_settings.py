"""DeepSpeed's JSON, derived from the run's config; and a user's own, laid over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from star_fast.config import ConfigError, RunConfig
from star_fast.errors import printable

# A gradient bucket of ZeRO-2 and 3: 128 MiB of float32.
_BUCKET_ELEMENTS = 2**25
# What the config's fields decide; a JSON may repeat it or say "auto".
_DECIDED = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "data_types.grad_accum_dtype",
    "communication_data_type",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer",
)
_REFUSED = {
    "optimizer": "--optim.*",
    "scheduler": "--optim.schedule",
    "fp16": "--train.precision bf16",
    "amp": "--train.precision bf16",
    "torch_autocast": "--train.precision bf16",
    "activation_checkpointing": "--train.block-checkpointing",
}


def clips_outside(config: RunConfig) -> bool:
    """Whether the gradient norm is taken and clipped by us: DeepSpeed clips float32 gradients without ZeRO too, but
    does not tell the norm.
    """
    return config.train.precision == "fp32" and config.train.zero_stage == 0


def derived(config: RunConfig, micro_images: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's JSON for this run."""
    train = config.train
    gradients = "bf16" if train.precision == "bf16" and train.gradient_precision == "bf16" else "fp32"
    zero: dict[str, Any] = {"stage": train.zero_stage, "round_robin_gradients": False}
    if train.zero_stage == 2:
        zero |= {"overlap_comm": True, "reduce_bucket_size": _BUCKET_ELEMENTS, "contiguous_gradients": True}
    if train.zero_stage == 3:
        # A persistent weight would be gathered after the student's step, before the teacher's: the teacher's would
        # stand still.
        zero |= {"overlap_comm": True, "reduce_bucket_size": _BUCKET_ELEMENTS, "stage3_param_persistence_threshold": 0}
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": micro_images,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if clips_outside(config) else config.optim.clip_norm,
        # A gradient goes into its float32 place as soon as it is made; infinities are looked for on the device
        # (zero1.py) and where numbers are read anyway.
        "bf16": {"enabled": train.precision == "bf16", "immediate_grad_update": True, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": gradients},
        "communication_data_type": gradients,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on the host too, and compiles nothing
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def settings(config: RunConfig, micro_images: int, accumulation: int) -> dict[str, Any]:
    """The derived JSON with the user's (`train.deepspeed`) over it.

    Raises:
        ConfigError: the file is no JSON object, or contradicts what the config decides.
    """
    ours = derived(config, micro_images, accumulation)
    return _laid_over(ours, _read(config.train.deepspeed), config.train.deepspeed) if config.train.deepspeed else ours


def _read(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"train.deepspeed: {printable(path)} cannot be read as JSON: {printable(str(error))}"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"train.deepspeed: {printable(path)} must hold one JSON object, it holds a {type(found).__name__}"
        )
    return found


def _laid_over(ours: dict[str, Any], theirs: dict[str, Any], path: str) -> dict[str, Any]:
    for name, instead in _REFUSED.items():
        part = theirs.get(name)
        if part and not (isinstance(part, dict) and part.get("enabled") is False):
            raise ConfigError(
                f"train.deepspeed: {printable(path)} sets {name}, which this project decides: leave it out and "
                f"use {instead}"
            )
    for name in _DECIDED:
        wanted, found = _at(ours, name), _at(theirs, name)
        if found not in (None, "auto", wanted):
            raise ConfigError(
                f"train.deepspeed: {printable(path)} sets {name} = {printable(str(found))}, the run's config "
                f"gives {wanted!r}: "
                "change one of them"
            )
    ranks_times = theirs.get("train_batch_size")
    if ranks_times not in (None, "auto"):
        raise ConfigError(
            f"train.deepspeed: {printable(path)} sets train_batch_size: leave it out, --train.images-per-step says it"
        )
    if _at(theirs, "zero_optimization.stage3_param_persistence_threshold") not in (None, "auto", 0):
        raise ConfigError(
            f"train.deepspeed: {printable(path)} sets stage3_param_persistence_threshold: only 0 keeps the "
            "teacher moving"
        )
    return _merged(ours, theirs)


def _at(tree: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        if not isinstance(tree, dict):
            return None
        tree = tree.get(name)
    return tree


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for name, value in theirs.items():
        if value == "auto":
            continue
        merged[name] = (
            _merged(ours[name], value) if isinstance(value, dict) and isinstance(ours.get(name), dict) else value
        )
    return merged

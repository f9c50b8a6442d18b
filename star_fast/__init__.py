"""star_fast: ST-AR self-guided training of autoregressive image models, with fused kernels and fast exact sampling.

From Python:

    load(path)            -> ImageModel, to draw from and look into: of a run folder, a model folder, a LlamaGen file
    run_config(preset)    -> RunConfig: the settings of a named run, each of which can be changed
    train(config, run)    -> the run's folder; trains in this process
    ops                   the operations: masked attention, cross-entropy without whole logits, token drawing ...
    method                ST-AR itself, for our transformer or anybody's decoder: masking, objective, Student, Teacher
    UserError             every mistake that a user can mend: one line with what was expected, what came, what to do

    import star_fast
    model = star_fast.load("runs/digits")
    images = model.sample(["3", "7"], n=8, guidance=2.0)

help(star_fast.load), help(star_fast.ImageModel) and help(star_fast.train.__call__) say more; docs/python.md shows all
of it at work. The commands are `star-fast --help` and `deepspeed star_fast/train.py --help`.

Importing this package loads nothing else: torch and the rest come with the first name that is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors; at run time __getattr__ loads them
    from star_fast import method as method
    from star_fast import ops as ops
    from star_fast import train as train
    from star_fast.api import ImageModel as ImageModel
    from star_fast.api import load as load
    from star_fast.api import run_config as run_config
    from star_fast.config import RunConfig as RunConfig
    from star_fast.errors import UserError as UserError
    from star_fast.generation.images import Images as Images

__version__ = "0.1.0"

# Name -> the module that has it; where they are the same the name is the module.
_HOMES = {
    "load": "star_fast.api",
    "ImageModel": "star_fast.api",
    "Images": "star_fast.generation.images",
    "run_config": "star_fast.api",
    "RunConfig": "star_fast.config",
    "train": "star_fast.train",
    "ops": "star_fast.ops",
    "method": "star_fast.method",
    "UserError": "star_fast.errors",
}
__all__ = ["Images", "ImageModel", "RunConfig", "UserError", "load", "method", "ops", "run_config", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'star_fast' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    module = importlib.import_module(_HOMES[name])
    value = module if _HOMES[name] == f"star_fast.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

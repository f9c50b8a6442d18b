"""Train: `deepspeed star_fast/train.py --preset XL --data.codes CODES --run runs/XL`, or the same with plain python for
one process.

From Python `star_fast.train(config, run)`: this module can be called; help(star_fast.train.__call__) says how.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys

if (
    __name__ == "__main__"
    and sys.path
    and os.path.realpath(sys.path[0] or ".") == os.path.dirname(os.path.realpath(__file__))
):
    # Run as a file, Python puts this folder first on the path, where a module's name could hide a package's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, cast

import tyro

from star_fast.config import RunConfig
from star_fast.config_file import base_config, command_line, given, parse, write_config
from star_fast.errors import UserError, printable
from star_fast.guard import guarded
from star_fast.locks import only_writer
from star_fast.presets import plain
from star_fast.storage import atomic_write_json, remove_leftovers
from star_fast.threads import settle_threads

# What gloo, NCCL and torch's store say when the process at the other end has gone.
_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|connection refused|failed to recv", re.IGNORECASE
)


@dataclass(frozen=True)
class TrainCommand:
    """Train a LlamaGen transformer with ST-AR on a code store. Settings start from --preset NAME or --config FILE; each
    can be changed here.
    """

    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    # These two are taken out of the command line before the rest is read (config_file.base_config), since all other
    # defaults come from them.
    preset: str = "tiny"  # settings to start from: a name that `star-fast presets` lists
    config_file: Annotated[str, tyro.conf.arg(name="config")] = ""  # or: a YAML file, such as a run's config.yaml
    run: str = "runs/run"  # the run's folder
    init: str = ""  # start student and teacher from these weights: a model folder of ours, or a LlamaGen file
    # which of --init's weights: of a model folder student (default) or teacher, of a LlamaGen file model (default), ema
    # ...
    init_weights: str = ""
    # names of --init's classes, one a line, or imagenet: a LlamaGen file has none; classes of other data are matched by
    # name
    init_class_names: str = ""
    resume: bool = False  # go on from the run's newest checkpoint
    # LlamaGen's own training, the baseline: no teacher, mask or contrast, one view a step (or --method.views)
    plain: bool = False


def train(command: TrainCommand) -> Path:
    """Train as told; returns the folder of the exported model. Every rank calls it.

    Raises:
        UserError, ConfigError: the job cannot start or go on; one line that says why and what to do.
    """
    from star_fast.data.codes import CodeStore
    from star_fast.method.student import Student
    from star_fast.model.class_names import read_class_names
    from star_fast.model.transformer import Transformer
    from star_fast.model.weights import load_into
    from star_fast.training import checkpoint
    from star_fast.training.batches import Batches, resolve
    from star_fast.training.engine import Engine, build_student
    from star_fast.training.export import export
    from star_fast.training.loop import interrupts
    from star_fast.training.loop import train as run_loop
    from star_fast.training.ranks import start_ranks, together

    run = Path(command.run)
    if not command.config.data.codes:
        raise UserError(
            "data.codes: expected the folder of a code store (made by `star-fast prepare`), got nothing; give "
            "--data.codes FOLDER"
        )
    if command.config.data.images and not command.config.data.online:
        raise UserError(
            f"data.images: {command.config.data.images} has no effect without --data.online True; leave it out, "
            "or add that"
        )
    if (command.init_weights or command.init_class_names) and not command.init:
        raise UserError(
            f"--init-{'weights' if command.init_weights else 'class-names'}: expected with --init, which was not given"
        )
    store = CodeStore.open(command.config.data.codes)
    config = resolve(plain(command.config) if command.plain else command.config, store)
    _find_checkpoint(run, command.resume)  # before anything is made
    with only_writer(run, "training"):
        newest = _find_checkpoint(run, command.resume)
        rank, ranks, device = start_ranks()
        if rank == 0:
            remove_leftovers(run)
            checkpoint.clear_leftovers(run)

        def set_up() -> tuple[Batches, Student, list[str]]:
            student, adapted = build_student(config), []
            if command.init and not command.resume:
                adapted = load_into(
                    cast("Transformer", student.transformer),  # build_student made it
                    command.init,
                    weights=command.init_weights,
                    tokenizer_hash=store.tokenizer_hash,
                    class_names=store.class_names,
                    class_names_there=read_class_names(command.init_class_names) if command.init_class_names else None,
                )
            return (
                Batches(
                    store, config, rank, ranks, _online_codes(config, store, device) if config.data.online else None
                ),
                student,
                adapted,
            )

        batches, student, adapted = together(set_up)
        engine = Engine(config, student, device, batches.micro_images, batches.accumulation)
        earlier = checkpoint.load(engine, store, newest) if newest is not None else None
        first_step = earlier.step if earlier is not None else 0
        if rank == 0:
            write_config(config, run / "config.yaml")
            atomic_write_json(run / "deepspeed.json", engine.settings)
            _announce(config, batches, student, device, ranks, first_step, engine.optimizer_name)
            for line in adapted:
                print(f"{printable(command.init)}: {printable(line)}", flush=True)
            if earlier is not None and (changed := checkpoint.changed_settings(earlier, config)):
                print(f"Resuming with other settings than before: {', '.join(changed)}", flush=True)
        with interrupts() as stop:
            done = run_loop(
                engine, batches, run, first_step, stop=stop, earlier=earlier.telemetry if earlier is not None else None
            )
            folder = export(engine, store, run / "model", done)
    if rank == 0:
        if batches.seconds and done > first_step:
            views_s, tokenizer_s = (batches.seconds[name] / (done - first_step) for name in ("views_s", "tokenizer_s"))
            print(
                f"Fresh views took {views_s + tokenizer_s:.3g} s a step in the background, of which the tokenizer "
                f"{tokenizer_s:.3g} s; what steps waited "
                "for them is data_s in metrics.jsonl",
                flush=True,
            )
        finished = done >= batches.total_steps
        print(
            f"{'Finished' if finished else 'Stopped'} after {done} of {batches.total_steps} steps; model in "
            f"{printable(folder)}" + ("" if finished else f"; go on with --resume --run {printable(run)}"),
            flush=True,
        )
    return folder


def _online_codes(config: RunConfig, store: Any, device: Any) -> Any:
    """What draws and encodes fresh views of the store's images. Raises UserError where images or tokenizer are not
    there.
    """
    from star_fast.data.online import OnlineCodes
    from star_fast.data.origin import images_of
    from star_fast.model.tokenizer import VQTokenizer

    source = images_of(store, config.data.images)
    if source is None:
        raise UserError(
            f"data.images: expected the folder that {store.path} was made of, which the store does not know; give "
            "--data.images FOLDER"
        )
    folder = store.path / "tokenizer"
    if not folder.exists():
        raise UserError(
            f"{folder}: not found; training on fresh views needs the tokenizer that made the codes, which "
            "`star-fast prepare` keeps there"
        )
    return OnlineCodes(store, source, VQTokenizer.load(folder), config.data, config.train.seed, device)


def _find_checkpoint(run: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from. Raises UserError: there is one and nobody said --resume, or the other way round."""
    from star_fast.training import checkpoint

    newest = checkpoint.latest(run)
    if newest is not None and not resume:
        raise UserError(f"{run}: holds checkpoints up to {newest.name}; add --resume to go on, or choose another --run")
    if resume and newest is None:
        raise UserError(f"{run}: nothing to resume, there is no complete checkpoint in {run / 'checkpoints'}")
    return newest


def _announce(
    config: RunConfig, batches: Any, student: Any, device: Any, ranks: int, first_step: int, optimizer: str
) -> None:
    parameters = sum(
        getattr(parameter, "ds_numel", parameter.numel()) for parameter in student.transformer.parameters()
    )
    method = "ST-AR" if config.method.has_teacher else "plain next-token training"
    print(
        f"{method}: {parameters / 1e6:.1f} M parameters, {len(batches.images)} training images x "
        f"{config.method.views} views, "
        f"steps {first_step} to {batches.total_steps} of {config.train.images_per_step} images "
        f"({batches.steps_per_epoch} steps an epoch, "
        f"{batches.dropped_per_epoch} images of each epoch left over), {ranks} x {device.type}, "
        f"{config.train.precision}, "
        f"ZeRO-{config.train.zero_stage}, {optimizer}",
        flush=True,
    )


def run_command(arguments: list[str], prog: str) -> None:
    """Parse a command line and train."""
    base, source, rest = base_config(arguments)
    command = parse(
        TrainCommand, rest, prog, f"{TrainCommand.__doc__} This command line starts from {source}.", config=base
    )
    # Two views a step: the baseline that sees as many tokens as ST-AR
    if command.plain and given(rest, "--method.views"):
        command = dataclasses.replace(command, config=plain(command.config, command.config.method.views))
    import torch.distributed as dist

    try:
        train(command)
    except UserError as error:
        if not dist.is_initialized() and os.environ.get("LOCAL_RANK", "0") != "0":
            error.of_one_rank = False  # before the ranks have met all of a machine see the same
        raise
    except RuntimeError as error:
        if not dist.is_initialized() or dist.get_world_size() == 1 or not _LOST_PEER.search(str(error)):
            raise
        raise UserError(
            "the connection to another rank is lost: see what that rank said last; start again with --resume to "
            "go on from the newest "
            "checkpoint"
        ) from error


def main() -> int:
    """The command line; returns the exit status (see guard.guarded)."""
    settle_threads()
    return guarded(lambda: run_command(command_line(), "train.py"))


class _Callable(ModuleType):
    """`star_fast.train(config)`: the package's attribute of that name is this module, whoever imported it first, so the
    module can be called.
    """

    def __call__(
        self,
        config: RunConfig,
        run: str | Path = "runs/run",
        *,
        init: str | Path = "",
        init_weights: str = "",
        init_class_names: str = "",
        resume: bool = False,
        plain: bool = False,
    ) -> Path:
        """Train in this process, as `python star_fast/train.py` does, and export the model.

        Many GPUs: start the script that calls this under a launcher (`deepspeed`, `torchrun`), one process a GPU, and
        let it end by `star_fast.training.ranks.end(0)`, or a launcher may take a rank that is done for one that failed.

        Args:
            config: see `star_fast.run_config`; its data.codes names the code store that `star-fast prepare` made.
            run: the run's folder: config, metrics, checkpoints, and model/, which `star_fast.load` reads.
            init: start student and teacher from these weights: a model folder, or a LlamaGen file.
            init_weights: of a model folder "student" or "teacher"; of a LlamaGen file "model", "ema" ...; "": the
                student, or the file's first.
            init_class_names: names of init's classes: a file with one a line, or "imagenet".
            resume: go on from the run's newest checkpoint.
            plain: LlamaGen's own training, the baseline: no teacher, mask or contrast.

        Returns:
            The run's folder.

        Raises:
            UserError: the job cannot start or go on; one line that says why and what to do.
        """
        if not isinstance(config, RunConfig):
            raise UserError(
                f"train: expected a RunConfig, as star_fast.run_config('tiny') gives, got {type(config).__name__}"
            )
        train(
            TrainCommand(
                config=config,
                run=str(run),
                init=str(init),
                init_weights=init_weights,
                init_class_names=init_class_names,
                resume=resume,
                plain=plain,
            )
        )
        return Path(run)


if __name__ == "__main__":
    status = main()
    if joined := sys.modules.get("star_fast.training.ranks"):  # absent: it ended before torch was loaded
        joined.end(status)
    sys.exit(status)
sys.modules[__name__].__class__ = _Callable

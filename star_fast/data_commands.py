"""`star-fast prepare` and `star-fast data`: images to code stores, and what there is to see of one. Wiring only."""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from star_fast.config import ConfigError, DataConfig, TokenizerConfig
from star_fast.config_file import given, parse
from star_fast.errors import UserError, printable
from star_fast.presets import FOLDER_TOKENIZER, preset
from star_fast.records import require


@dataclass(frozen=True)
class PrepareCommand:
    """Turn images into a code store: views, tokenizer (trained on the images when none is given), codes. Any number of
    ranks, as torchrun starts them.
    """

    # "digits" (built in); a folder with a subfolder a class; tar shards; a data set that `datasets` saved to disk
    source: tyro.conf.Positional[str]
    out: str = ""  # the code store's folder; empty: data/NAME
    labels: str = ""  # a list of image,class lines for a folder without class subfolders
    class_names: str = ""  # a file that names the classes ("n01440764 tench, ..." or one name a line), or "imagenet"
    # held-out images from elsewhere, with the same classes, instead of a share (ImageNet's validation images)
    held_out_source: str = ""
    held_out_labels: str = ""  # a list of labels for a folder of held-out images without class subfolders
    tokenizer: str = ""  # a tokenizer folder of ours or LlamaGen's vq_ds16_c2i.pt; empty: train one
    fine_tune: str = ""  # train from the weights of such a tokenizer
    # pixels a side of the views; 0: a tokenizer folder's own, 256 for LlamaGen's files, --new-tokenizer.image-size for
    # a new one
    image_size: int = 0
    # of encoding; bf16 is faster and changes some codes: the share is measured, and noted in the store
    precision: Literal["fp32", "bf16"] = "fp32"

    data: DataConfig = field(default_factory=DataConfig)
    train_tokenizer: Annotated[TokenizerConfig, tyro.conf.arg(name="new-tokenizer")] = field(
        default_factory=TokenizerConfig
    )

    seed: int = 0  # of views and of the tokenizer's training
    batch_views: int = 64  # views encoded at once
    workers: int = 0  # threads of each rank that decode and crop; 0: its share of this machine's processors
    device: str = ""  # to encode and train on: cpu, cuda, cuda:1 ...; empty: this rank's GPU if there is one

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2^63 - 1")
        for name, least, most in (("image_size", 0, 2**14), ("batch_views", 1, 2**20), ("workers", 0, 2**10)):
            require(least <= getattr(self, name) <= most, name, getattr(self, name), f"{least} ... {most}")


def prepare(arguments: list[str]) -> None:
    """star-fast prepare SOURCE ..."""
    from star_fast.data.sources import BUILT_IN

    tiny = preset("tiny")
    # "digits" is the source unless it is an option's value: --out digits.
    built_in = any(
        word == BUILT_IN and ("=" in before or not before.startswith("--"))
        for before, word in zip(["", *arguments], arguments, strict=False)
    )
    usual = tiny.tokenizer if built_in else FOLDER_TOKENIZER
    defaults: dict[str, Any] = {"train_tokenizer": usual, **({"data": tiny.data} if built_in else {})}
    try:
        command = parse(
            PrepareCommand,
            arguments,
            "star-fast prepare",
            PrepareCommand.__doc__ or "",
            source=tyro.MISSING,
            **defaults,
        )
        if command.held_out_source:
            if given(arguments, "--data.held-out-share") and command.data.held_out_share:
                raise ConfigError(
                    "--data.held-out-share: has no effect with --held-out-source, whose images are the held-out "
                    "ones; leave one of the two out"
                )
            command = dataclasses.replace(command, data=dataclasses.replace(command.data, held_out_share=0.0))
        _prepare(command, usual)
    except ConfigError as error:
        raise ConfigError(_as_typed(str(error))) from error
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"{f'{interrupt}; ' if str(interrupt) else ''}the same command goes on where it stopped"
        ) from interrupt


def _prepare(command: PrepareCommand, usual: TokenizerConfig) -> None:
    from star_fast.data.origin import Origin, write_origin
    from star_fast.data.prepare import prepare as write_store
    from star_fast.data.prepare import skipped_report, writing
    from star_fast.data.view_reading import processors_of_this_rank
    from star_fast.generation.device import rank_and_ranks, take_device

    rank, ranks = rank_and_ranks()
    device = take_device(command.device)
    origin = Origin(command.source, command.labels, command.held_out_source, command.held_out_labels)
    source = origin.open(command.class_names, progress=rank == 0)
    name = Path(command.source).name
    out = Path(command.out or Path("data") / (name if name not in ("", "..") else Path(command.source).resolve().name))
    workers = command.workers or processors_of_this_rank()
    with writing(out, rank), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what cannot be read is listed at the end
        tokenizer = _tokenizer(command, usual, source, out, device, rank, ranks)
        store = write_store(
            source,
            out,
            tokenizer.to(device),
            command.data,
            seed=command.seed,
            precision=command.precision,
            batch_views=command.batch_views,
            workers=workers,
            rank=rank,
            ranks=ranks,
            progress=rank == 0,
        )
        if rank == 0:
            write_origin(store, origin)
    if rank:
        return
    if skipped := skipped_report(store):
        print(skipped, file=sys.stderr)
    print(printable(_in_short(store)))


def _tokenizer(
    command: PrepareCommand, usual: TokenizerConfig, source: Any, out: Path, device: Any, rank: int, ranks: int
) -> Any:
    """The tokenizer to encode with. One process trains and keeps it; of several ranks all must find it there."""
    from star_fast.model.llamagen import load_tokenizer
    from star_fast.model.tokenizer import CONFIG_FILE, at_size
    from star_fast.training.tokenizer import TOKENIZER_FOLDER, tokenizer_for

    config, kept = command.train_tokenizer, out / TOKENIZER_FOLDER
    asked = config != usual
    if command.tokenizer and asked:
        raise ConfigError("--new-tokenizer: has no effect with --tokenizer, which gives one; leave one of the two out")
    if command.image_size and not command.tokenizer:
        if config.image_size not in (usual.image_size, command.image_size):
            raise ConfigError(
                f"--image-size: {command.image_size} contradicts --new-tokenizer.image-size {config.image_size}; "
                "leave one of the two out"
            )
        config = dataclasses.replace(config, image_size=command.image_size)
    if ranks > 1 and not command.tokenizer and not (kept / CONFIG_FILE).exists():
        raise UserError(
            f"{kept}: several ranks encode with a tokenizer that is there; give --tokenizer, or run the command "
            "once without the launcher, "
            "which trains one"
        )
    if rank:
        return at_size(load_tokenizer(command.tokenizer or kept), command.image_size)
    return tokenizer_for(
        source,
        out,
        config,
        command.data,
        given=command.tokenizer,
        asked=asked or bool(command.image_size and not command.tokenizer),
        seed=command.seed,
        device=device,
        fine_tune=command.fine_tune,
        defaults=usual,
        image_size=command.image_size,
    )


def _in_short(store: Any) -> str:
    """One line about a store."""
    left_out = f", {count} skipped (skipped.csv)" if (count := len(store.manifest["skipped"])) else ""
    rounded = (
        f", bf16: {100 * store.manifest['bf16']['codes_that_differ']:.2f} % of the codes differ from float32's"
        if "bf16" in store.manifest
        else ""
    )
    return (
        f"{store.path}: codes of {len(store)} images x {len(store.views)} views, {store.positions} a view, "
        f"{len(store.class_names)} classes, "
        f"{len(store.held_out_indices)} images held out{left_out}{rounded}"
    )


def _as_typed(message: str) -> str:
    """A message about a setting of `star-fast prepare`, under the name of its option."""
    sections = {"tokenizer": "--new-tokenizer", "data": "--data"}
    message = re.sub(
        r"^(tokenizer|data)\.(\w+)", lambda found: f"{sections[found[1]]}.{found[2].replace('_', '-')}", message
    )
    return re.sub(
        r"^(tokenizer|fine_tune|image_size|batch_views|precision|workers|seed|device):",
        lambda found: f"--{found[1].replace('_', '-')}:",
        message,
    )


@dataclass(frozen=True)
class InfoCommand:
    """What a code store holds, and how it was made."""

    store: tyro.conf.Positional[str]  # the code store's folder


def info(arguments: list[str]) -> None:
    """star-fast data info STORE."""
    from star_fast.data.codes import CodeStore
    from star_fast.data.info import describe

    command = parse(InfoCommand, arguments, "star-fast data info", InfoCommand.__doc__ or "", store=tyro.MISSING)
    for line in describe(CodeStore.open(command.store)):
        print(printable(line))


@dataclass(frozen=True)
class VerifyCommand:
    """Read a code store whole: every file must be the one that was written, every code one of the codebook's."""

    store: tyro.conf.Positional[str]  # the code store's folder


def verify(arguments: list[str]) -> None:
    """star-fast data verify STORE."""
    from star_fast.data.codes import CodeStore

    store = CodeStore.open(
        parse(VerifyCommand, arguments, "star-fast data verify", VerifyCommand.__doc__ or "", store=tyro.MISSING).store
    )
    store.verify(progress=True)
    print(
        printable(
            f"{store.path}: whole; {len(store)} images and {len(store.manifest['skipped'])} skipped ones, every "
            "checksum and every code right"
        )
    )


@dataclass(frozen=True)
class ShowCommand:
    """Draw codes back into pictures, beside the images that they were made of."""

    store: tyro.conf.Positional[str]  # the code store's folder
    out: str = ""  # the picture, a PNG; empty: show.png in the store's folder
    rows: tuple[int, ...] = ()  # which images, by their rows in the store; empty: 8, evenly spaced
    # which views, by name (see `star-fast data info`); empty: the plain one and one mirrored or moved
    views: tuple[str, ...] = ()
    source: str = ""  # the images, if they are no longer where `star-fast prepare` found them
    tokenizer: str = ""  # the tokenizer that made the codes; empty: the one kept in the store
    device: str = ""  # cpu, cuda ...; empty: a GPU where there is one


def show(arguments: list[str]) -> None:
    """star-fast data show STORE ..."""
    from star_fast.data.codes import CodeStore
    from star_fast.data.origin import images_of
    from star_fast.evaluation.store_pictures import draw_store
    from star_fast.generation.device import take_device
    from star_fast.generation.grid import save_png
    from star_fast.model.llamagen import load_tokenizer
    from star_fast.model.tokenizer import at_size

    command = parse(ShowCommand, arguments, "star-fast data show", ShowCommand.__doc__ or "", store=tyro.MISSING)
    store, device = CodeStore.open(command.store), take_device(command.device)
    tokenizer = at_size(load_tokenizer(command.tokenizer or store.path / "tokenizer"), store.image_size)
    store.require_tokenizer(tokenizer.weights_hash())
    source = images_of(store, command.source)
    picture, told = draw_store(store, tokenizer.to(device), source, command.rows, command.views)
    out = Path(command.out or store.path / "show.png")
    save_png(picture, out)
    print(
        printable(
            f"{out}: {told}" + ("" if source is not None else "; the images themselves are not known: give --source")
        )
    )


@dataclass(frozen=True)
class ImportCommand:
    """LlamaGen's pre-extracted codes (imagenet256_codes/0.npy ...) to a code store."""

    root: tyro.conf.Positional[str]  # the folder that holds imagenet256_codes and imagenet256_labels
    out: str  # the code store's folder
    tokenizer: str  # the tokenizer that made the codes, LlamaGen's vq_ds16_c2i.pt; a copy is kept in the store
    # the folder with the codes at crop range 1.05; empty: NAME_105 beside a NAME that ends in ten_crop, if it is there;
    # "none": none
    sibling: str = ""
    image_size: int = 256  # pixels: imagenet384_codes ... at 384
    class_names: str = ""  # a file with one name a line, or "imagenet"
    held_out_share: float = 0.0  # share of each class held out


def import_codes(arguments: list[str]) -> None:
    """star-fast data import ROOT --out STORE --tokenizer FILE."""
    from star_fast.data.llamagen_codes import import_llamagen_codes, sibling_of
    from star_fast.model.class_names import read_class_names
    from star_fast.model.llamagen import load_tokenizer
    from star_fast.model.tokenizer import at_size
    from star_fast.training.tokenizer import TOKENIZER_FOLDER

    command = parse(
        ImportCommand,
        arguments,
        "star-fast data import",
        ImportCommand.__doc__ or "",
        root=tyro.MISSING,
        out=tyro.MISSING,
        tokenizer=tyro.MISSING,
    )
    tokenizer = at_size(load_tokenizer(command.tokenizer), command.image_size)
    names = read_class_names(command.class_names) if command.class_names else None
    sibling = None if command.sibling == "none" else command.sibling or sibling_of(command.root)
    if sibling is not None:
        print(printable(f"With the codes at range 1.05 of {sibling}"))
    store = import_llamagen_codes(
        command.root,
        command.out,
        tokenizer.weights_hash(),
        sibling=sibling,
        codebook=tokenizer.config.codebook,
        image_size=command.image_size,
        image_channels=tokenizer.config.image_channels,
        class_names=tuple(names) if names is not None else None,
        held_out_share=command.held_out_share,
    )
    tokenizer.save(store.path / TOKENIZER_FOLDER)
    print(printable(_in_short(store)))


@dataclass(frozen=True)
class ExportCommand:
    """A code store to the files that LlamaGen's training reads, one .npy an image."""

    store: tyro.conf.Positional[str]  # the code store's folder
    out: str  # the folder that gets imagenet256_codes and imagenet256_labels; a second crop range goes to OUT_105


def export_codes(arguments: list[str]) -> None:
    """star-fast data export STORE --out ROOT."""
    from star_fast.data.codes import CodeStore
    from star_fast.data.llamagen_codes import export_llamagen_codes

    command = parse(
        ExportCommand,
        arguments,
        "star-fast data export",
        ExportCommand.__doc__ or "",
        store=tyro.MISSING,
        out=tyro.MISSING,
    )
    store = CodeStore.open(command.store)
    for root in export_llamagen_codes(store, command.out):
        print(printable(f"{root}: codes and labels of {len(store)} images"))


DATA_COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "info": (info, "what a code store holds, and how it was made"),
    "verify": (verify, "read it whole and check every byte"),
    "show": (show, "its codes as pictures, beside the images"),
    "import": (import_codes, "LlamaGen's .npy codes -> code store"),
    "export": (export_codes, "code store -> LlamaGen's .npy codes"),
}


def data(arguments: list[str]) -> None:
    """star-fast data COMMAND ..."""
    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: star-fast data COMMAND [options]\n")
        print("\n".join(f"  {name:7} {about}" for name, (_, about) in DATA_COMMANDS.items()))
        return
    if not arguments or arguments[0] not in DATA_COMMANDS:
        raise UserError(
            f"data: expected one of {', '.join(DATA_COMMANDS)}, got {repr(arguments[0]) if arguments else 'nothing'}"
        )
    DATA_COMMANDS[arguments[0]][0](arguments[1:])

"""`star-fast figure6`: what two models draw from the same seeds without guidance, one row above the other for each
class (the paper's Figure 6).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from star_fast.errors import UserError
from star_fast.evaluation.limits import MOST_SEED, explain_out_of_memory, option, require_ranges
from star_fast.evaluation.runs import only_result, spread
from star_fast.evaluation.samples import SampleSet, draw_samples
from star_fast.generation.device import take_device
from star_fast.generation.fonts import write_with
from star_fast.generation.grid import save_png
from star_fast.generation.label_plan import find_classes
from star_fast.generation.sampling import Sampling
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.weights import CONFIG_FILE, LoadedModel, load_model
from star_fast.records import require
from star_fast.storage import atomic_write_json

_CLASSES = 8  # if none are named
_MOST_IMAGES = 4096
_LEAST_TILE, _GAP, _LINE = 56, 3, 22  # pixels
_INK, _FAINT, _PAPER = (20, 20, 20), (90, 96, 104), (255, 255, 255)


@dataclass(frozen=True)
class Figure6Config:
    """Write figure6.png and figure6.json: samples of two models from the same seeds without guidance, the baseline's
    row above the other's for each class.
    """

    run: str  # the run with ST-AR: a run folder or a model folder
    against: str  # the baseline: the same, or a LlamaGen file
    weights: Literal["student", "teacher"] = "student"  # of the run with ST-AR; the baseline has the student's only
    classes: tuple[str, ...] = ()  # names or numbers; empty: 8, evenly spaced
    per_class: int = 8  # images of each class and model
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # tokens kept; 0: all
    top_p: float = 1.0  # share of the probability kept; 1: all
    seed: int = 0  # image i of both models is drawn from random stream i of this seed
    tokenizer: str = ""  # of a baseline that comes without one; empty: the other run's
    out: str = ""  # folder that is written to; empty: the run's own; a model folder has no place for it
    batch_images: int = 64  # images drawn together
    device: str = ""  # "cpu", "cuda"; empty: a GPU where there is one

    def __post_init__(self) -> None:
        require_ranges(self, {"per_class": (1, 100), "batch_images": (1, 2**16), "seed": (0, MOST_SEED)})
        for name in ("run", "against", "out"):
            require("\0" not in getattr(self, name), option(name), getattr(self, name), "the name of a folder")
        try:
            Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)
        except ValueError as error:
            name, _, rest = str(error).removeprefix("generate: ").partition(" ")
            raise UserError(f"{option(name)} {rest}") from error


def run_figure6(config: Figure6Config) -> str:
    """Draw both and write the picture and its record; returns a line that says what it shows.

    Raises:
        UserError: there is no place to write to, the two models do not know the same classes, or there is no tokenizer.
    """
    device, out = take_device(config.device), _place(config)
    ours, baseline = load_model(config.run, weights=config.weights), load_model(config.against)
    numbers = [str(label) for label in range(len(ours.class_names))]
    if baseline.class_names not in (ours.class_names, numbers):
        raise UserError(
            f"{option('against')}: expected a model of the classes of {config.run} ({len(ours.class_names)}: "
            f"{ours.class_names[0]} ...), got "
            f"{len(baseline.class_names)}: {baseline.class_names[0]} ..."
        )
    classes = (
        find_classes(config.classes, ours.class_names)
        if config.classes
        else spread(torch.arange(len(ours.class_names)), _CLASSES).tolist()
    )
    require(
        len(classes) * config.per_class <= _MOST_IMAGES,
        option("per_class"),
        config.per_class,
        f"at most {_MOST_IMAGES} images of each model",
    )
    own = ours.tokenizer_folder
    drawn = {
        "baseline": (baseline, config.tokenizer or baseline.tokenizer_folder or own),
        "run": (ours, own or config.tokenizer),
    }
    sampling = {
        "guidance": 1.0,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "seed": config.seed,
    }
    names, sets = _names(config), {}
    told = (
        f"no guidance, temperature {config.temperature:g}, seed {config.seed}"
        + (f", top-k {config.top_k}" if config.top_k else "")
        + (f", top-p {config.top_p:g}" if config.top_p < 1 else "")
    )
    with (
        only_result(out / "figure6.png", "drawing figure 6", ("figure6.png", "figure6.json")),
        explain_out_of_memory("give a smaller --batch-images"),
    ):
        for name, (loaded, where) in drawn.items():
            tokenizer = load_tokenizer(_known(where, config))
            if tokenizer.config.codebook != loaded.transformer.config.vocab:
                raise UserError(
                    f"{where}: this tokenizer has {tokenizer.config.codebook} codes, the model "
                    f"{loaded.transformer.config.vocab}; give the one "
                    "that the baseline was trained with: --tokenizer"
                )
            sets[name] = draw_samples(
                loaded.transformer.to(device).eval(),
                tokenizer,
                classes,
                config.per_class,
                batch_images=config.batch_images,
                **sampling,
            )
        save_png(
            draw_pairs(
                sets["baseline"], sets["run"], [ours.class_names[label] for label in classes], classes, names, told
            ),
            out / "figure6.png",
        )
        atomic_write_json(
            out / "figure6.json",
            {
                "classes": [ours.class_names[label] for label in classes],
                "per_class": config.per_class,
                "sampling": sampling,
                "models": {
                    name: _about(loaded, folder)
                    for name, (loaded, _), folder in zip(
                        drawn, drawn.values(), (config.against, config.run), strict=True
                    )
                },
            },
        )
    return (
        f"{out / 'figure6.png'}: {len(classes)} classes, {config.per_class} images each; above {names[0]}, below "
        f"{names[1]}; {told}"
    )


def draw_pairs(
    above: SampleSet,
    below: SampleSet,
    class_names: Sequence[str],
    classes: Sequence[int],
    names: tuple[str, str],
    told: str,
) -> Image.Image:
    """For each class a row of `above` and, close beneath, one of `below`; in front the class, then which row is whose.

    Images of another size than `above`'s are brought to it.
    """
    height, width = above.images.shape[-2:]
    factor = max(1, -(-_LEAST_TILE // height))
    tile = (width * factor, height * factor)
    size = max(11, min(20, tile[1] // 5))
    heads, whose = write_with(class_names, size=size), write_with(names, size=max(10, size - 3), longest=18)
    titles = write_with(
        [f"Above: {names[0]}, below: {names[1]}", f"The same random numbers in each column; {told}"],
        size=13,
        longest=300,
    )
    class_width = max(int(font.getlength(text)) for text, font in heads) + 4 * _GAP
    margin = class_width + max(int(font.getlength(text)) for text, font in whose) + 4 * _GAP
    columns = max(len(above.of_class(label)) for label in classes)
    pair = 2 * tile[1] + _GAP
    wide = max(margin + columns * (tile[0] + _GAP), *(int(font.getlength(text)) + 4 * _GAP for text, font in titles))
    picture = Image.new("RGB", (wide, 2 * _LINE + len(classes) * (pair + 4 * _GAP)), _PAPER)
    draw = ImageDraw.Draw(picture)
    for line, (text, font) in enumerate(titles):
        draw.text((2 * _GAP, _LINE // 2 + line * (_LINE - 4)), text, _INK, font, anchor="lm")
    for line, (label, (head, font)) in enumerate(zip(classes, heads, strict=True)):
        top = 2 * _LINE + line * (pair + 4 * _GAP)
        draw.text((class_width - 2 * _GAP, top + pair // 2), head, _INK, font, anchor="rm")
        for row, (samples, (text, small)) in enumerate(zip((above, below), whose, strict=True)):
            place = top + row * (tile[1] + _GAP)
            draw.text((margin - 2 * _GAP, place + tile[1] // 2), text, _FAINT, small, anchor="rm")
            for column, image in enumerate(samples.of_class(label)):
                picture.paste(_as_tile(image, tile), (margin + column * (tile[0] + _GAP), place))
    return picture


def _as_tile(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """(C, H, W) uint8 at the size that it is shown in."""
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    whole = size[0] % pixels.shape[1] == 0
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC)


def _place(config: Figure6Config) -> Path:
    """The folder to write to. A model folder holds a model's files alone: with others in it no model is saved there any
    more.
    """
    if not config.out and (os.path.isfile(config.run) or os.path.exists(Path(config.run) / CONFIG_FILE)):
        raise UserError(f"{option('out')}: missing: {config.run} is no run folder; give a folder to write to")
    return Path(config.out or config.run)


def _names(config: Figure6Config) -> tuple[str, str]:
    """What the rows are called: the folders' names, or all of them where these are alike."""
    above, below = (Path(name).absolute() for name in (config.against, config.run))
    return (above.name, below.name) if above.name != below.name else (str(above), str(below))


def _known(where: str | Path | None, config: Figure6Config) -> str | Path:
    if where is None or where == "":
        raise UserError(f"{config.run}: comes without a tokenizer; give --tokenizer FOLDER or FILE")
    return where


def _about(loaded: LoadedModel, folder: str) -> dict[str, Any]:
    return {
        "from": folder,
        "weights_sha256": loaded.weights_sha256,
        "step": loaded.record.get("step"),
        "images_seen": loaded.record.get("images_seen"),
    }

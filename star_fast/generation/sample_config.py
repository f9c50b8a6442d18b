"""What `star-fast sample` is asked for: the settings of a sampling job, checked where they are given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from star_fast.errors import UserError
from star_fast.generation.label_plan import Plan
from star_fast.generation.products import Products
from star_fast.generation.sampling import Sampling

# What fits a file or a counter
_MOST = {"images": 2**53, "batch_images": 2**31, "grid_rows": 2**31, "grid_columns": 2**31, "pixels": 2**20}
_MOST_NAME_BYTES = 230  # of 255, for names that are longer by .json, .parts, or .PID.tmp


@dataclass(frozen=True)
class SampleConfig:
    """Draw images from a trained model into one .npz with a protocol record, and a labelled grid picture. A killed job
    goes on when started again.
    """

    # a model folder, a run folder, or a LlamaGen file; empty: runs/digits/model, which the quickstart makes
    model: str = ""
    # the images: arr_0 uint8 (N, H, W, 3), arr_1 labels; beside it NAME.json (protocol) and NAME.png (grid)
    out: str = "samples.npz"
    tokenizer: str = ""  # tokenizer folder or LlamaGen tokenizer file; empty: the model's own
    weights: Literal["student", "teacher"] = "student"  # which weights of the model folder
    images: int = 100  # how many
    classes: tuple[str, ...] = ()  # names or numbers; empty: all
    # of a model whose classes are only numbers, as in released files: a file with one name a line, or imagenet
    class_names: str = ""
    labels: Plan = "balanced"  # balanced: the classes in turn; random: each image's class drawn uniformly (LlamaGen)
    guidance: float = 2.0  # scale of classifier-free guidance; 1 switches it off
    cfg_interval: int = -1  # n >= 0: only image tokens 0 ... n+1 are guided; -1: all
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # tokens kept; 0: all
    top_p: float = 1.0  # share of the probability kept; 1: all
    seed: int = 0  # of the images' random streams and of random labels
    batch_images: int = 64  # images drawn together; another number may change a few codes, see exact
    # the same bytes for any batch_images, at a cost that is printed: float32, fixed blocks of 8 images
    exact: bool = False
    # of the transformer; auto: bf16 where the device multiplies it, else fp32. fp32: pixels too (CPU)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # CPU: how matrix products run; int8 takes half the time of bf16, and rounds weights and inputs to 8 bits
    products: Products = "auto"
    # of keys and values: the model's precision, or 8 bits and a scale a row
    cache: Literal["model", "int8", "fp8"] = "model"
    # side of the images written; 0: as the tokenizer makes them; else bicubic (LlamaGen scores 384 px models at 256)
    pixels: int = 0
    grid: bool = True  # also draw NAME.png
    grid_rows: int = 20  # classes in the grid
    grid_columns: int = 10  # images of each class in the grid
    png_folder: bool = False  # also write every image as NAME/000000.png
    device: str = ""  # cpu, cuda, cuda:1 ...; empty: this rank's GPU if there is one

    def __post_init__(self) -> None:
        for name in ("images", "batch_images", "grid_rows", "grid_columns"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.pixels < 0:
            raise UserError(
                f"pixels: expected 0 (as the tokenizer makes them) or a number of pixels, got {self.pixels}"
            )
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise UserError(f"{name}: expected at most {most}, got {getattr(self, name)!r:.80}")
        if Path(self.out).suffix != ".npz" or "\0" in self.out:
            raise UserError(f"out: expected a name that ends in .npz, got {self.out[-80:]!r}")
        if (size := len(os.fsencode(Path(self.out).name))) > _MOST_NAME_BYTES:
            raise UserError(f"out: expected a file name of at most {_MOST_NAME_BYTES} bytes, got one of {size}")
        if self.exact and (self.precision == "bf16" or self.products not in ("auto", "plain") or self.cache != "model"):
            raise UserError(
                "exact: needs precision fp32 (or auto), products plain (or auto) and cache model, since rounding "
                "must not depend on the batch; "
                f"got {self.precision}, {self.products}, {self.cache}"
            )
        try:
            self.sampling()
        except ValueError as error:
            raise UserError(str(error).removeprefix("generate: ")) from error

    def sampling(self) -> Sampling:
        """The numbers that turn logits into tokens."""
        return Sampling(self.guidance, self.cfg_interval, self.temperature, self.top_k, self.top_p, self.seed)

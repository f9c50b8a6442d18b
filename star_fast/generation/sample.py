"""Many images: a model folder in; one .npz, a grid picture and a protocol record out. Any number of ranks, any number of kills.

Images are dealt to ranks in whole batches: batch j holds images j * batch_images ..., rank j mod ranks draws it. A finished batch becomes a file in
`<out>.parts/`; rank 0 appends these, in order, to the unfinished .npz in the same folder and removes them. So at any moment every batch is in one of
two places or not drawn at all, and a rerun, on any number of ranks, draws what is in neither.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from star_fast.errors import UserError
from star_fast.generation.batch import EXACT_IMAGES, Drawer
from star_fast.generation.grid import draw_grid, save_png
from star_fast.generation.label_plan import Plan, find_classes, plan_labels
from star_fast.generation.npz_stream import NpzStream, images_on_disk, map_images
from star_fast.generation.products import Products
from star_fast.generation.render import Rendering
from star_fast.generation.sampling import Sampling
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.weights import LoadedModel, load_model
from star_fast.storage import atomic_write_json, atomic_writer, read_json

PLAN_FILE = "plan.json"
LABELS_MEMBER = "arr_1"  # the name under which ADM's own samplers store labels
_POLL_S = 0.05
_DECIDING = ("weights", "images", "labels", "guidance", "cfg_interval", "temperature", "top_k", "top_p", "seed", "batch_images", "exact", "pixels")
_PATIENCE_S = 3600  # rank 0 gives up when no other rank has delivered a batch for so long


@dataclass(frozen=True)
class SampleConfig:
    """Draw images from a trained model into one .npz with a protocol record, and a labelled grid picture. A killed job goes on when started again."""

    model: str = "runs/tiny/model"  # a model folder, a run folder, or a LlamaGen file
    out: str = "samples.npz"  # the images: arr_0 uint8 (N, H, W, 3), arr_1 labels; beside it NAME.json (protocol) and NAME.png (grid)
    tokenizer: str = ""  # tokenizer folder or LlamaGen tokenizer file; empty: the model's own
    weights: Literal["student", "teacher"] = "student"  # which weights of the model folder
    images: int = 100  # how many
    classes: tuple[str, ...] = ()  # names or numbers; empty: all
    labels: Plan = "balanced"  # balanced: the classes in turn; random: each image's class drawn uniformly (LlamaGen)
    guidance: float = 2.0  # scale of classifier-free guidance; 1 switches it off
    cfg_interval: int = -1  # n >= 0: only image tokens 0 ... n+1 are guided; -1: all
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # tokens kept; 0: all
    top_p: float = 1.0  # share of the probability kept; 1: all
    seed: int = 0  # of the images' random streams and of random labels
    batch_images: int = 64  # images drawn together; another number may change a few codes, see exact
    exact: bool = False  # the same bytes for any batch_images, at a cost that is printed: float32, fixed blocks of 8 images
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the transformer; auto: bf16 where the device multiplies it natively, else fp32
    products: Products = "auto"  # CPU: how matrix products run; int8 is fastest and rounds most
    cache: Literal["model", "int8", "fp8"] = "model"  # of keys and values: the model's precision, or 8 bits and a scale a row
    pixels: int = 0  # side of the images written; 0: as the tokenizer makes them; else bicubic (LlamaGen scores 384 px models at 256)
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
            raise UserError(f"pixels: expected 0 (as the tokenizer makes them) or a number of pixels, got {self.pixels}")
        if Path(self.out).suffix != ".npz":
            raise UserError(f"out: expected a name that ends in .npz, got {self.out!r}")
        if self.exact and (self.precision == "bf16" or self.products not in ("auto", "plain") or self.cache != "model"):
            raise UserError("exact: needs precision fp32 (or auto), products plain (or auto) and cache model, since rounding must not depend on the batch; "
                            f"got {self.precision}, {self.products}, {self.cache}")
        try:
            self.sampling()
        except ValueError as error:
            raise UserError(str(error).removeprefix("generate: ")) from error

    def sampling(self) -> Sampling:
        """The numbers that turn logits into tokens."""
        return Sampling(self.guidance, self.cfg_interval, self.temperature, self.top_k, self.top_p, self.seed)


class SampleResult(NamedTuple):
    """Where things are."""

    npz: Path
    record: Path
    grid: Path | None
    drawn: int  # images that this call drew on this rank; fewer than asked for when it went on from an interrupted one, or with several ranks


def sample_images(config: SampleConfig) -> SampleResult:
    """Draw the images that `config` describes and that are not drawn yet. Every rank calls it (RANK, WORLD_SIZE, LOCAL_RANK as torchrun sets them).

    Returns when all images are in the file (rank 0) or this rank's batches are delivered (others).

    Raises:
        UserError, StorageError: the job cannot start or go on; one line that says why and what to do.
    """
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    loaded = load_model(config.model, weights=config.weights)
    tokenizer = _tokenizer_for(config, loaded)
    device = _device(config.device)
    classes = find_classes(config.classes, loaded.class_names)
    labels = plan_labels(config.images, classes, config.labels, config.seed)
    drawer = Drawer(config, loaded.transformer, tokenizer, labels, device)
    job = _Job(config, drawer, _plan(config, loaded, tokenizer, drawer, classes))
    drawn = 0
    if not job.complete():
        drawn = job.run(rank, ranks, labels)
    grid = Path(config.out).with_suffix(".png") if config.grid else None
    if rank == 0 and grid is not None and not (drawn == 0 and grid.exists()):
        save_png(draw_grid(map_images(config.out), labels, loaded.class_names, rows=config.grid_rows, columns=config.grid_columns), grid)
    return SampleResult(job.out, job.record, grid, drawn)


class _Job:
    """The files of one sampling job and the order in which they come and go."""

    def __init__(self, config: SampleConfig, drawer: Drawer, plan: dict[str, Any]) -> None:
        self.config, self.drawer, self.plan = config, drawer, plan
        self.out = Path(config.out)
        self.record = self.out.with_suffix(".json")
        self.parts = self.out.with_name(self.out.name + ".parts")
        self.unfinished = self.parts / "unfinished.npz"
        self.batches = -(-config.images // config.batch_images)

    def complete(self) -> bool:
        """Whether this very job is done; a finished job with other settings under the same name is an error."""
        if not self.out.exists():
            return False
        if not self.record.exists():
            raise UserError(f"{self.out}: exists without its protocol record {self.record.name}; choose another --out or delete it")
        done = read_json(self.record, "a protocol record of an earlier sampling run").get("plan")
        self._require_same(done, self.record, "choose another --out or delete both files")
        return True

    def run(self, rank: int, ranks: int, labels: np.ndarray) -> int:
        """This rank's share, and for rank 0 the file; returns how many images were drawn here."""
        started, drawn = time.perf_counter(), 0
        self._claim()
        stream = NpzStream(self.unfinished, self.config.images, self.drawer.image_shape, self.config.batch_images) if rank == 0 else None
        exact_cost = None
        if rank == 0 and self.config.exact:
            exact_cost = round(self.drawer.exact_cost(), 2)
            print(f"exact mode: {self.drawer.images_in_batch} images in fixed blocks of {EXACT_IMAGES} takes {exact_cost} times as long as in one piece")
        progress = tqdm(total=self.config.images, initial=stream.written if stream else 0, desc="sampling", unit=" images", disable=rank != 0)
        # On CUDA a batch's pixels are still being computed while the next one's codes are drawn; on the CPU a batch is done when it returns.
        in_flight: deque[tuple[int, Rendering]] = deque()
        for number in [number for number in range(rank, self.batches, ranks) if not self._drawn(number)]:
            in_flight.append((number, self.drawer.start(*self._span(number))))
            if len(in_flight) > 1 or in_flight[0][1].done is None:
                drawn += self._deliver(*in_flight.popleft())
                self._collect(stream, progress)
        while in_flight:
            drawn += self._deliver(*in_flight.popleft())
        if stream is not None:
            self._collect_all(stream, progress)
            progress.close()
            self._finish(stream, labels, {"ranks": ranks, "drawn_here_images": drawn, "here_s": round(time.perf_counter() - started, 2),
                                          "exact_cost_ratio": exact_cost})
        return drawn

    def _claim(self) -> None:
        """Write the plan, or see that the parts that are there belong to the same one."""
        path = self.parts / PLAN_FILE
        if path.exists():
            self._require_same(read_json(path, f"delete {self.parts} to start again"), path, f"delete {self.parts} to start again, or choose another --out")
        else:
            atomic_write_json(path, self.plan)

    def _require_same(self, other: Any, path: Path, advice: str) -> None:
        other = other if isinstance(other, dict) else {}
        differing = [f"{name} {other.get(name)!r} there, {self.plan.get(name)!r} asked for"
                     for name in self.plan | other if self.plan.get(name) != other.get(name)]
        if differing:
            raise UserError(f"{path}: of another sampling job ({'; '.join(differing)}); {advice}")

    def _span(self, number: int) -> tuple[int, int]:
        """First image of a batch, and one past its last."""
        return number * self.config.batch_images, min((number + 1) * self.config.batch_images, self.config.images)

    def _part(self, number: int) -> Path:
        return self.parts / f"batch-{number:07d}.npy"

    def _drawn(self, number: int) -> bool:
        """Whether a batch need not be drawn. Looks in the order in which a batch moves, so that one on the move is not missed."""
        return (self._part(number).exists() or images_on_disk(self.unfinished, self.config.images, self.drawer.image_shape) >= self._span(number)[1]
                or self.out.exists())

    def _deliver(self, number: int, rendering: Rendering) -> int:
        """Wait for a batch's pixels and put them on the disk; the part file comes last and says that all is there."""
        images = rendering.wait().numpy()
        if self.config.png_folder:
            for index, image in zip(range(*self._span(number)), images, strict=True):
                save_png(image, self.out.with_suffix("") / f"{index:06d}.png")
        with atomic_writer(self._part(number)) as file:
            np.lib.format.write_array(file, images, allow_pickle=False)
        return len(images)

    def _collect(self, stream: NpzStream | None, progress: tqdm) -> bool:
        """Move the parts that come next into the file; whether there were any."""
        moved = False
        while stream is not None and stream.written < self.config.images and (part := self._part(stream.written // self.config.batch_images)).exists():
            images = np.load(part, mmap_mode="r")
            stream.append(images)
            part.unlink()
            progress.update(len(images))
            moved = True
        return moved

    def _collect_all(self, stream: NpzStream, progress: tqdm) -> None:
        """Collect until nothing is missing, waiting for other ranks."""
        last = time.monotonic()
        while stream.written < self.config.images:
            if self._collect(stream, progress):
                last = time.monotonic()
            elif time.monotonic() - last > _PATIENCE_S:
                raise UserError(f"{self.parts}: batch {stream.written // self.config.batch_images} has not come for {_PATIENCE_S} s; "
                                "if a rank died, start the job again: it goes on from here")
            else:
                time.sleep(_POLL_S)

    def _finish(self, stream: NpzStream, labels: np.ndarray, run: dict[str, Any]) -> None:
        """Record first, then the file's final name: where the file is, its record is."""
        run |= {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "python": platform.python_version(), "numpy": np.__version__,
                "threads": torch.get_num_threads(), "images_crc32": f"{stream.crc:08x}"}
        atomic_write_json(self.record, {"plan": self.plan, "run": run})
        stream.finish(self.out, **{LABELS_MEMBER: labels})
        shutil.rmtree(self.parts)


def _plan(config: SampleConfig, loaded: LoadedModel, tokenizer: VQTokenizer, drawer: Drawer, classes: list[int]) -> dict[str, Any]:
    """All that decides the bytes of the file: the protocol. Two jobs with equal plans are the same job."""
    told = asdict(config)
    return {name: told[name] for name in _DECIDING} | {
        "classes": classes if len(classes) < len(loaded.class_names) else "all", "num_classes": len(loaded.class_names),
        "weights_sha256": loaded.weights_sha256, "tokenizer_sha256": tokenizer.weights_hash(), "image_shape": list(drawer.image_shape),
        "precision": drawer.precision, "products": drawer.products, "cache": config.cache, "device": drawer.device.type, "torch": torch.__version__,
    }


def _tokenizer_for(config: SampleConfig, loaded: LoadedModel) -> VQTokenizer:
    """The tokenizer asked for, or the model's own; it must speak the model's codes."""
    where = config.tokenizer or loaded.tokenizer_folder
    if not where:
        raise UserError(f"{config.model}: comes without a tokenizer; give --tokenizer FOLDER or FILE")
    tokenizer = load_tokenizer(where)
    if tokenizer.config.codebook != loaded.transformer.config.vocab:
        raise UserError(f"{where}: this tokenizer has {tokenizer.config.codebook} codes, the model {loaded.transformer.config.vocab}; "
                        "give the one the model was trained with")
    return tokenizer


def _device(asked: str) -> torch.device:
    if asked:
        device = torch.device(asked)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device: {asked!r} was asked for, and torch finds no CUDA device; leave it empty to use the CPU")
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")

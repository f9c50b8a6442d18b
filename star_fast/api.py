"""What a notebook needs of star_fast: a model that draws, encodes and shows its features, and the settings of a run.
`import star_fast` offers it all.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from star_fast.config import RunConfig
from star_fast.data.encoding import Encoder
from star_fast.errors import UserError
from star_fast.generation.decoder import Decoder
from star_fast.generation.device import native_dtype, pick_device
from star_fast.generation.images import Images
from star_fast.generation.render import Renderer
from star_fast.generation.sampling import Sampling, is_int
from star_fast.inputs import Classes, Pictures, checked_codes, checked_counts, labels_of, pixels_of
from star_fast.model.class_names import names_for_model
from star_fast.model.hub import PREFIX, fetch, model_card
from star_fast.model.ieee import ieee_products
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import VQTokenizer
from star_fast.model.transformer import Transformer
from star_fast.model.weights import LoadedModel, Weights, load_model, save_model
from star_fast.presets import preset
from star_fast.records import from_dict, to_dict
from star_fast.storage import read_json

_ENCODED_TOGETHER = 16  # views


class ImageModel:
    """A trained model with its tokenizer: `star_fast.load` makes it.

    Attributes:
        transformer: model.transformer.Transformer, in eval mode on `device`; train it on, or read its weights, as of
            any nn.Module.
        tokenizer: model.tokenizer.VQTokenizer, or None where the model came without one.
        class_names: one a class, in order of label.
        record: what training noted: method, step, images_seen ... Empty for a LlamaGen file.
        device: torch.device of both.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: VQTokenizer | None,
        class_names: Sequence[str],
        device: torch.device,
        source: str = "",
    ) -> None:
        self.transformer: Transformer = loaded.transformer.to(device).eval()
        self.tokenizer = None if tokenizer is None else tokenizer.to(device).eval()
        self.class_names, self.record, self.weights_sha256 = list(class_names), loaded.record, loaded.weights_sha256
        self.device, self.source = device, source
        self._rounded = ""  # what the weights were before they were loaded in fewer bits unasked
        self._decoder: tuple[Any, Decoder] | None = None
        self._renderer: tuple[Any, Renderer] | None = None

    def __repr__(self) -> str:
        config, weight = self.transformer.config, self.transformer.output.weight
        names = ", ".join(self.class_names[:4]) + (" ..." if len(self.class_names) > 4 else "")
        tokenizer = "no tokenizer" if self.tokenizer is None else f"codebook of {config.vocab:,}"
        return (
            f"ImageModel({self.source}: {sum(p.numel() for p in self.transformer.parameters()) / 1e6:,.1f} M "
            f"parameters in {config.blocks} blocks, "
            f"{config.positions} codes an image, {tokenizer}, {len(self.class_names):,} classes: {names}; "
            f"{str(weight.dtype).removeprefix('torch.')} on "
            f"{self.device})"
        )

    @property
    def side(self) -> int:
        """Pixels a side of its images."""
        return math.isqrt(self.transformer.config.positions) * self._need_tokenizer("side").config.downsampling

    @property
    def contrast_depth(self) -> int:
        """The block, counted from 1, whose features its training contrasted; half the blocks where the model does not
        say.
        """
        return self.record.get("contrast_depth") or max(1, self.transformer.config.blocks // 2)

    def sample(
        self,
        classes: Classes,
        n: int = 1,
        *,
        guidance: float = 2.0,
        cfg_interval: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_images: int = 64,
    ) -> Images:
        """Draw `n` images of each class: class by class, in the order given.

        Args:
            classes: a class or several, by name or number (a name goes before a number; one may come twice); None:
                without a class.
            n: images of each.
            guidance: scale of classifier-free guidance, 1 (off) or more.
            cfg_interval: m >= 0: only image tokens 0 ... m+1 are guided; -1: all.
            temperature: 0 (the likeliest token) or 1e-5 ... 1e5.
            top_k, top_p: restrict the draw, in this order; 0 and 1.0: off.
            seed: 0 ... 2^63 - 1. The same call gives the same images, and those that `star-fast sample` draws of one
                class with this seed.
            batch_images: drawn together.

        Returns:
            Images: a sequence of PIL images, `.pixels` (N, H, W, 3) uint8.

        Raises:
            UserError: no such class, a setting that makes no sense, or a model without a tokenizer.
        """
        tokenizer = self._need_tokenizer("sample")
        labels = labels_of("sample", classes, self.transformer, self.class_names)
        checked_counts("sample", n=n, batch_images=batch_images)
        try:
            sampling = Sampling(guidance, cfg_interval, temperature, top_k, top_p, seed)
        except ValueError as error:
            raise UserError(str(error).replace("generate:", "sample:")) from error
        label = torch.tensor(labels).repeat_interleave(n)
        index = torch.arange(len(label))
        rows = min(batch_images, len(label)) * (2 if sampling.guided else 1)
        decoder, parts = self._decoding(rows), []
        starts = range(0, len(label), batch_images)
        for start in tqdm(starts, desc="images", unit="batch", leave=False, disable=len(starts) == 1):
            part = slice(start, start + batch_images)
            try:
                codes = decoder.generate(
                    label[part],
                    guidance=guidance,
                    cfg_interval=cfg_interval,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    seed=seed,
                    image_index=index[part],
                )
            except ValueError as error:
                raise UserError(f"sample: {self.source or 'the model'} cannot be drawn from: {error}") from error
            parts.append(self._rendering(tokenizer).start(codes))
        return Images(torch.cat([part.wait() for part in parts]), columns=n if 1 < n <= 10 else 0)

    def codes(self, images: Pictures, *, batch_images: int = _ENCODED_TOGETHER) -> Tensor:
        """The tokenizer's codes of images.

        Args:
            images: a PIL image or several; or uint8 (H, W, 3) or (N, H, W, 3), array or tensor: of any size, since
                ADM's centre crop brings them to the model's own. Or floating point (N, C, H, W) in [-1, 1] of that
                size, taken as they are.
            batch_images: encoded together.

        Returns:
            (N, T) int64 on the CPU, in row order of the image.

        Raises:
            UserError: something that is no image, of no such size, or a model without a tokenizer.
        """
        return self._encoded("codes", images, batch_images)

    def _encoded(self, function: str, images: Pictures, batch_images: int) -> Tensor:
        checked_counts(function, batch_images=batch_images)
        tokenizer = self._need_tokenizer(function)
        pixels = pixels_of(function, images, self.side, tokenizer.config.image_channels)
        if pixels.dtype == torch.uint8:
            return torch.from_numpy(Encoder(tokenizer, "fp32", batch_images)(pixels))
        with ieee_products():
            return torch.cat([tokenizer.encode(part.to(self.device)) for part in pixels.split(batch_images)]).cpu()

    def decode(self, codes: Tensor) -> Images:
        """The images of codes (N, T) or (T,) int64.

        Raises:
            UserError: codes of another shape, or outside the codebook; or a model without a tokenizer.
        """
        tokenizer = self._need_tokenizer("decode")
        codes = checked_codes("decode", codes, self.transformer.config)
        return Images(self._rendering(tokenizer).start(codes.to(self.device)).wait())

    @torch.no_grad()
    def features(
        self, images_or_codes: Pictures | Tensor, labels: Classes = None, *, block: int = 0, batch_images: int = 128
    ) -> Tensor:
        """The hidden states that the linear probe reads: the output of one block at every position.

        Position t has seen the class and codes 0 ... t-1; the last one all codes but the last.

        Args:
            images_or_codes: as for `codes`, or codes (N, T) int64.
            labels: the class that the model is told: one for all, or one an image; None: no class, as the probe has it,
                so that no label leaks in.
            block: counted from 1; 0: the one that training contrasted (`contrast_depth`).
            batch_images: computed together.

        Returns:
            (N, T, D) float32 on the CPU; computed in the model's dtype.

        Raises:
            UserError: no such block or class, or another number of labels than images; or as `codes`.
        """
        checked_counts("features", batch_images=batch_images)
        block = block if block else self.contrast_depth
        if not is_int(block) or not 1 <= block <= self.transformer.config.blocks:
            raise UserError(
                f"features: block must be a number 1 ... {self.transformer.config.blocks} (0: "
                f"{self.contrast_depth}), got {block!r}"
            )
        if isinstance(images_or_codes, Tensor) and images_or_codes.dtype == torch.int64:
            codes = checked_codes("features", images_or_codes, self.transformer.config)
        else:
            codes = self._encoded("features", images_or_codes, _ENCODED_TOGETHER)
        chosen = labels_of("features", labels, self.transformer, self.class_names)
        if len(chosen) not in (1, len(codes)):
            raise UserError(f"features: expected one label, or one for each of {len(codes)} images, got {len(chosen)}")
        label = torch.tensor(chosen).expand(len(codes))
        training, parts = self.transformer.training, []
        self.transformer.eval()
        try:
            for part, part_label in zip(codes.split(batch_images), label.split(batch_images), strict=True):
                out = self.transformer.features(
                    part[:, :-1].to(self.device), part_label.to(self.device), block=block, last=False
                )
                assert out.middle is not None, "a block was named"
                parts.append(out.middle.float().cpu())
        finally:
            self.transformer.train(training)
        return torch.cat(parts)

    def save(self, folder: str | Path, *, metrics: str | Path = "") -> Path:
        """Write a model folder, as Hugging Face's hub holds one: config.json, model.safetensors, tokenizer/, and
        README.md, a card with the training record.

        `load` reads it again; `hf upload OWNER/REPOSITORY FOLDER` publishes it. A model folder that is there is
        replaced, whole or not at all.

        Args:
            metrics: the metrics.json that `star-fast evaluate` wrote of this model: its figures and their protocol go
                into the card.

        Returns:
            The folder.

        Raises:
            UserError: other files are in the folder, weights that were rounded when they were loaded, or no such
                metrics.
        """
        if self._rounded:
            raise UserError(
                f"save: the weights of {self.source} are {self._rounded}, and were rounded to bfloat16 as they "
                "were loaded; load them with "
                "dtype=torch.float32 to save them whole, or with dtype=torch.bfloat16 to save them rounded"
            )
        measured = read_json(metrics, "expected what star-fast evaluate writes") if metrics else None
        if measured is not None and not (
            isinstance(measured.get("metrics"), dict) and isinstance(measured.get("protocol"), dict)
        ):
            raise UserError(f"{metrics}: expected what star-fast evaluate writes, with its metrics and their protocol")
        card = model_card(self.transformer.config, self.class_names, record=self.record, metrics=measured)
        save_model(
            folder,
            self.transformer,
            class_names=self.class_names,
            tokenizer=self.tokenizer,
            record=self.record,
            card=card,
        )
        return Path(folder)

    def _need_tokenizer(self, function: str) -> VQTokenizer:
        if self.tokenizer is None:
            raise UserError(
                f"{function}: {self.source or 'the model'} came without a tokenizer; load it with "
                "tokenizer=FOLDER or FILE"
            )
        positions = self.transformer.config.positions
        if math.isqrt(positions) ** 2 != positions:
            raise UserError(
                f"{function}: the model's {positions} codes an image fill no square, and no other image can be "
                "made of them"
            )
        return self.tokenizer

    def _decoding(self, rows: int) -> Decoder:
        """The Decoder that the last call left, where it has the rows and the weights are still the same."""
        state = _state_of(self.transformer)
        if self._decoder is None or self._decoder[0] != state or self._decoder[1].rows < rows:
            self._decoder = None  # its memory goes first
            self._decoder = (state, Decoder(self.transformer, rows))
        return self._decoder[1]

    def _rendering(self, tokenizer: VQTokenizer) -> Renderer:
        state = _state_of(tokenizer)
        if self._renderer is None or self._renderer[0] != state:
            self._renderer = (state, Renderer(tokenizer, self.device))
        return self._renderer[1]


def _state_of(module: nn.Module) -> tuple[Any, ...]:
    """Changes whenever a weight is changed in place, replaced, moved or cast: Decoder and Renderer keep copies of
    weights.
    """
    return tuple((weight.data_ptr(), weight.dtype, weight._version) for weight in module.parameters())


def load(
    path: str | Path,
    *,
    weights: Weights = "student",
    tokenizer: VQTokenizer | str | Path | None = None,
    class_names: str = "",
    device: str = "",
    dtype: torch.dtype | None = None,
) -> ImageModel:
    """A trained model, ready to draw images, encode them and show its features.

    Args:
        path: a run folder, a model folder, or a LlamaGen file (.pt, .safetensors). hf://OWNER/REPOSITORY or
            hf://OWNER/REPOSITORY/FILE names one of these on Hugging Face's hub; nothing else is ever downloaded. So for
            `tokenizer`.
        weights: "student" or "teacher", of a folder that has both.
        tokenizer: a tokenizer folder, a LlamaGen tokenizer file, or a VQTokenizer; None: the folder's own. A LlamaGen
            file has none: without one the model only takes codes.
        class_names: of a model whose classes are only numbers, as in released files: a file with one name a line, or
            "imagenet".
        device: "cpu", "cuda", "cuda:N"; empty: a GPU where there is one.
        dtype: of the transformer; None: bfloat16 where the device multiplies it natively, else float32, as `star-fast
            sample` has it. Give torch.float32 to train on, or for features as exact as the probe's.

    Raises:
        UserError: no such file, a damaged one, or files that do not fit each other; the line says which and what to do.
    """
    where = pick_device(device)
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UserError(f"load: dtype must be a floating-point torch.dtype, or None, got {dtype!r:.80}")
    loaded = load_model(_here(path), weights=weights, dtype=dtype)
    stored = loaded.transformer.output.weight.dtype
    loaded.transformer.to(dtype or native_dtype(where))
    source = tokenizer if tokenizer is not None else loaded.tokenizer_folder
    found = source if isinstance(source, VQTokenizer) or source is None else load_tokenizer(_here(source))
    if found is not None and found.config.codebook != loaded.transformer.config.vocab:
        raise UserError(
            f"load: the tokenizer has {found.config.codebook} codes, the model {loaded.transformer.config.vocab}; "
            "give the one that the model was "
            "trained with"
        )
    model = ImageModel(loaded, found, names_for_model(loaded.class_names, class_names), where, str(path))
    if dtype is None and stored.itemsize > model.transformer.output.weight.element_size():
        model._rounded = str(stored).removeprefix("torch.")
    return model


def _here(path: str | Path) -> str | Path:
    return fetch(path) if isinstance(path, str) and path.startswith(PREFIX) else path


def run_config(base: str | RunConfig = "tiny", settings: Mapping[str, Any] | None = None) -> RunConfig:
    """The settings of a named run (`star-fast presets` lists them), or others, with some of them changed.

    Args:
        base: a preset's name, or a RunConfig.
        settings: new values under the names that the command line has: {"data.codes": "data/digits", "train.max_steps":
            200}.

    Raises:
        UserError: no such preset or setting, or a value that it cannot have.
    """
    if not isinstance(base, (str, RunConfig)):
        raise UserError(f"run_config: expected a preset's name or a RunConfig, got {type(base).__name__}")
    values = to_dict(preset(base) if isinstance(base, str) else base)
    for name, value in (settings or {}).items():
        section, _, field = name.partition(".")
        if field not in values.get(section, {}):
            known = [f"{part}.{setting}" for part, inner in values.items() for setting in inner]
            near = difflib.get_close_matches(name, known, n=3) or known[:3] + ["..."]
            raise UserError(
                f"run_config: there is no setting {name!r:.80}; near it: {', '.join(near)} (`star-fast train --help` "
                "lists them all)"
            )
        values[section][field] = value
    return from_dict(RunConfig, values)

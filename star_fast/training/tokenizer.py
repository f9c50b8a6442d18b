"""Training a small VQ tokenizer on own images: reconstruction, codebook and commitment losses, and re-seeding of unused codes.

The loss is L1 + L2 in pixels. LlamaGen adds a perceptual and a GAN loss, which large natural images need to look sharp; neither is
here. For such images use a released tokenizer (model/llamagen.py); the code below does run on them (image_channels 3, image_size 256).
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from star_fast.config import ConfigError, DataConfig, TokenizerConfig
from star_fast.data.manifest import differences, is_begun, is_finished, tokenizer_of
from star_fast.data.prepare import collect_views, explain_out_of_memory
from star_fast.data.sources import DataError, ImageSource, split_indices
from star_fast.data.views import view_names, view_settings
from star_fast.errors import UserError, printable
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import CONFIG_FILE, VQTokenizer, from_uint8, to_uint8
from star_fast.storage import StorageError, atomic_write_json, atomic_writer, read_record, remove_leftovers, sha256_of_bytes
from star_fast.training.tokenizer_state import (
    RECORD_FILE,
    Training,
    TrainingJob,
    load_state,
    remove_state,
    require_same_seed,
    require_same_settings,
    save_state,
)

TOKENIZER_FOLDER = "tokenizer"  # within a code store's
REPORT_FILE = "training.json"
PICTURE_FILE = "reconstructions.png"
_SETTLE_SHARE = 0.15  # of the steps, at the end: no code is moved any more, so that all of them settle
_EVALUATION_IMAGES = 64  # images encoded at once when nothing is learnt
_SAVE_EVERY_STEPS = 50  # a kill loses at most so many
_MOST_LR = 1e30  # beyond, AdamW's step is no float32
_MOST_LATENTS = 2**24  # of one step: more torch.multinomial does not draw from


@dataclass(frozen=True)
class TokenizerReport:
    """What a tokenizer does to images that it was not trained on (where such images were given)."""

    psnr_db: float  # 10 log10(255^2 / mean squared error) over all pixels of the uint8 reconstructions
    codes_used: int  # codebook entries that occur
    codebook: int  # entries there are
    perplexity: float  # exp(entropy) of the codes: how many entries a uniform use would need
    images: int  # number of images measured


@dataclass(frozen=True)
class TrainingRecord(TokenizerReport):
    """training.json: the schema."""

    measured_on: str  # "held-out images" or "training images"
    training_images: int
    steps: int
    seed: int
    trained_on: dict[str, Any] = field(default_factory=dict)  # source, views and split


def train_tokenizer(images: Tensor, config: TokenizerConfig, *, seed: int = 0, out: str | Path | None = None, held_out: Tensor | None = None,
                    device: str | torch.device = "cpu", progress: bool = True, save_every_steps: int = _SAVE_EVERY_STEPS,
                    trained_on: dict[str, Any] | None = None) -> VQTokenizer:
    """Train a tokenizer on `images` and return it in eval mode. With `out`, the same call goes on where an interrupted or killed one stopped.

    Args:
        images: (N, C, H, W) uint8 of the train split only; several views of an image may be among them.
        config: shape of the tokenizer, steps, batch, learning rate (AdamW, cosine to 0).
        seed: of initial weights, batches and re-seeding. Equal seeds give equal weights on the same machine and number of threads.
        out: folder that gets the tokenizer, training.json (PSNR, use of the codebook) and reconstructions.png; None writes nothing.
        held_out: (N', C, H, W) uint8 to measure on; None measures on (up to 1024 of) `images`, and training.json says so.
        save_every_steps: how often the state is saved in `out`; a kill loses the steps since. Ctrl-C loses none.
        trained_on: what `images` are, for training.json.

    Raises:
        ConfigError: images of another size or number of channels than `config` says, not uint8, or none; a training with other settings was begun in `out`.
        UserError: the loss stopped being finite (then `out` gets no tokenizer, and the last state saved there is kept), or memory does not suffice.
    """
    _check(images, config, "images")
    _require_possible(config, torch.device(device))
    if held_out is not None and len(held_out):
        _check(held_out, config, "held_out")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = VQTokenizer(config).to(device)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    training = Training(tokenizer, optimizer, torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64),
                        torch.zeros(config.codebook, dtype=torch.bool, device=device))
    folder = None if out is None else Path(out)
    with explain_out_of_memory(f"train this tokenizer on {config.images_per_step} images of {config.image_size} pixels a step"):
        _train(training, images, config, seed, folder, save_every_steps, progress)
    tokenizer.eval()
    if folder is not None:
        shown = held_out if held_out is not None and len(held_out) else images[:1024]
        with explain_out_of_memory(f"measure this tokenizer on {_EVALUATION_IMAGES} images of {config.image_size} pixels at once"):
            report = measure_tokenizer(tokenizer, shown)
            write_reconstructions(tokenizer, shown[:16], folder / PICTURE_FILE)
        measured_on = "held-out images" if shown is held_out else "training images"
        atomic_write_json(folder / REPORT_FILE, {**asdict(report), "measured_on": measured_on, "training_images": len(images), "steps": config.steps,
                                                 "seed": seed, "trained_on": trained_on or {}})
        tokenizer.save(folder)  # last: a folder with a tokenizer in it is complete
        remove_state(folder)
        if progress:
            tqdm.write(f"tokenizer: PSNR {report.psnr_db:.1f} dB on {measured_on}, {report.codes_used} of {report.codebook} codes in use there; "
                       f"see {printable(folder / PICTURE_FILE)}")
    return tokenizer


def _train(training: Training, images: Tensor, config: TokenizerConfig, seed: int, folder: Path | None, save_every_steps: int, progress: bool) -> None:
    """All steps that are still to do; with a folder the state is kept there."""
    tokenizer, optimizer, generator = training.tokenizer, training.optimizer, training.generator
    codebook, device, first = tokenizer.quantize.embedding.weight, training.used.device, 0
    if folder is not None:
        job = TrainingJob(seed, sha256_of_bytes(memoryview(images.contiguous().numpy()).cast("B")), config)
        first = load_state(folder, training, job, len(images))
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc="tokenizer", unit="step", disable=not progress, dynamic_ncols=True)
    with bar, _ctrl_c_waits() if folder is not None else _ctrl_c_acts() as interrupted:
        for step in bar:
            optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
            while len(training.order) < config.images_per_step:
                training.order = torch.cat([training.order, torch.randperm(len(images), generator=generator)])
            batch, training.order = training.order[: config.images_per_step], training.order[config.images_per_step:]
            target = from_uint8(images[batch].to(device))
            if step == 0:  # entries start where the latents are: a codebook far from them would be mostly dead
                with torch.no_grad():
                    move_codes(codebook, torch.ones_like(training.used), tokenizer(target).latents, generator)
            output = tokenizer(target)
            pixels = F.l1_loss(output.reconstruction, target) + F.mse_loss(output.reconstruction, target)
            loss = pixels + output.codebook_loss + config.commitment * output.commitment_loss
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
            _require_finite(torch.stack([loss.detach(), norm]), step, config, folder)  # before the step: nothing that is kept has seen it
            optimizer.step()
            training.used[output.codes.flatten()] = True
            if (step + 1) % config.reseed_every_steps == 0:
                count = int(training.used.sum())
                if step + 1 <= config.steps * (1 - _SETTLE_SHARE) and count < config.codebook:
                    move_codes(codebook, ~training.used, output.latents, generator, optimizer)
                bar.set_postfix(pixels=f"{pixels.item():.4f}", codes=f"{count}/{config.codebook}")
                training.used.zero_()
            if interrupted or (step + 1) % save_every_steps == 0 or step + 1 == config.steps:
                _require_finite(torch.stack([parameter.abs().amax() for parameter in tokenizer.parameters()]), step, config, folder)
                if folder is not None:
                    save_state(folder, training, step + 1, job)
            if interrupted:
                raise KeyboardInterrupt(f"{step + 1} of {config.steps} tokenizer steps are kept")


def _require_finite(values: Tensor, step: int, config: TokenizerConfig, folder: Path | None) -> None:
    """Raise UserError where the loss and the gradient's norm, or the largest weights, are not finite after so many steps."""
    if not torch.isfinite(values).all():
        what = f"the loss is {values[0].item():.4g} and the gradient's norm {values[1].item():.4g}" if len(values) == 2 else "weights are not finite"
        again = f", delete {folder}, and run the same command" if folder is not None else ""
        raise UserError(f"tokenizer training: {what} at step {step + 1} of {config.steps}; no tokenizer is written; "
                        f"lower the learning rate (--new-tokenizer.lr, now {config.lr:g}){again}")


@contextmanager
def _ctrl_c_waits() -> Iterator[list[int]]:
    """Within the block the first Ctrl-C only fills the yielded list, so that a step is never cut in two; the second acts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield caught  # signals are somebody else's here
        return

    def note(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _ctrl_c_acts() -> Iterator[list[int]]:
    """Nothing is kept, so that nothing is worth waiting for."""
    yield []


@torch.no_grad()
def move_codes(codebook: Tensor, which: Tensor, latents: Tensor, generator: torch.Generator, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Move the codebook entries `which` (V,) bool onto latents (N, Z) that the kept entries serve worst, in place, and forget their Adam moments.

    Latents are drawn one by one with probability proportional to their squared distance from the nearest entry, those just placed
    included (k-means++), so that a pile of equal latents (an empty background) takes one entry, not most of them.
    """
    places = which.nonzero().flatten().tolist()
    kept = F.normalize(codebook[~which].float(), dim=-1)
    distance = (2 - 2 * (latents @ kept.t()).amax(1)) if len(kept) else torch.full((len(latents),), 2.0, device=latents.device)
    for place in places:
        weight = distance.clamp_min(0).cpu() + 1e-8
        pick = int(torch.multinomial(weight, 1, generator=generator))
        codebook[place] = latents[pick].to(codebook.dtype)
        distance = torch.minimum(distance, 2 - 2 * latents @ latents[pick])
    state = optimizer.state.get(codebook, {}) if optimizer is not None else {}
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state:
            state[name][which] = 0


@torch.no_grad()
def reconstruct(tokenizer: VQTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 reconstructions (N, C, H, W) and codes (N, T) int64, on the CPU, of uint8 images (N, C, H, W)."""
    device, parts, codes = tokenizer.quantize.embedding.weight.device, [], []
    for batch in images.split(_EVALUATION_IMAGES):
        codes.append(tokenizer.encode(from_uint8(batch.to(device))))
        parts.append(to_uint8(tokenizer.decode(codes[-1])).cpu())
    return torch.cat(parts), torch.cat(codes).cpu()


def measure_tokenizer(tokenizer: VQTokenizer, images: Tensor) -> TokenizerReport:
    """PSNR and use of the codebook on uint8 images (N, C, H, W), N >= 1."""
    made, codes = reconstruct(tokenizer, images)
    error = (made.double() - images.double()).square().mean().item()
    count = torch.bincount(codes.flatten(), minlength=tokenizer.config.codebook).double()
    share = count[count > 0] / count.sum()
    return TokenizerReport(psnr_db=round(10 * math.log10(255**2 / max(error, 1e-12)), 3), codes_used=len(share), codebook=tokenizer.config.codebook,
                           perplexity=round(math.exp(-(share * share.log()).sum().item()), 2), images=len(images))


def write_reconstructions(tokenizer: VQTokenizer, images: Tensor, path: str | Path) -> None:
    """Write a PNG: uint8 images (N, C, H, W) in the upper row, their reconstructions below; small images are enlarged to at least 96 pixels."""
    rows = torch.stack([images, reconstruct(tokenizer, images)[0]])  # (2, N, C, H, W)
    sheet = F.pad(rows, (2, 2, 2, 2), value=128).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()  # (2H, N*W, C)
    zoom = max(1, math.ceil(96 / images.shape[-1]))
    picture = Image.fromarray(np.ascontiguousarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet))
    with atomic_writer(path) as file:
        picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(file, format="PNG")


def train_tokenizer_on(source: ImageSource, config: TokenizerConfig, data: DataConfig, *, out: str | Path, seed: int = 0, limit_bytes: int = 2**31,
                       device: str | torch.device = "cpu", progress: bool = True) -> VQTokenizer:
    """Train a tokenizer on views of the source's train split and measure it on untouched held-out images; what `star-fast prepare` does when none is given.

    The split is `split_indices` with the same labels, share and seed as the code store's. At most `limit_bytes` of views are held in memory.
    """
    _require_possible(config, torch.device(device))
    train, held_out = split_indices(source.labels, data.held_out_share)
    images = collect_views(source, train, data, config, limit_bytes=limit_bytes, progress=progress)
    unseen = collect_views(source, held_out, data, config, limit_bytes=limit_bytes // 8, plain_only=True, progress=progress) if len(held_out) else None
    return train_tokenizer(images, config, seed=seed, out=out, held_out=unseen, device=device, progress=progress, trained_on=_about(source, data))


def tokenizer_for(source: ImageSource, out: str | Path, config: TokenizerConfig, data: DataConfig, *, given: str = "", asked: bool = True, seed: int = 0,
                  device: str | torch.device = "cpu", progress: bool = True) -> VQTokenizer:
    """The tokenizer that the code store in folder `out` is to be made with, on the CPU or `device`; it is kept in `out`/tokenizer.

    Args:
        config: of a tokenizer to train. asked: whether somebody chose these settings, rather than leaving them as they are.
        given: a tokenizer's file or folder; empty: the one that is kept there, else one is trained.

    Raises:
        ConfigError: the tokenizer kept there, or the one that the codes there were made with, has other settings or another seed, or is another than the one
            given; the line names the setting. UserError: it was trained on other images. StorageError: it is damaged.
    """
    out = Path(out)
    kept, made_by = out / TOKENIZER_FOLDER, tokenizer_of(out)
    there = os.path.lexists(kept / CONFIG_FILE)
    hint = f"choose another --out, or delete {out}"
    if not is_finished(out):
        remove_leftovers(kept)
    if given:
        return _keep(load_tokenizer(given), given, kept, made_by, hint)
    if not there and made_by:
        raise StorageError(f"{kept / CONFIG_FILE}: not found, and the codes in {out} need the tokenizer {made_by[:12]} that was there; put it back, give it "
                           "with --tokenizer, or delete the folder")
    if not there:
        return train_tokenizer_on(source, config, data, out=kept, seed=seed, device=device, progress=progress)
    try:
        tokenizer = VQTokenizer.load(kept)
    except UserError as error:
        raise StorageError(f"{error}; put back what was there, or delete {out} to start afresh") from error
    if made_by and tokenizer.weights_hash() != made_by:
        raise StorageError(f"{kept}: not the tokenizer {made_by[:12]} that the codes in {out} were made with, but {tokenizer.weights_hash()[:12]}; "
                           "put that back, or delete both")
    trained_here = os.path.lexists(kept / REPORT_FILE)
    if trained_here or asked:
        require_same_settings(tokenizer.config, config, f"{kept} holds a tokenizer", hint)
    if trained_here:
        record = read_record(kept / REPORT_FILE, TrainingRecord, hint, ignore_unknown=True)
        require_same_seed(record.seed, seed, f"{kept} holds a tokenizer trained", hint)
        if record.trained_on and not is_begun(out) and (what := differences(record.trained_on, _about(source, data))):
            raise UserError(f"{kept}: its tokenizer was trained on other images, views or split ({what}); {hint}")
    if not is_finished(out):
        remove_state(kept)
    if progress:
        tqdm.write(printable(f"Using the tokenizer in {kept}"))
    return tokenizer


def _keep(tokenizer: VQTokenizer, given: str, kept: Path, made_by: str, hint: str) -> VQTokenizer:
    """Keep a given tokenizer in the folder `kept`, unless another belongs there."""
    ours = tokenizer.weights_hash()
    if tokenizer.dtype != torch.float32:
        raise DataError(f"{given}: the tokenizer must be float32, got {tokenizer.dtype}: a rounded tokenizer gives other codes")
    if made_by and made_by != ours:
        raise ConfigError(f"tokenizer: {given} is {ours[:12]}, the codes in {kept.parent} were made with {made_by[:12]}; give that one, {hint}")
    if os.path.lexists(kept / RECORD_FILE):
        raise ConfigError(f"tokenizer: {kept} holds an unfinished training; give no tokenizer to go on with it, {hint}")
    if os.path.lexists(kept / CONFIG_FILE):
        try:
            found = VQTokenizer.load(kept).weights_hash()
        except UserError:
            if not made_by:
                raise
            found = ""  # damaged, and the codes say that the one given belongs there
        if found == ours:
            return tokenizer
        if found:
            raise ConfigError(f"tokenizer: {given} is {ours[:12]}, {kept} holds {found[:12]}; give that one, {hint}")
    tokenizer.save(kept)
    return tokenizer


def _about(source: ImageSource, data: DataConfig) -> dict[str, Any]:
    """What a tokenizer is trained on, in plain values."""
    return {"source": source.description(), "views": len(view_names(data)), "view_settings": view_settings(data, 0), "held_out_share": data.held_out_share}


def _require_possible(config: TokenizerConfig, device: torch.device) -> None:
    """Raise ConfigError for settings that cannot work, and sizes that this machine cannot hold by any means: what is possible is never refused."""
    if config.lr > _MOST_LR:
        raise ConfigError(f"tokenizer.lr: expected at most {_MOST_LR:g}, got {config.lr:g}")
    if config.images_per_step * config.positions > _MOST_LATENTS:
        raise ConfigError(f"tokenizer.images_per_step: expected at most {_MOST_LATENTS // config.positions} images of {config.positions} codes, "
                          f"got {config.images_per_step}")
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in VQTokenizer(config).parameters())
    features = config.images_per_step * config.base_channels * config.image_size**2
    needed = 4 * (4 * weights + 4 * features)  # float32: weights, gradients, two moments; what the first block alone keeps for its gradient
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(f"tokenizer.base_channels: training {weights:,} weights on {config.images_per_step} images of {config.image_size} pixels a step "
                          f"takes at least {needed / 2**30:,.0f} GiB, the machine has {memory / 2**30:,.0f}; choose smaller sizes")


def _check(images: Tensor, config: TokenizerConfig, name: str) -> None:
    expected = (config.image_channels, config.image_size, config.image_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected or images.dtype != torch.uint8 or len(images) == 0:
        raise ConfigError(f"train_tokenizer: {name} must be uint8 (N >= 1, {', '.join(map(str, expected))}) to fit tokenizer.image_channels and "
                          f"tokenizer.image_size, got {images.dtype} {tuple(images.shape)}")

"""Training a small VQ tokenizer on own images: reconstruction, codebook and commitment losses, and re-seeding of unused codes.

The loss is L1 + L2 in pixels. LlamaGen adds a perceptual and a GAN loss, which large natural images need to look sharp; neither is
here. For such images use a released tokenizer (model/llamagen.py); the code below does run on them (image_channels 3, image_size 256).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from star_fast.config import ConfigError, DataConfig, TokenizerConfig
from star_fast.data.prepare import collect_views
from star_fast.data.sources import ImageSource, split_indices
from star_fast.model.tokenizer import VQTokenizer, from_uint8, to_uint8
from star_fast.storage import atomic_write_json, atomic_writer

REPORT_FILE = "training.json"
PICTURE_FILE = "reconstructions.png"
_SETTLE_SHARE = 0.15  # of the steps, at the end: no code is moved any more, so that all of them settle
_EVALUATION_IMAGES = 64  # images encoded at once when nothing is learnt


@dataclass(frozen=True)
class TokenizerReport:
    """What a tokenizer does to images that it was not trained on (where such images were given)."""

    psnr_db: float  # 10 log10(255^2 / mean squared error) over all pixels of the uint8 reconstructions
    codes_used: int  # codebook entries that occur
    codebook: int  # entries there are
    perplexity: float  # exp(entropy) of the codes: how many entries a uniform use would need
    images: int  # number of images measured


def train_tokenizer(images: Tensor, config: TokenizerConfig, *, seed: int = 0, out: str | Path | None = None, held_out: Tensor | None = None,
                    device: str | torch.device = "cpu", progress: bool = True) -> VQTokenizer:
    """Train a tokenizer on `images` and return it in eval mode.

    Args:
        images: (N, C, H, W) uint8 of the train split only; several views of an image may be among them.
        config: shape of the tokenizer, steps, batch, learning rate (AdamW, cosine to 0).
        seed: of initial weights, batches and re-seeding. Equal seeds give equal weights on the same machine and number of threads.
        out: folder that gets the tokenizer, training.json (PSNR, use of the codebook) and reconstructions.png; None writes nothing.
        held_out: (N', C, H, W) uint8 to measure on; None measures on (up to 1024 of) `images`, and training.json says so.

    Raises:
        ConfigError: images of another size or number of channels than `config` says, not uint8, or none.
    """
    _check(images, config, "images")
    if held_out is not None and len(held_out):
        _check(held_out, config, "held_out")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = VQTokenizer(config).to(device)
    generator = torch.Generator().manual_seed(seed)
    codebook = tokenizer.quantize.embedding.weight
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    used = torch.zeros(config.codebook, dtype=torch.bool, device=device)
    order = torch.empty(0, dtype=torch.int64)
    bar = tqdm(range(config.steps), desc="tokenizer", unit="step", disable=not progress, dynamic_ncols=True)
    for step in bar:
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        while len(order) < config.images_per_step:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        batch, order = order[: config.images_per_step], order[config.images_per_step:]
        target = from_uint8(images[batch].to(device))
        if step == 0:  # entries start where the latents are: a codebook far from them would be mostly dead
            with torch.no_grad():
                move_codes(codebook, torch.ones_like(used), tokenizer(target).latents, generator)
        output = tokenizer(target)
        pixels = F.l1_loss(output.reconstruction, target) + F.mse_loss(output.reconstruction, target)
        loss = pixels + output.codebook_loss + config.commitment * output.commitment_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        used[output.codes.flatten()] = True
        if (step + 1) % config.reseed_every_steps == 0:
            count = int(used.sum())
            if step + 1 <= config.steps * (1 - _SETTLE_SHARE) and count < config.codebook:
                move_codes(codebook, ~used, output.latents, generator, optimizer)
            bar.set_postfix(pixels=f"{pixels.item():.4f}", codes=f"{count}/{config.codebook}")
            used.zero_()
    tokenizer.eval()
    if out is not None:
        shown = held_out if held_out is not None and len(held_out) else images[:1024]
        report = measure_tokenizer(tokenizer, shown)
        write_reconstructions(tokenizer, shown[:16], Path(out) / PICTURE_FILE)
        measured_on = "held-out images" if shown is held_out else "training images"
        atomic_write_json(Path(out) / REPORT_FILE, {**asdict(report), "measured_on": measured_on, "training_images": len(images), "steps": config.steps,
                                                    "seed": seed})
        tokenizer.save(out)  # last: a folder with a tokenizer in it is complete
        if progress:
            tqdm.write(f"tokenizer: PSNR {report.psnr_db:.1f} dB on {measured_on}, {report.codes_used} of {report.codebook} codes in use there; "
                       f"see {Path(out) / PICTURE_FILE}")
    return tokenizer


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
    train, held_out = split_indices(source.labels, data.held_out_share)
    images = collect_views(source, train, data, config, limit_bytes=limit_bytes, progress=progress)
    unseen = collect_views(source, held_out, data, config, limit_bytes=limit_bytes // 8, first_view_only=True, progress=progress) if len(held_out) else None
    return train_tokenizer(images, config, seed=seed, out=out, held_out=unseen, device=device, progress=progress)


def _check(images: Tensor, config: TokenizerConfig, name: str) -> None:
    expected = (config.image_channels, config.image_size, config.image_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected or images.dtype != torch.uint8 or len(images) == 0:
        raise ConfigError(f"train_tokenizer: {name} must be uint8 (N >= 1, {', '.join(map(str, expected))}) to fit tokenizer.image_channels and "
                          f"tokenizer.image_size, got {images.dtype} {tuple(images.shape)}")

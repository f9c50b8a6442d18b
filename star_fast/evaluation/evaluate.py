"""`star-fast evaluate`: images in, the five metrics of the ADM suite out, with everything that they depend on written
beside them.

One pass over the images: drawn or read, looked at (pixel_checks.py), through Inception, into sums. See adm.py for the
metrics, reference.py for what they are measured against, protocols.py for what published numbers did.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import star_fast
from star_fast.data.sources import open_source
from star_fast.errors import UserError
from star_fast.evaluation.adm import SPLIT_IMAGES, AdmMetrics, FeatureStatistics, adm_metrics
from star_fast.evaluation.image_sets import DrawnImages, FolderImages, ImageSet, NpzImages, SourceImages
from star_fast.evaluation.inception import WEIGHTS_SHA256, Inception, open_inception
from star_fast.evaluation.limits import explain_out_of_memory, require_ranges
from star_fast.evaluation.pixel_checks import PixelChecks, label_warnings
from star_fast.evaluation.protocols import KnownProtocol, departures
from star_fast.evaluation.reconstructions import TokenizerPass, open_tokenizer
from star_fast.evaluation.reference import read_reference, write_reference
from star_fast.evaluation.runs import only_result
from star_fast.generation.device import take_device
from star_fast.generation.sample_config import SampleConfig
from star_fast.storage import atomic_write_bytes, atomic_write_json

ADM_PRECISION_IMAGES = 10_000  # of the ADM suite's references
_ROOT = "symmetric eigenproblems, exact for singular covariances"


@dataclass(frozen=True)
class EvaluateConfig:
    """FID, sFID, Inception Score, precision and recall of images, with the protocol they were measured by. Give one of
    --samples, --draw.model, --tokenizer (reconstructions of --source against the originals: rFID), --make-reference."""

    samples: str = ""  # a .npz with arr_0 uint8 (N, H, W, 3), or a folder of images
    reference: str = ""  # a .npz: one of the ADM suite's, or one that --make-reference wrote
    # images to make a reference of: a folder with classes, 'digits', tar shards, as for `star-fast prepare`
    make_reference: str = ""
    tokenizer: str = ""  # tokenizer folder or LlamaGen tokenizer file: measure its reconstructions
    source: str = ""  # the images that --tokenizer reconstructs
    source_labels: str = ""  # the list of labels of --source or --make-reference, where it is a plain folder of images
    # Draw the samples from --draw.model while they are measured; no file of images is written
    draw: SampleConfig = field(default_factory=SampleConfig)
    # the result, NAME.json, and as text NAME.txt; of --make-reference NAME.npz; empty: metrics.json, reference.npz
    out: str = ""
    # ADM's centre crop to so many pixels; 0: as they are (--samples), the tokenizer's own (--tokenizer), 256
    # (--make-reference)
    image_size: int = 0
    inception: str = ""  # torch-fidelity's weights-inception-2015-12-05-6726825d.pth; empty: where torch.hub keeps it
    # of other weights than torch-fidelity's; what they measure compares with no published number
    inception_sha256: str = ""
    download: bool = False  # fetch torch-fidelity's weights (96 MB) where they are not yet
    protocol: KnownProtocol = ""  # list every setting that differs from this one
    adm_half: bool = False  # distances of precision and recall in float16, as ADM's evaluator takes them; else exact
    neighbours: int = 3  # k of precision and recall
    split_images: int = SPLIT_IMAGES  # of a group of the Inception Score
    # --make-reference: images, evenly spaced, whose features are kept for precision and recall
    precision_images: int = ADM_PRECISION_IMAGES
    batch_images: int = 32  # through Inception together
    device: str = ""  # cpu, cuda, cuda:1 ...; empty: a GPU where there is one

    def __post_init__(self) -> None:
        require_ranges(
            self,
            {
                "image_size": (0, 2**14),
                "neighbours": (1, 1000),
                "split_images": (1, 2**40),
                "precision_images": (1, 2**40),
                "batch_images": (1, 2**16),
            },
        )
        given = [
            name
            for name, value in (
                ("--samples", self.samples),
                ("--draw.model", self.draw.model),
                ("--tokenizer", self.tokenizer),
                ("--make-reference", self.make_reference),
            )
            if value
        ]
        if len(given) != 1:
            raise UserError(
                "evaluate: expected one of --samples, --draw.model, --tokenizer and --make-reference, got "
                f"{' and '.join(given) or 'none'}"
            )
        measures_samples = bool(self.samples or self.draw.model)
        if measures_samples and not self.reference:
            raise UserError(
                "--reference: missing: give a reference of the ADM suite, or make one of own images: star-fast "
                "evaluate --make-reference FOLDER"
            )
        for name, value, wrong in (
            ("--reference", self.reference, not measures_samples),
            ("--source", self.source, not self.tokenizer),
            ("--source-labels", self.source_labels, measures_samples),
            ("--protocol", self.protocol, not measures_samples),
            ("--image-size", self.image_size, self.draw.model or self.samples.endswith(".npz")),
        ):
            if value and wrong:
                raise UserError(
                    f"{name}: does not go with {given[0]} {getattr(self, given[0][2:].replace('-', '_'), '')}".rstrip()
                    + "; leave it out"
                )
        if self.tokenizer and not self.source:
            raise UserError("--source: missing: the images that the tokenizer is to reconstruct")
        suffix = ".npz" if self.make_reference else ".json"
        if self.out and Path(self.out).suffix != suffix:
            raise UserError(f"--out: expected a name that ends in {suffix}, got {self.out[-80:]!r}")

        if self.samples and self.out_file.absolute() == Path(self.samples).with_suffix(".json").absolute():
            raise UserError(
                f"--out: {self.out_file} is where the sampler's record of {self.samples} lies; give another name"
            )

    @property
    def out_file(self) -> Path:
        """Where the result goes."""
        return Path(self.out or ("reference.npz" if self.make_reference else "metrics.json"))


def run_evaluate(config: EvaluateConfig, *, progress: bool = True) -> str:
    """Do what `config` asks for and write it; returns what the user is told.

    Raises:
        UserError, StorageError: one line: weights, images or reference are missing or not what they should be.
    """
    device = take_device(config.device)
    files = [config.out_file.with_suffix(suffix).name for suffix in (".npz", ".json", ".txt")]
    # The place is tried before hours of work, not after.
    with only_result(config.out_file, "evaluating", files), explain_out_of_memory("give a smaller --batch-images"):
        inception = open_inception(config.inception, config.inception_sha256, config.download, device)
        if config.make_reference:
            return _make_reference(config, inception, progress)
        if config.tokenizer:
            return _measure_tokenizer(config, inception, progress)
        return _measure_samples(config, inception, progress)


def _measure_samples(config: EvaluateConfig, inception: Inception, progress: bool) -> str:
    images: ImageSet
    if config.draw.model:
        images = DrawnImages(config.draw, inception.device)
    else:
        images = (
            NpzImages(config.samples)
            if config.samples.endswith(".npz")
            else FolderImages(config.samples, config.image_size)
        )
    reference = read_reference(config.reference, inception, config.batch_images, progress=progress)
    checks, statistics = PixelChecks(), FeatureStatistics(inception.device, config.split_images)
    for batch in _seen(images, config.batch_images, checks, "samples", progress):
        statistics.add(inception(batch))
    metrics = _metrics(statistics, reference.gaussians, reference.pool, config, inception, progress)
    protocol = _protocol(config, inception, images, checks, reference.record)
    warnings = _warnings(images, checks, inception)
    return _write(config, {"metrics": asdict(metrics)}, protocol, warnings)


def _measure_tokenizer(config: EvaluateConfig, inception: Inception, progress: bool) -> str:
    tokenizer = open_tokenizer(config.tokenizer, config.image_size, inception.device)
    source = open_source(config.source, labels=config.source_labels)
    images = SourceImages(source, config.source, tokenizer.image_size, tokenizer.channels)
    checks, originals, made = (
        PixelChecks(),
        *(FeatureStatistics(inception.device, config.split_images) for _ in range(2)),
    )
    passed = TokenizerPass(tokenizer)
    for batch in _seen(images, config.batch_images, checks, "reconstructions", progress):
        originals.add(inception(_rgb(batch)))
        made.add(inception(_rgb(passed.reconstruct(batch))))
    metrics = _metrics(made, originals.gaussians(), originals.pool(), config, inception, progress)
    record = {
        "file": "the originals",
        "statistics": f"of the {originals.images:,} originals",
        "precision_images": originals.images,
        "precision_from": f"images of {tokenizer.image_size} x {tokenizer.image_size} pixels",
    }
    protocol = {**_protocol(config, inception, images, checks, record), "tokenizer": tokenizer.record()}
    return _write(
        config,
        {"metrics": asdict(metrics), "reconstruction": passed.figures()},
        protocol,
        _warnings(images, checks, inception),
    )


def _make_reference(config: EvaluateConfig, inception: Inception, progress: bool) -> str:
    source = open_source(config.make_reference, labels=config.source_labels)
    images = SourceImages(source, config.make_reference, config.image_size or 256)
    # Every so-many-th image that can be read: a source may be sorted by class.
    checks, statistics = (
        PixelChecks(),
        FeatureStatistics(inception.device, config.split_images, -(-len(source) // config.precision_images)),
    )
    for batch in _seen(images, config.batch_images, checks, "reference images", progress):
        statistics.add(inception(batch))
    record = {
        "samples": {**images.record(), **checks.record(), "skipped": images.skipped},
        "inception": inception.record(),
        **_environment(inception),
        "precision_images": len(statistics.pool()),
        "warnings": _warnings(images, checks, inception),
    }
    write_reference(config.out_file, statistics, inception, record)
    lines = [
        f"{config.out_file}: statistics of {statistics.images:,} images of {checks.shape[1]} x {checks.shape[0]} "
        "pixels, features of "
        f"{len(statistics.pool()):,} for precision and recall; record in {config.out_file.with_suffix('.json')}"
    ]
    return "\n".join(lines + [f"warning: {line}" for line in record["warnings"]])


def _seen(images: ImageSet, size: int, checks: PixelChecks, title: str, progress: bool) -> Iterator[Tensor]:
    """Batches of a set, looked at and counted on a bar."""
    with tqdm(desc=title, total=images.images, unit="image", disable=not progress) as bar:
        for batch in images.batches(size):
            checks.see(batch)
            yield batch
            bar.update(len(batch))
    if not checks.images:
        first = images.skipped[0] if images.skipped else {"key": "", "reason": "none there"}
        raise UserError(f"{title}: no image could be read; the first: {first['key']}: {first['reason']}")


def _rgb(images: Tensor) -> Tensor:
    """Gray repeated in three channels."""
    return images.expand(-1, 3, -1, -1)


def _metrics(
    samples: FeatureStatistics,
    gaussians: Any,
    pool: Tensor | None,
    config: EvaluateConfig,
    inception: Inception,
    progress: bool,
) -> AdmMetrics:
    return adm_metrics(
        samples,
        gaussians,
        pool,
        neighbours=config.neighbours,
        distances="float16" if config.adm_half else "float32",
        device=inception.device,
        progress=progress,
    )


def _protocol(
    config: EvaluateConfig, inception: Inception, images: ImageSet, checks: PixelChecks, reference: dict[str, Any]
) -> dict[str, Any]:
    method = {
        "distances": "float16" if config.adm_half else "float32, exact by float64",
        "neighbours": config.neighbours,
        "split_images": config.split_images,
        "matrix_root": _ROOT,
        "moments": "float64",
    }
    return {
        "samples": {**images.record(), **checks.record(), "skipped": images.skipped},
        "reference": reference,
        "inception": inception.record(),
        "method": method,
        **_environment(inception),
    }


def _environment(inception: Inception) -> dict[str, Any]:
    device = torch.cuda.get_device_name(inception.device) if inception.device.type == "cuda" else "cpu"
    return {
        "versions": {
            "star_fast": star_fast.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": device,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _warnings(images: ImageSet, checks: PixelChecks, inception: Inception) -> list[str]:
    found = list(images.warnings) + checks.warnings() + label_warnings(getattr(images, "labels", None))
    if jpegs := images.record().get("jpeg_images"):
        found.append(
            f"{jpegs:,} of {checks.images:,} images come from JPEG files, whose compression moves FID; write "
            "samples as .npz or PNG"
        )
    if images.skipped:
        found.append(f"{len(images.skipped):,} images could not be read and are left out; the record lists them")
    if inception.sha256 != WEIGHTS_SHA256:
        found.append("the weights of Inception are not torch-fidelity's: these numbers compare with no published one")
    return found


def _write(config: EvaluateConfig, figures: dict[str, Any], protocol: dict[str, Any], warnings: list[str]) -> str:
    differing = departures(protocol, config.protocol) if config.protocol else None
    result = {**figures, "warnings": warnings, "protocol": protocol}
    if differing is not None:
        result["compared_with"] = {"protocol": config.protocol, "differs": differing}
    text = _table(figures, protocol)
    text += "".join(f"warning: {line}\n" for line in warnings)
    if differing is not None:
        text += f"{'differs from' if differing else 'is'} the protocol {config.protocol}{':' if differing else ''}\n"
        text += "".join(f"  {line}\n" for line in differing)
    atomic_write_json(config.out_file, result)
    atomic_write_bytes(config.out_file.with_suffix(".txt"), text.encode(errors="backslashreplace"))
    return f"{text}record in {config.out_file}"


def _table(figures: dict[str, Any], protocol: dict[str, Any]) -> str:
    m, samples, reference = figures["metrics"], protocol["samples"], protocol["reference"]
    rows = [
        ("FID", m["fid"], ".4f", ""),
        ("sFID", m["sfid"], ".4f", ""),
        (
            "Inception Score",
            m["inception_score"],
            ".4f",
            f" +- {m['inception_score_spread']:.4f} over groups of {protocol['method']['split_images']:,}",
        ),
        ("precision", m["precision"], ".4f", ""),
        ("recall", m["recall"], ".4f", ""),
    ]
    if "reconstruction" in figures:
        made = figures["reconstruction"]
        rows += [("PSNR, dB", made["psnr_db"], ".3f", ""), ("SSIM", made["ssim"], ".4f", "")]
    lines = [
        f"{samples['images']:,} images of {samples['width']} x {samples['height']} pixels against "
        f"{reference['file']} (statistics: "
        f"{reference['statistics']}; {reference['precision_images']:,} images for precision and recall)"
    ]
    lines += [
        f"  {name:16} {'not measured' if value is None else f'{value:{form}}'}{more if value is not None else ''}"
        for name, value, form, more in rows
    ]
    return "\n".join(lines) + "\n"

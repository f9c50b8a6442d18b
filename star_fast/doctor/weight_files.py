"""The weights files in a folder: what each is, read off its table of contents, and what is damaged."""

from __future__ import annotations

import os
from pathlib import Path

from star_fast.doctor.findings import MISSING, OK, WITHOUT, Finding
from star_fast.errors import UserError
from star_fast.evaluation.inception import WEIGHTS_FILE, WEIGHTS_SHA256
from star_fast.model.llamagen import checkpoint_config, open_checkpoint
from star_fast.model.tokenizer import tokenizer_config
from star_fast.storage import sha256_of_bytes

_SUFFIXES = {".pt", ".pth", ".safetensors"}
_MOST_FILES = 100
_MOST_BYTES = 2**28  # of Inception's weights, which are hashed


def weight_files(folder: Path) -> list[Finding]:
    """Every weights file in `folder` and below, none of them read whole but Inception's.

    Raises:
        UserError: no such folder.
    """
    if not os.path.isdir(folder):  # of os.path: unlike Path.is_dir it raises for no name
        raise UserError(f"--weights: expected a folder of weights files, got {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    found = [_file(path, str(path.relative_to(folder))) for path in files[:_MOST_FILES]]
    if len(files) > _MOST_FILES:
        found.append(Finding(WITHOUT, "more", f"{len(files) - _MOST_FILES} files were not looked at"))
    kinds = " ".join(finding.told for finding in found if finding.mark == OK)
    if "VQ tokenizer" not in kinds:
        found.append(
            Finding(
                WITHOUT,
                "VQ tokenizer",
                "none here: LlamaGen's models need its vq_ds16_c2i.pt to make pictures of codes",
            )
        )
    return found


def _file(path: Path, name: str) -> Finding:
    size = "unreadable"
    try:
        size = f"{path.stat().st_size / 1e6:,.1f} MB"
        if path.name == WEIGHTS_FILE:
            return _inception(path, size)
        with open_checkpoint(path) as checkpoint:
            if "quantize.embedding.weight" in checkpoint.weights:
                config = tokenizer_config(checkpoint.weights, path)
                return Finding(
                    OK,
                    name,
                    f"VQ tokenizer, {config.codebook} codes, 1 for {config.downsampling} x {config.downsampling} "
                    f"pixels, {size}",
                )
            model = checkpoint_config(path, checkpoint)
            return Finding(
                OK,
                name,
                f"transformer, {model.blocks} blocks, width {model.width}, {model.vocab} codes, {model.positions} "
                "an image, "
                f"{model.num_classes} classes, {size}",
            )
    except (UserError, OSError) as error:
        return Finding(
            MISSING,
            name,
            f"{str(error).removeprefix(f'{path}: ')} ({size})",
            "copy or download it again, if it is meant to be weights of a model",
        )


def _inception(path: Path, size: str) -> Finding:
    whole = path.stat().st_size <= _MOST_BYTES and sha256_of_bytes(path.read_bytes()) == WEIGHTS_SHA256
    if whole:
        return Finding(OK, path.name, f"Inception, its hash is right, {size}")
    return Finding(
        MISSING,
        path.name,
        f"its sha256 is not Inception's: damaged, or another file ({size})",
        "star-fast evaluate --download ...   (96 MB)",
    )

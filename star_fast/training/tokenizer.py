"""Which tokenizer a code store is made with: one that is given, the one that is kept beside the codes, or one trained
on the images.

Training starts from random weights, or fine-tunes a tokenizer of ours or a released one (tokenizer_training.py).
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from star_fast.config import ConfigError, DataConfig, TokenizerConfig
from star_fast.data.manifest import differences, is_begun, is_finished, tokenizer_of
from star_fast.data.prepare import collect_views
from star_fast.data.sources import DataError, ImageSource, split_of
from star_fast.data.views import view_names, view_settings
from star_fast.errors import UserError, printable
from star_fast.model.llamagen import load_tokenizer
from star_fast.model.tokenizer import CONFIG_FILE, VQTokenizer, at_size
from star_fast.storage import StorageError, read_record, remove_leftovers
from star_fast.training.tokenizer_limits import SHAPE, require_possible, require_same_shape
from star_fast.training.tokenizer_report import TrainingRecord
from star_fast.training.tokenizer_state import (
    RECORD_FILE,
    recorded,
    remove_state,
    require_same_seed,
    require_same_settings,
    require_same_start,
)
from star_fast.training.tokenizer_training import REPORT_FILE, train_tokenizer

TOKENIZER_FOLDER = "tokenizer"  # within a code store's
FINE_TUNING_LR = 1e-4  # (LlamaGen)


def train_tokenizer_on(
    source: ImageSource,
    config: TokenizerConfig,
    data: DataConfig,
    *,
    out: str | Path,
    seed: int = 0,
    limit_bytes: int = 2**31,
    device: str | torch.device = "cpu",
    progress: bool = True,
    start: VQTokenizer | None = None,
) -> VQTokenizer:
    """Train a tokenizer on views of the source's train split, and measure it on untouched held-out images; what
    `star-fast prepare` does when none is given.

    The split is the code store's (splits.split_of). At most `limit_bytes` of views are held in memory.
    `start`: the tokenizer to fine-tune; None: random weights.
    """
    require_possible(config, torch.device(device))
    train, held_out = split_of(source, data.held_out_share)
    images = collect_views(source, train, data, config, limit_bytes=limit_bytes, progress=progress)
    unseen = (
        collect_views(source, held_out, data, config, limit_bytes=limit_bytes // 8, plain_only=True, progress=progress)
        if len(held_out)
        else None
    )
    return train_tokenizer(
        images,
        config,
        seed=seed,
        out=out,
        held_out=unseen,
        device=device,
        progress=progress,
        trained_on=_about(source, data),
        start=start,
    )


def tokenizer_for(
    source: ImageSource,
    out: str | Path,
    config: TokenizerConfig,
    data: DataConfig,
    *,
    given: str = "",
    asked: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    fine_tune: str = "",
    defaults: TokenizerConfig | None = None,
    image_size: int = 0,
) -> VQTokenizer:
    """The tokenizer that the code store in folder `out` is to be made with, on the CPU or `device`; it is kept in
    `out`/tokenizer.

    Args:
        config: of a tokenizer to train. asked: whether somebody chose these settings, rather than leaving them as they
            are.
        given: a tokenizer's file or folder; empty: the one that is kept there, else one is trained.
        fine_tune: the file (LlamaGen's VQ-16) or folder (ours) of a tokenizer to train from, instead of random weights.
            Its shape is kept.
        defaults: what `config` was before somebody chose among its settings; with fine_tune, settings that equal it are
            taken from that tokenizer (fine_tuning_config). None: all of `config` is meant.
        image_size: pixels a side of the views that the one `given` is to encode; 0: as its file or folder says.

    Raises:
        ConfigError: the tokenizer kept there, or the one that the codes there were made with, has other settings or
            another seed, or is another than the one given; the line names the setting. UserError: it was trained on
            other images. StorageError: it is damaged.
    """
    out = Path(out)
    kept, made_by = out / TOKENIZER_FOLDER, tokenizer_of(out)
    there = os.path.lexists(kept / CONFIG_FILE)
    hint = f"choose another --out, or delete {out}"
    if not is_finished(out):
        remove_leftovers(kept)
    if given and fine_tune:
        raise ConfigError(
            f"fine_tune: {fine_tune} is to be trained, and {given} is given to be used as it is; leave one of the "
            "two out"
        )
    if given:
        return _keep(at_size(load_tokenizer(given), image_size), given, kept, made_by, hint)
    start = load_tokenizer(fine_tune).float() if fine_tune else None
    if start is not None:
        config = fine_tuning_config(start, config, defaults)
    if not there and made_by:
        raise StorageError(
            f"{kept / CONFIG_FILE}: not found, and the codes in {out} need the tokenizer {made_by[:12]} that was "
            "there; put it back, give it "
            "with --tokenizer, or delete the folder"
        )
    if not there:
        return train_tokenizer_on(
            source, config, data, out=kept, seed=seed, device=device, progress=progress, start=start
        )
    try:
        tokenizer = VQTokenizer.load(kept)
    except UserError as error:
        raise StorageError(f"{error}; put back what was there, or delete {out} to start afresh") from error
    if made_by and tokenizer.weights_hash() != made_by:
        raise StorageError(
            f"{kept}: not the tokenizer {made_by[:12]} that the codes in {out} were made with, but "
            f"{tokenizer.weights_hash()[:12]}; "
            "put that back, or delete both"
        )
    trained_here = os.path.lexists(kept / REPORT_FILE)
    if start is not None and not trained_here:
        raise ConfigError(
            f"fine_tune: {kept} holds a tokenizer that was given, not trained; leave it out to use that one, or {hint}"
        )
    if trained_here or asked:
        require_same_settings(tokenizer.config, recorded(config), f"{kept} holds a tokenizer", hint)
    if trained_here:
        record = read_record(kept / REPORT_FILE, TrainingRecord, hint, ignore_unknown=True)
        require_same_seed(record.seed, seed, f"{kept} holds a tokenizer trained", hint)
        require_same_start(
            record.started_from,
            "" if start is None else start.weights_hash(),
            f"{kept} holds a tokenizer trained",
            hint,
        )
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
        raise DataError(
            f"{given}: the tokenizer must be float32, got {tokenizer.dtype}: a rounded tokenizer gives other codes"
        )
    if made_by and made_by != ours:
        raise ConfigError(
            f"tokenizer: {given} is {ours[:12]}, the codes in {kept.parent} were made with {made_by[:12]}; give "
            f"that one, {hint}"
        )
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
    return {
        "source": source.description(),
        "views": len(view_names(data)),
        "view_settings": view_settings(data, 0),
        "held_out_share": data.held_out_share,
    }


def fine_tuning_config(
    start: VQTokenizer, config: TokenizerConfig, defaults: TokenizerConfig | None
) -> TokenizerConfig:
    """The settings of a training that starts from `start`: its shape, and of `config` how to train.

    Args:
        config: the settings asked for. defaults: what they are where nobody chose: those that differ were chosen. None:
            all of them were.

    Returns:
        `config` with the shape of `start`; with its image_size where nobody chose one (256 of a released file, which
        does not tell). What would undo what was learnt is taken only where somebody chose it: else the learning rate is
        FINE_TUNING_LR, and no unused code is moved.

    Raises:
        ConfigError: a setting of the shape was chosen, and is not the tokenizer's.
    """
    chosen = {
        f.name
        for f in fields(TokenizerConfig)
        if defaults is None or getattr(config, f.name) != getattr(defaults, f.name)
    }
    shape: dict[str, Any] = {name: getattr(start.config, name) for name in (*SHAPE, "image_size") if name not in chosen}
    usual: dict[str, Any] = {"lr": FINE_TUNING_LR, "reseed_every_steps": 0}
    gentle = {name: value for name, value in usual.items() if name not in chosen}
    config = replace(config, **shape, **gentle)
    require_same_shape(start.config, config)
    return config

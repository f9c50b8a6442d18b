"""Model folders as Hugging Face's hub holds them: a card that says what the weights are, and files of a repository,
asked for by a name of their own.

A model folder (weights.py) is config.json, model.safetensors and tokenizer/ already; the card, README.md, makes it a
repository. Nothing is downloaded unless its name begins with hf://.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from star_fast.config import ModelConfig
from star_fast.errors import UserError, printable

PREFIX = "hf://"
_NAME = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+))?", re.ASCII)
WANTED = ["config.json", "*.safetensors", "tokenizer/*.json", "tokenizer/*.safetensors", "README.md"]
_NAMES_SHOWN = 20


def fetch(name: str) -> Path:
    """The folder, or the file, that hf://OWNER/REPOSITORY or hf://OWNER/REPOSITORY/FILE names: from the hub's cache on
    this machine, else downloaded.

    Raises:
        UserError: no such name, huggingface_hub is not installed, or it could not get it (no network, no such
            repository, no permission).
    """
    found = _NAME.fullmatch(name)
    if not found:
        raise UserError(f"{name[:200]}: expected hf://OWNER/REPOSITORY, or hf://OWNER/REPOSITORY/FILE")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{name}: downloading needs huggingface_hub, which cannot be imported ({error}): pip install "
            "'star_fast[hub]', or copy the files here "
            "and give their folder"
        ) from error
    try:
        if found["file"]:
            return Path(huggingface_hub.hf_hub_download(found["repository"], found["file"]))
        return Path(huggingface_hub.snapshot_download(found["repository"], allow_patterns=WANTED))
    except Exception as error:  # the errors of its network libraries share no class
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{name}: cannot be had from the hub ({reason[:200]}); see to the network and the name, or copy the "
            "files here and give their "
            "folder"
        ) from error


def model_card(
    config: ModelConfig,
    class_names: Sequence[str],
    *,
    record: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a model folder, in Markdown with the front matter that the hub reads.

    Args:
        record: what training noted of the run.
        metrics: what `star-fast evaluate` wrote: its figures, warnings and the protocol they were measured by.
    """
    plain = not any((record.get("method") or {}).get(name) for name in ("mask_ratio", "mim_weight", "contrast_weight"))
    more = len(class_names) - _NAMES_SHOWN
    names = ", ".join(map(printable, class_names[:_NAMES_SHOWN])) + (f" and {more:,} more" if more > 0 else "")
    how = (
        "next-token prediction alone"
        if plain
        else "ST-AR: next-token prediction, masked features and contrasts against a moving average of itself"
    )
    lines = [
        "---",
        "library_name: star_fast",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        "- autoregressive",
        "- llamagen",
        *(["- st-ar"] if not plain else []),
        "---",
        "",
        "# Class-conditional image model",
        "",
        f"A LlamaGen transformer (arXiv 2406.06525) of {config.blocks} blocks, {config.heads} heads and width "
        f"{config.width}, which draws "
        f"{config.positions} codes of a codebook of {config.vocab:,} for an image.",
    ]
    lines += [f"Trained by {how}{'' if plain else ' (arXiv 2509.15185)'}."] if record.get("method") else []
    lines += [
        "",
        f"{len(class_names):,} classes: {names}.",
        "",
        "```python",
        "import star_fast",
        "",
        'model = star_fast.load("FOLDER")  # this one, or hf://OWNER/REPOSITORY',
        "model.sample(0, n=8)",
        "```",
        "",
    ]
    if metrics:
        lines += [
            "## Figures",
            "",
            "| | |",
            "|---|---|",
            *(
                f"| {name.replace('_', ' ')} | {value:.4g} |"
                for name, value in metrics.get("metrics", {}).items()
                if isinstance(value, (int, float))
            ),
            "",
            *(f"Warning: {printable(line)}" for line in metrics.get("warnings", ())),
            "",
            "### Protocol",
            "",
            *_as_json(metrics.get("protocol", {})),
        ]
    lines += ["## Training record", "", *(_as_json(record) if record else ["None: the weights came without one."])]
    lines += ["", "The sha256 of each weights file is in config.json."]
    return "\n".join(lines) + "\n"


def _as_json(values: Mapping[str, Any]) -> list[str]:
    return ["```json", json.dumps(values, indent=2, default=str), "```", ""]

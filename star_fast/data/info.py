"""What a code store says about itself, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from star_fast.data.codes import CodeStore
from star_fast.data.sources import class_sizes

_MOST_NAMES = 10


def describe(store: CodeStore) -> Iterator[str]:
    """Lines of a name and a value: sizes, classes, split, how the codes were made, files with their hashes."""
    about = store.manifest
    sizes = class_sizes(store.labels.numpy(), store.class_names)
    counts = sorted(sizes.values())
    rows = [
        (
            "images",
            f"{len(store):,} ({len(store.train_indices):,} train, {len(store.held_out_indices):,} held out, "
            f"{len(about['skipped'])} skipped)",
        ),
        (
            "classes",
            f"{len(store.class_names):,}, of {counts[0]:,} to {counts[-1]:,} images: {_some(store.class_names)}",
        ),
        ("views", f"{len(store.views)}: {'; '.join(store.views)}"),
        (
            "codes",
            f"{store.positions} a view ({store.grid[0]} x {store.grid[1]}), of a codebook of {store.codebook:,}; "
            f"images of {store.image_size} "
            f"pixels, {'gray' if about.get('image_channels', 3) == 1 else 'RGB'}",
        ),
        ("made of", _pairs(about["source"])),
        ("views by", _pairs(about.get("view_settings", {}))),
        ("decoded by", about.get("decoder", "not recorded")),
        (
            "encoded in",
            about.get("precision", "fp32")
            + (
                f"; codes that differ from float32's: {100 * about['bf16']['codes_that_differ']:.2f} % "
                f"({about['bf16']['images']} images)"
                if "bf16" in about
                else ""
            ),
        ),
        ("made with", _pairs(about.get("versions", {})) or "not recorded"),
        ("tokenizer", f"sha256 {store.tokenizer_hash}"),
        *((name, f"{record['bytes']:,} bytes, sha256 {record['sha256']}") for name, record in about["files"].items()),
    ]
    width = max(len(name) for name, _ in rows)
    yield f"{store.path}: format version {about['format_version']}"
    yield from (f"  {name:{width}}  {value}" for name, value in rows)


def _some(names: tuple[str, ...]) -> str:
    return "; ".join(names[:_MOST_NAMES]) + (" ..." if len(names) > _MOST_NAMES else "")


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {_pairs(value) if isinstance(value, dict) else value}"
        for name, value in values.items()
    )

"""Where the images of a code store were found, so that nobody has to say it again: source.json, beside the store's
files and no part of what it is.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace

from star_fast.data.codes import CodeStore
from star_fast.data.sources import BUILT_IN, DataError, ImageSource, open_source
from star_fast.storage import atomic_write_json, read_record

ORIGIN_FILE = "source.json"


@dataclass(frozen=True)
class Origin:
    """What `open_source` was asked for; paths are absolute."""

    source: str
    labels: str = ""
    held_out_source: str = ""
    held_out_labels: str = ""

    def absolute(self) -> Origin:
        """The same from any folder."""
        return Origin(
            *(value if value in ("", BUILT_IN) else os.path.abspath(value) for value in asdict(self).values())
        )

    def open(self, class_names: str = "", progress: bool = True) -> ImageSource:
        """The images. Raises DataError where there are none."""
        return open_source(
            self.source,
            labels=self.labels,
            held_out=self.held_out_source,
            held_out_labels=self.held_out_labels,
            class_names=class_names,
            progress=progress,
        )


def write_origin(store: CodeStore, origin: Origin) -> None:
    """Note where the store's images were found."""
    atomic_write_json(store.path / ORIGIN_FILE, asdict(origin.absolute()))


def images_of(store: CodeStore, elsewhere: str = "") -> ImageSource | None:
    """The images that a store was made of, from where source.json says, or from `elsewhere` if they have moved; None
    where neither is known.

    Raises:
        DataError: they are not there, or are other images.
    """
    file = store.path / ORIGIN_FILE
    origin = read_record(file, Origin, "delete it, and say where the images are") if file.exists() else Origin("")
    if store.manifest["source"].get("kind") == "built-in digits":
        origin = Origin(BUILT_IN)
    if elsewhere:
        origin = replace(origin, source=elsewhere)
    if not origin.source:
        return None
    source = origin.open(progress=False)
    require_same_images(store, source, origin.source)
    return source


def require_same_images(store: CodeStore, source: ImageSource, name: str) -> None:
    """Raise DataError, with the entry that differs, unless the store was made of these images."""
    found, expected = source.description(), store.manifest["source"]
    if found != expected:
        differing = ", ".join(
            f"{key} {expected.get(key)!r} there and {found.get(key)!r} here"
            for key in sorted({*found, *expected})
            if found.get(key) != expected.get(key)
        )
        raise DataError(
            f"{name}: not the images that {store.path} was made of ({differing}); give what was given to "
            "`star-fast prepare`"
        )

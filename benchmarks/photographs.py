"""Files like ImageNet's for the benchmarks of loading: JPEGs of about 500 x 375 pixels, made from the photographs
inside installed packages.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def sources() -> list[Image.Image]:
    """Photographs that come with scikit-learn and matplotlib."""
    import matplotlib
    from sklearn.datasets import load_sample_images

    portrait = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"
    return [*map(Image.fromarray, load_sample_images().images), Image.open(portrait).convert("RGB")]


def photographs(count: int, seed: int = 0) -> list[bytes]:
    """`count` different files: random cuts of the photographs, mirrored or not, 4:2:0, quality 90 to 95; three of four
    lie, a quarter stand.

    One in eight is twice as large, as some of ImageNet's are: these ADM halves before it resizes.
    """
    random, images = np.random.RandomState(seed), sources()
    made = []
    for number in range(count):
        image = images[number % len(images)]
        width, height = (500, 375) if random.rand() < 0.75 else (375, 500)
        scale = min(image.width / width, image.height / height) * random.uniform(0.7, 1)
        box_width, box_height = int(width * scale), int(height * scale)
        left, top = random.randint(image.width - box_width + 1), random.randint(image.height - box_height + 1)
        factor = 2 if number % 8 == 7 else 1
        cut = image.crop((left, top, left + box_width, top + box_height)).resize(
            (factor * width, factor * height), Image.Resampling.BICUBIC
        )
        made.append(encoded(ImageOps.mirror(cut) if random.rand() < 0.5 else cut, quality=int(random.randint(90, 96))))
    return made


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()

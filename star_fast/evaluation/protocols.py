"""Protocols that published numbers were made with, and how a measurement departs from one: a number without its
protocol compares with nothing.
"""

from __future__ import annotations

from typing import Any, Literal

from star_fast.evaluation.inception import WEIGHTS_SHA256

KnownProtocol = Literal["", "adm-imagenet-256"]

# Each setting as `settings_of` names it. What a protocol leaves to the sampler (guidance, temperature, labels) is part
# of the result, not of it.
_PROTOCOLS: dict[str, dict[str, Any]] = {
    "adm-imagenet-256": {
        "sample images": 50_000,
        "sample pixels": "256 x 256",
        "cut of samples": "none",
        "samples from JPEG files": 0,
        "skipped samples": 0,
        "reference file": "VIRTUAL_imagenet256_labeled.npz",
        "reference statistics": "stored",
        "reference images for precision and recall": 10_000,
        "reference features for precision and recall": "images of 256 x 256 pixels",
        "Inception weights": WEIGHTS_SHA256,
        "Inception network": "TensorFlow graph of 2015-12-05",
        "resize to Inception": "TensorFlow 1 bilinear to 299 x 299",
        "distances of precision and recall": "float16",
        "neighbours": 3,
        "images of a group of the Inception Score": 5000,
        "matrix square root": "scipy sqrtm, 1e-6 on the diagonals where it fails",
    },
}


def settings_of(protocol: dict[str, Any]) -> dict[str, Any]:
    """The settings of a measurement's protocol record (see evaluate.py), named as above."""
    samples, reference, network, method = (protocol[name] for name in ("samples", "reference", "inception", "method"))
    return {
        "sample images": samples["images"],
        "sample pixels": f"{samples['width']} x {samples['height']}",
        "cut of samples": samples.get("cut", "none"),
        "samples from JPEG files": samples.get("jpeg_images", 0),
        "skipped samples": len(samples["skipped"]),
        "reference file": reference.get("file", "none"),
        "reference statistics": reference["statistics"],
        "reference images for precision and recall": reference["precision_images"],
        "reference features for precision and recall": reference["precision_from"],
        "Inception weights": network["weights_sha256"],
        "Inception network": network["network"],
        "resize to Inception": network["resize"],
        "distances of precision and recall": method["distances"],
        "neighbours": method["neighbours"],
        "images of a group of the Inception Score": method["split_images"],
        "matrix square root": method["matrix_root"],
    }


def departures(protocol: dict[str, Any], known: str) -> list[str]:
    """Every setting of a measurement that differs from the protocol called `known`: one line each."""
    here = settings_of(protocol)
    return [
        f"{name}: {here[name]} here, {there} in {known}"
        for name, there in _PROTOCOLS[known].items()
        if here[name] != there
    ]

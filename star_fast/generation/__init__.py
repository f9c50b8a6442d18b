"""Weights to images: one decoding step, the loop around it, and many images into one file."""

from star_fast.generation.decoder import Decoder, generate

__all__ = ["Decoder", "generate"]

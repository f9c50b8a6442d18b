"""Triton kernels, one file an op; reached through star_fast.ops only."""

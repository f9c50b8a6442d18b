"""star_fast: ST-AR self-guided training of autoregressive image models, with fused kernels and fast exact sampling."""

__version__ = "0.1.0"

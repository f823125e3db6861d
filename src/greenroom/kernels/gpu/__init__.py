"""Triton's half of `kernels.device`: what runs on the GPU. Importing a module of this package imports triton."""

MOST_TOKENS = 16
"""What `device.token` and `device.pairs` take at once; more go through `device.prompt`."""

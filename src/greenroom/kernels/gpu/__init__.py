"""Triton's half of `kernels.device`: what runs on the GPU. Importing a module of this package imports triton."""

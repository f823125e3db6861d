"""Benchmarks: `python -m benchmarks.cpu` compares with llama.cpp; docs/performance.md says how to read it."""

"""Benchmarks: kernels (`harness`), the real model (`gemma`), end to end (`e2e`)."""

"""Benchmarks: every figure is a median of interleaved runs, and a ratio to a baseline beside it."""

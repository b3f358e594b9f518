"""Datasets: each published format, and the synthetic default, becomes one memory-mapped store."""

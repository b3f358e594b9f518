"""Benchmarks: ratios measured in one run, for anyone to run again."""

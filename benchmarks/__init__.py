"""Benchmarks: ratios measured in one run, for anyone to run again."""

import femfed  # noqa: F401  # sets the threads of NumPy's products, before NumPy is imported

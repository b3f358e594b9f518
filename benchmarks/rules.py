"""What the rules that see every update make of a cohort's, by themselves.

    python -m benchmarks.rules
    python -m benchmarks.rules --clients 30 100
    python -m benchmarks.rules --models cnn --clients 1000

Prints, per model, cohort and strategy, the median seconds of three calls with random updates, and
the most memory that a call took besides these, its result included.
"""

import argparse
import itertools
import time
import tracemalloc

import numpy as np

from benchmarks.bench import MODELS
from femfed import config
from femfed.strategies.base import Update

RULES = ("fedmedian", "fedtrimmedmean", "krum", "multikrum", "bulyan", "geometric_median")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--clients", nargs="+", type=int, default=[30])
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    for name, clients in itertools.product(options.models, options.clients):
        rows = draw.standard_normal((clients, MODELS[name].parameters), np.float32)
        updates = [Update(160, 1.0, 1, client=i, delta=[row]) for i, row in enumerate(rows)]
        for rule in RULES:
            strategy = config.make(config.compose([f"strategy={rule}"]).strategy, "strategy")
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                strategy.aggregate(updates)
                seconds.append(time.perf_counter() - start)
            tracemalloc.start()
            strategy.aggregate(updates)
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            print(
                f"{name:<10} {clients:>5} clients  {rule:<17} {np.median(seconds):>7.3f} s  "
                f"{peak:>6.1f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()

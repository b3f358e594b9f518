"""The main ratios in less than two minutes, for whoever changes the engine.

    python -m benchmarks.smoke

A round against the floor for 10 and 30 clients, what a round costs in which there is nothing to do,
and the idle share of the workers. Run it before and after a change, on a machine that does nothing
else; `benchmarks.overhead`, `flat`, `timeline` and `startup` say more.
"""

import time
from pathlib import Path

import numpy as np

from benchmarks import overhead, timeline
from benchmarks.bench import (
    CORES,
    MODELS,
    equal_writers,
    floor,
    job,
    noise_writers,
    run,
    temporary_cache,
)
from femfed.engine.ray import RayEngine
from femfed.models import Dense
from femfed.strategies.fedavg import FedAvg

WARM_UP, ROUNDS = 2, 50


def empty_rounds(folder: Path) -> list[float]:
    """Return the seconds of rounds of 10 clients with one image each, logistic regression."""
    model = Dense(invert=True, units=())
    work = job(noise_writers(folder, [2] * 10), model, 10, ROUNDS + WARM_UP + 1)
    seconds: list[float] = []
    with RayEngine(CORES, False, model.parameters) as engine:
        engine.run(run(work, lambda finished: seconds.append(finished.seconds_train)), folder)
    return seconds[WARM_UP:-1]


def main() -> None:
    """Measure and print a line each."""
    start = time.perf_counter()
    with temporary_cache() as folder:
        seconds = 1000 * np.array(empty_rounds(Path(folder)))
    print(
        f"a round with nothing to do: {np.median(seconds):.1f} ms "
        f"({seconds.min():.1f}-{seconds.max():.1f})",
        flush=True,
    )
    model = MODELS["cnn"]
    for clients, rounds in ((10, 5), (30, 3)):
        with temporary_cache() as folder, RayEngine(CORES, False, model.parameters) as engine:
            store = equal_writers(Path(folder), clients)
            work = job(store, model, clients, overhead.warm_up(FedAvg(), clients) + rounds)
            with floor(work) as bare:
                seconds, floors, _ = overhead.measure(engine, work, bare)
        print(
            f"cnn, {clients} clients: round / floor {overhead.ratio(seconds, floors)}", flush=True
        )
    with temporary_cache() as folder:
        shares = [timeline.idle(*each) for each in timeline.measure("cnn", 50, 2, Path(folder))]
    print(f"cnn, 50 clients as unequal as FEMNIST's: workers idle {100 * np.median(shares):.2f} %")
    print(f"in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

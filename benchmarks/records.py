"""What a round costs with all that it leaves: tables, checkpoint, what clients remember.

    python -m benchmarks.records
    python -m benchmarks.records --models leaf_cnn --clients 30 --strategies scaffold ditto

Other benchmarks time rounds alone, this one the way from the end of a round to the end of the next
one as `simulate.py` goes it, everything on the disk, with a checkpoint every round. After each, a
round of the floor is run, of which nothing is written: what the strategy has its clients compute
(`benchmarks.overhead`). The first five rounds do not count: files are new in them.
"""

import argparse
import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.bench import CORES, MODELS, equal_writers, floor, job, run, temporary_cache
from benchmarks.overhead import Seconds, ratio
from femfed import config
from femfed.engine.apps import Job
from femfed.engine.ray import RayEngine
from femfed.engine.rounds import Round
from femfed.report.progress import Progress
from femfed.results import Results

WARM_UP = 5  # rounds


def measure(engine: RayEngine, work: Job) -> tuple[Seconds, Seconds, Seconds]:
    """Return seconds of whole rounds, of what was left in them, and of the floor's."""
    found: list[tuple[float, float, float]] = []
    began = time.perf_counter()
    with (
        Path(os.devnull).open("w") as nowhere,
        Progress(work.schedule.rounds, "", False, False, nowhere) as progress,
        floor(work) as bare,
    ):
        folder = work.memory.parent
        results = Results(folder, work.store, work.federation, progress, 1, began)
        results.rewind(work.schedule.rounds)

        def on_round(finished: Round) -> None:
            nonlocal began
            ended = time.perf_counter()
            results.on_round(finished)
            written = time.perf_counter()
            found.append((written - began, written - ended, bare()))
            began = time.perf_counter()

        engine.run(run(work, on_round), folder)
    whole, left, floors = np.array(found[WARM_UP:-1]).T  # the last one evaluates
    return whole, left, floors


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--clients", nargs="+", type=int, default=[10])
    parser.add_argument("--strategies", nargs="+", default=["fedavg", "fedadam", "scaffold"])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print(f"{CORES} cores, 180 images a client, batch 20, 1 epoch, a checkpoint every round")
    print(
        "model      clients  strategy      own floor s  round s  of which to write  round/own floor"
    )
    for model, clients in itertools.product(options.models, options.clients):
        for name in options.strategies:
            strategy = config.make(config.compose([f"strategy={name}"]).strategy, "strategy")
            with (
                temporary_cache() as folder,
                RayEngine(CORES, False, MODELS[model].parameters) as engine,
            ):
                store = equal_writers(Path(folder), clients)
                rounds = WARM_UP + options.rounds + 1
                work = job(store, MODELS[model], clients, rounds, strategy=strategy)
                work = replace(work, memory=Path(folder) / "run" / "memory")
                whole, left, floors = measure(engine, work)
            print(
                f"{model:<10} {clients:>7}  {name:<12}  {np.median(floors):>11.3f}  "
                f"{np.median(whole):>7.3f}  {np.median(left):>17.3f}  {ratio(whole, floors)}",
                flush=True,
            )


if __name__ == "__main__":
    main()

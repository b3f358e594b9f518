"""Whether cost follows the work only: population, cohort, workers and length of a run.

    python -m benchmarks.flat
    python -m benchmarks.flat --parts population long --rounds 3

- population: 100 to 3,597 writers at a cohort of 10, rounds in turn: seconds, memory of the driver.
- cohort: 10 to 1,000 clients a round in turn: seconds a client, memory of all processes, and the
  workers' without the images, which are pages of a file that the workers share.
- workers: 1 to as many as cores, in turn: the speed-up of a round of 100 beside the bare floor's.
- long: 1,500 rounds of 10 clients with 20 images each: the memory of all processes, and the round
  beside the floor's, the last hundred rounds against those after the first fifty. Minutes differ by
  more than a round may slow down, and a floor's round right after each takes that out.

The model is the CNN with dropout; 180 images a client but for the last part.
"""

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.bench import CORES, MODELS, equal_writers, floor, job, run, temporary_cache
from benchmarks.memory import Memory, memory, show, without_files, worker_processes
from femfed.engine.federation import Federation
from femfed.engine.ray import RayEngine
from femfed.engine.rounds import Round

MODEL = MODELS["cnn"]
WRITERS = 3_597
POPULATIONS = (100, 1_000, WRITERS)
COHORTS = (10, 30, 100, 300, 1_000)
LENGTH, WARM, LAST = 1_500, 50, 100


def rounds_of(
    engine: RayEngine, folder: Path, writers: int, population: int, cohort: int, rounds: int
) -> list[float]:
    """Return the seconds of some rounds; the workers know the store from the last call."""
    work = job(equal_writers(folder, writers), MODEL, cohort, rounds + 1)
    work = replace(
        work,
        schedule=replace(work.schedule, clients=population),
        federation=Federation(np.arange(population), np.zeros(0, np.int64)),
    )
    seconds: list[float] = []
    engine.run(run(work, lambda finished: seconds.append(finished.seconds_train)), folder)
    return seconds[1:]


def in_turn(
    sizes: tuple[int, ...], rounds: int, once: Callable[[int], list[float]], of: str
) -> None:
    """Measure all sizes in turn, again and again, and print each beside the first."""
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    memories: dict[int, Memory] = {}
    for size in sizes:
        once(size)  # first touches of memory
    for _ in range(rounds):
        for size in sizes:
            seconds[size] += once(size)
            memories[size] = memory()
    for size in sizes:
        median = float(np.median(seconds[size]))
        first = float(np.median(seconds[sizes[0]]))
        driver, workers = memories[size]
        print(
            f"{of} {size:>5}: {median:8.3f} s a round  {median / first:7.3f} x {of} {sizes[0]}  "
            f"driver {driver:7.1f} MiB, workers {workers:7.1f} MiB",
            flush=True,
        )


def population(folder: Path, rounds: int) -> None:
    """A cohort of 10 out of ever more writers."""
    with RayEngine(CORES, False, MODEL.parameters) as engine:
        in_turn(
            POPULATIONS,
            rounds,
            lambda size: rounds_of(engine, folder, WRITERS, size, 10, 3),
            "population",
        )


def cohort(folder: Path, rounds: int) -> None:
    """Ever larger cohorts, down to seconds a client."""
    seconds: dict[int, list[float]] = {size: [] for size in COHORTS}
    with RayEngine(CORES, False, MODEL.parameters) as engine:
        for _ in range(rounds):
            for size in COHORTS:
                count = max(1, 30 // size)
                seconds[size] += rounds_of(engine, folder, max(COHORTS), max(COHORTS), size, count)
                driver, workers = memory()
                each = float(np.median(seconds[size])) / size
                without = sum(map(without_files, worker_processes()))
                print(
                    f"cohort {size:>5}: {1000 * each:7.2f} ms a client  driver {driver:7.1f} MiB, "
                    f"workers {workers:7.1f} MiB, without files {without:7.1f} MiB",
                    flush=True,
                )


def workers(folder: Path, rounds: int) -> None:
    """From one worker to one a core, each beside its floor, again and again."""
    counts = range(1, CORES + 1)
    store = equal_writers(folder, 100)
    jobs = {count: job(store, MODEL, 100, 4, workers=count) for count in counts}
    found: dict[tuple[str, int], list[float]] = {}
    with contextlib.ExitStack() as floors:
        bare = {count: floors.enter_context(floor(work)) for count, work in jobs.items()}
        for _ in range(rounds):
            for count, work in jobs.items():
                seconds: dict[str, list[float]] = {"round": [], "floor": []}

                def on_round(
                    finished: Round,
                    seconds: dict[str, list[float]] = seconds,
                    once: Callable[[], float] = bare[count],
                ) -> None:
                    if not finished.is_last:  # which is evaluated
                        seconds["round"].append(finished.seconds_train)
                        seconds["floor"].append(once())

                with RayEngine(count, False, MODEL.parameters) as engine:
                    engine.run(run(work, on_round), folder)
                for name, values in seconds.items():
                    found.setdefault((name, count), []).append(float(np.median(values[1:])))
    for count in counts:
        line = "  ".join(
            f"{name} {np.median(found[name, count]):7.3f} s, "
            f"{np.median(np.divide(found[name, 1], found[name, count])):5.3f} x as fast as with one"
            for name in ("round", "floor")
        )
        print(f"workers {count}: {line}", flush=True)


def long(folder: Path, _: int) -> None:
    """As many rounds as the Adaptive Federated Optimization paper ran."""
    work = job(equal_writers(folder, 10, examples=20), MODEL, 10, LENGTH + 1)
    windows = {WARM: range(WARM + 1, WARM + LAST + 1), LENGTH: range(LENGTH - LAST + 1, LENGTH + 1)}
    seconds: dict[int, list[tuple[float, float]]] = {WARM: [], LENGTH: []}
    memories: dict[int, Memory] = {}
    with floor(work) as bare, RayEngine(CORES, False, MODEL.parameters) as engine:

        def on_round(finished: Round) -> None:
            for mark, rounds in windows.items():
                if finished.number in rounds:
                    seconds[mark].append((finished.seconds_train, bare()))
            if finished.number in windows:
                memories[finished.number] = memory()

        engine.run(run(work, on_round), folder)
    show("round", WARM, LENGTH, memories)
    ratios = {}
    for mark, pairs in seconds.items():
        rounds, floors = np.transpose(pairs)
        ratios[mark] = float(np.median(rounds / floors))
        print(
            f"{LAST} rounds {'after' if mark == WARM else 'until'} {mark}: "
            f"{1000 * np.median(rounds):6.1f} ms  floor {1000 * np.median(floors):6.1f} ms  "
            f"round/floor {ratios[mark]:.3f}"
        )
    print(f"a round beside its floor: {100 * (ratios[LENGTH] / ratios[WARM] - 1):+.2f} %")


PARTS = {each.__name__: each for each in (population, cohort, workers, long)}


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each part")
    options = parser.parse_args()
    for name in options.parts:
        with temporary_cache() as folder:
            PARTS[name](Path(folder), options.rounds)


if __name__ == "__main__":
    main()

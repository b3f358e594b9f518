"""Whether memory grows: from round 5 to round 50, and from the second run of a sweep to the tenth.

python -m benchmarks.memory [MODEL]
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.bench import CORES, MODELS, equal_writers, job, run, temporary_cache
from benchmarks.faults import family
from femfed.engine.ray import RayEngine
from femfed.engine.rounds import Round

FIRST, LAST = 5, 50  # rounds
SECOND, TENTH = 2, 10  # runs

Memory = tuple[float, float]


def resident(pid: int | str) -> float:
    """Return a process's resident memory in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def without_files(pid: int | str) -> float:
    """Return a process's resident memory in MiB without the pages of files on the disk."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kinds = ("RssAnon:", "RssShmem:")
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) / 1024


def worker_processes() -> list[int]:
    """Return the process ids of this process's workers."""
    return [pid for pid, line in family(os.getpid()).items() if "ray::Client" in line]


def memory() -> Memory:
    """Return the resident memory of this process and of the workers in MiB."""
    return resident("self"), sum(map(resident, worker_processes()))


def show(what: str, first: int, last: int, found: dict[int, Memory]) -> None:
    """Print the driver's and the workers' memory at two moments."""
    for name, before, after in zip(("driver", "workers"), found[first], found[last], strict=True):
        growth = 100 * (after / before - 1)
        print(f"{name:<8} {what} {first}: {before:7.1f} MiB  ", end="")
        print(f"{what} {last}: {after:7.1f} MiB  {growth:+.2f} %", flush=True)


def main() -> None:
    """Run 51 rounds of 10 clients, then ten short runs of other seeds on the same workers."""
    model = MODELS[sys.argv[1] if len(sys.argv) > 1 else "cnn"]
    rounds: dict[int, Memory] = {}
    runs: dict[int, Memory] = {}

    def on_round(finished: Round) -> None:
        if finished.number in (FIRST, LAST):
            rounds[finished.number] = memory()

    with temporary_cache() as folder, RayEngine(CORES, False, model.parameters) as engine:
        work = job(equal_writers(Path(folder), 10), model, 10, LAST + 1)
        engine.run(run(work, on_round), Path(folder))
        show("round", FIRST, LAST, rounds)
        for number in range(1, TENTH + 1):
            schedule = replace(work.schedule, seed=number, rounds=2)
            short = run(replace(work, schedule=schedule), lambda finished: None)
            engine.run(short, Path(folder))
            if number in (SECOND, TENTH):
                runs[number] = memory()
        show("run", SECOND, TENTH, runs)


if __name__ == "__main__":
    main()

"""Whether memory grows: the driver's and the workers' from round 5 to round 50.

python -m benchmarks.memory [MODEL]
"""

import os
import sys
from pathlib import Path

from benchmarks.bench import CORES, MODELS, equal_writers, job, run, temporary_cache
from benchmarks.faults import family
from femfed.engine.ray import RayEngine
from femfed.engine.rounds import Round

FIRST, LAST = 5, 50


def resident(pid: int | str) -> float:
    """Return a process's resident memory in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    """Run 51 rounds of 10 clients and print the memory of all processes at two of them."""
    model = sys.argv[1] if len(sys.argv) > 1 else "cnn"
    found: dict[int, tuple[float, float]] = {}
    with temporary_cache() as folder, RayEngine(CORES, False, MODELS[model].parameters) as engine:
        store = equal_writers(Path(folder), 10)
        work = job(store, MODELS[model], 10, LAST + 1)

        def on_round(finished: Round) -> None:
            if finished.number in (FIRST, LAST):
                lines = family(os.getpid()).items()
                workers = sum(resident(pid) for pid, line in lines if "ray::ClientApp" in line)
                found[finished.number] = (resident("self"), workers)

        engine.run(run(work, on_round), Path(folder))
    for name, before, after in zip(("driver", "workers"), found[FIRST], found[LAST], strict=True):
        growth = 100 * (after / before - 1)
        print(
            f"{model} {name:<8} round {FIRST}: {before:7.1f} MiB  round {LAST}: {after:7.1f} MiB",
            end="",
        )
        print(f"  {growth:+.2f} %")


if __name__ == "__main__":
    main()

"""From the command typed to the end of round 1, and its parts.

    python -m benchmarks.startup [key=value ...]

Runs `python simulate.py rounds=2` as a user does, first with an empty dataset cache (the synthetic
writers are drawn), then again; then a sweep of four seeds, for what its later jobs take from the
end of the job before to the end of their own round 1; and `--help`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench import temporary_cache

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "opening": "python and Hydra",
    "starting": "dataset opened",
    "round 1/2": "round 1 done",
}
ENDED = "process ended"


def lines_of(*arguments: str) -> Iterator[tuple[float, str]]:
    """Yield the lines that simulate.py prints and its end, with the seconds since it was typed."""
    command = [sys.executable, "simulate.py", *arguments]
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield time.perf_counter() - start, line
    if process.returncode:
        raise SystemExit(f"simulate.py ended with {process.returncode}")
    yield time.perf_counter() - start, ENDED


def once(folder: Path, run: Path, overrides: list[str]) -> dict[str, float]:
    """Return the seconds to each stage of one run, read off its plain output."""
    stages: dict[str, float] = {}
    for now, line in lines_of(
        "rounds=2", f"cache={folder}/cache", f"hydra.run.dir={run}", *overrides
    ):
        for begins, stage in STAGES.items():
            if line.startswith(begins):
                stages[stage] = now
        stages[ENDED] = now
    summary = json.loads((run / "summary.json").read_text())["seconds"]
    stages["(workers ready)"] = summary["startup"]
    return stages


def later_jobs(folder: Path, overrides: list[str]) -> list[float]:
    """Return the seconds of a sweep's jobs but the first, from the last one's end to round 1."""
    seconds, ended = [], None
    sweep = (f"cache={folder}/cache", f"hydra.sweep.dir={folder}/sweep", "seed=0,1,2,3")
    for now, line in lines_of("-m", "rounds=2", *sweep, *overrides):
        if line.startswith("results in"):
            ended = now
        elif line.startswith("round 1/2") and ended is not None:
            seconds.append(now - ended)
    return seconds


def main() -> None:
    """Measure and print the stages in order."""
    with temporary_cache() as folder:
        for title in ("empty cache", "again"):
            print(title)
            stages = once(Path(folder), Path(folder, title.replace(" ", "_")), sys.argv[1:])
            for name, seconds in sorted(stages.items(), key=lambda item: item[1]):
                print(f"  {seconds:6.2f} s  {name}", flush=True)
        print("later jobs of a sweep, round 1 done")
        for seconds in later_jobs(Path(folder), sys.argv[1:]):
            print(f"  {seconds:6.2f} s")
        *_, (seconds, _) = lines_of("--help")
        print(f"--help\n  {seconds:6.2f} s")


if __name__ == "__main__":
    main()

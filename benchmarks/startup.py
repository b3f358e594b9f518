"""From the command typed to the end of round 1, and its parts.

    python -m benchmarks.startup [key=value ...]

Runs `python simulate.py rounds=2` as a user does, first with an empty dataset cache (the synthetic
writers are drawn), then again.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.bench import temporary_cache

ROOT = Path(__file__).resolve().parents[1]


def once(folder: Path, run: Path, overrides: list[str]) -> dict[str, float]:
    """Return the seconds to each stage of one run, read off its plain output."""
    command = [sys.executable, "simulate.py", "rounds=2", f"cache={folder}/cache"]
    command += [f"hydra.run.dir={run}", *overrides]
    start = time.perf_counter()
    stages: dict[str, float] = {}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.perf_counter() - start
            if line.startswith("opening"):
                stages["python and Hydra"] = now
            elif line.startswith("starting"):
                stages["dataset opened"] = now
            elif line.startswith("round 1/2"):
                stages["round 1 done"] = now
    stages["process ended"] = time.perf_counter() - start
    summary = json.loads((run / "summary.json").read_text())["seconds"]
    stages["(workers ready)"] = summary["startup"]
    return stages


def main() -> None:
    """Measure twice and print the stages in order."""
    with temporary_cache() as folder:
        for title in ("empty cache", "again"):
            print(title)
            stages = once(Path(folder), Path(folder, title.replace(" ", "_")), sys.argv[1:])
            for name, seconds in sorted(stages.items(), key=lambda item: item[1]):
                print(f"  {seconds:6.2f} s  {name}")


if __name__ == "__main__":
    main()

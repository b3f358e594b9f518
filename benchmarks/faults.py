"""Kill a run in every way, take it up again, and compare: the same bits, the same tables.

    python -m benchmarks.faults
    python -m benchmarks.faults --trials 3 --strategies fedadam --engine inline

For each strategy, an undisturbed run, and then: `--trials` times `kill -9` of all its processes at
a random moment after a random round, and `resume=`; and with Ray's workers killed in the middle of
a round: one, every one, and twice in one round. One line each. Compared are weights_sha256,
rounds.csv, clients.csv and writers.csv but for the timings.
"""

import argparse
import contextlib
import csv
import fcntl
import functools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [
    "clients=12",
    "clients_per_round=4",
    "rounds=12",
    "dataset.writers=14",
    "model=2nn",
    "local.epochs=6",
    "local.batch_size=5",
    "evaluate.every=3",
    "engine.workers=2",
]
SHARED = Path("/dev/shm")


def start(folder: Path, cache: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start a run below `folder` in a session of its own."""
    command = [sys.executable, str(ROOT / "simulate.py"), *overrides, f"cache={cache}"]
    if not any(override.startswith("resume=") for override in overrides):
        command.append(f"hydra.run.dir={folder}")
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a run, which has to be a good one; return what it printed."""
    output, _ = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}\n{output}")
    return output


def family(pid: int) -> dict[int, str]:
    """Return the processes below and with `pid`: process id -> command line."""
    parents, lines = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int(
                (path / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
            )
            lines[int(path.name)] = (path / "cmdline").read_text(errors="replace")
        except OSError:
            continue  # gone since
    found = {}
    for child, line in lines.items():
        ancestor = child
        while ancestor in parents and ancestor != pid:
            ancestor = parents[ancestor]
        if ancestor == pid:
            found[child] = line
    return found


def kill(pids: list[int]) -> None:
    """Send SIGKILL to all of `pids`."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def result(folder: Path) -> dict[str, object]:
    """Return what must not depend on what happened on the way."""
    found: dict[str, object] = json.loads((folder / "summary.json").read_text())
    found = {name: found[name] for name in ("weights_sha256", "test_accuracy", "unseen_accuracy")}
    for name in ("rounds.csv", "clients.csv", "writers.csv"):
        with (folder / name).open(newline="") as file:
            found[name] = [
                {key: cell for key, cell in row.items() if not key.startswith("seconds")}
                for row in csv.DictReader(file)
            ]
    return found


def rounds_done(folder: Path) -> int:
    """Return the last round that has its row."""
    table = folder / "rounds.csv"
    return max(0, table.read_text().count("\n") - 2) if table.exists() else 0


def killed_and_resumed(
    folder: Path, cache: Path, after: int, moment: float, overrides: list[str]
) -> str:
    """Kill a whole run `moment` seconds after a round, and resume it; return where it was."""
    process = start(folder, cache, *overrides)
    while rounds_done(folder) < after and process.poll() is None:
        time.sleep(0.002)
    time.sleep(moment)
    kill(sorted(family(process.pid), reverse=True))
    process.communicate()
    if (folder / "summary.json").exists():
        return "was done already"
    if not (folder / ".hydra" / "config.yaml").exists():
        finish(start(folder, cache, *overrides))
        return "before there was a config; started again"
    said = finish(start(folder, cache, f"resume={folder}"))
    return next(line for line in said.splitlines() if line.startswith("goes on"))


def workers_killed(
    folder: Path,
    cache: Path,
    victims: Callable[[list[int]], list[int]],
    times: int,
    overrides: list[str],
) -> str:
    """Kill some workers in the middle of a run, perhaps again; return what it said."""
    process = start(folder, cache, *overrides)
    gone: set[int] = set()
    for _ in range(times):
        found: list[int] = []
        while process.poll() is None:
            found = [pid for pid, line in family(process.pid).items() if "ray::ClientApp" in line]
            if len(found) == 2 and not gone & set(found) and rounds_done(folder) >= 3:
                break
            time.sleep(0.05)
        time.sleep(0.2)
        chosen = victims(sorted(found))
        gone |= set(found)
        kill(chosen)
    output = finish(process)
    return "; ".join(line for line in output.splitlines() if "lost a worker" in line)


WORKERS = {
    "one worker": (lambda pids: pids[:1], 1),
    "every worker": (lambda pids: pids, 1),
    "twice in a round": (lambda pids: pids[-1:], 2),
}


def trials(folder: Path, cache: Path, options: argparse.Namespace, strategy: str) -> int:
    """Run all trials of one strategy; return how many differ."""
    draw = random.Random(f"{options.seed} {strategy}")
    overrides = [*SETTINGS, f"strategy={strategy}", f"engine={options.engine}"]
    if options.engine == "inline":
        overrides.remove("engine.workers=2")
    finish(start(folder / "undisturbed", cache, *overrides))
    expected = result(folder / "undisturbed")
    with (folder / "undisturbed" / "rounds.csv").open() as file:
        seconds = [float(row["seconds_total"]) for row in csv.DictReader(file)]
    a_round = statistics.median(seconds[1:])  # without round 0, which trains no client
    planned: list[tuple[str, Callable[[Path], str]]] = []
    for _ in range(options.trials):
        after, moment = draw.randint(0, 11), draw.uniform(0, 1.2 * a_round)
        name = f"kill -9 of all, {moment:.2f} s after round {after}"
        again = functools.partial(
            killed_and_resumed, cache=cache, after=after, moment=moment, overrides=overrides
        )
        planned.append((name, again))
    if options.engine == "ray":
        for name, (victims, times) in WORKERS.items():
            again = functools.partial(
                workers_killed, cache=cache, victims=victims, times=times, overrides=overrides
            )
            planned.append((f"SIGKILL of {name}", again))
    different = 0
    for number, (name, trial) in enumerate(planned):
        said = trial(folder / f"trial{number}")
        same = result(folder / f"trial{number}") == expected
        different += not same
        print(f"{strategy:<9} {name:<40} {'same' if same else 'DIFFERENT'}  {said}", flush=True)
    return different


def abandoned() -> int:
    """Return how many folders in shared memory belong to no live run."""
    count = 0
    for lock in SHARED.glob("femfed-*/lock"):
        with lock.open("r+") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            count += 1
    return count


def main() -> None:
    """Run all trials; exit with 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", default=["fedavg", "fedadam", "scaffold"])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--engine", default="ray", choices=["ray", "inline"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="femfed-faults-") as temporary:
        folder = Path(temporary)
        different = sum(
            trials(folder / strategy, folder / "cache", options, strategy)
            for strategy in options.strategies
        )
        finish(start(folder / "last", folder / "cache", *SETTINGS))
    print(f"{different} trials differ; {abandoned()} folders left in {SHARED} after another run")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

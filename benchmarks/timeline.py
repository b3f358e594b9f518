"""What each worker does when, in rounds of 100 clients as unequal as FEMNIST's; and who is idle.

    python -m benchmarks.timeline [--clients 100] [--rounds 5] [--picture benchmarks/timeline.png]

Sizes are drawn from a log-normal distribution with FEMNIST's mean and standard deviation of images
a writer. Idle is what a worker does not spend on clients, of the time from the cohort's dispatch to
its aggregate.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.bench import CORES, MODELS, job, noise_writers, run, temporary_cache
from femfed.engine.apps import GridWorkers
from femfed.engine.ray import RayEngine
from femfed.engine.rounds import Round

MEAN, DEVIATION = 226.8, 88.9  # images a writer of the full FEMNIST, as LEAF reports them
WARM_UP = 2


def sizes(writers: int) -> list[int]:
    """Return as many numbers of images, at least 20 each."""
    spread = np.log(1 + (DEVIATION / MEAN) ** 2)
    draw = np.random.default_rng(0)
    drawn = draw.lognormal(np.log(MEAN) - spread / 2, np.sqrt(spread), writers)
    return [int(max(20, size)) for size in drawn]


def measure(
    model: str, clients: int, rounds: int, folder: Path
) -> list[tuple[float, dict[int, tuple[float, list[float]]]]]:
    """Return per round its seconds, and per worker when it began and the seconds of its clients."""
    found: list[tuple[float, dict[int, tuple[float, list[float]]]]] = []
    replies: list[dict[str, Any]] = []
    checked = GridWorkers._checked

    def remember(self: GridWorkers, content: Any) -> Any:
        outcome = dict(content.config_records["outcome"])
        if "seconds" in outcome:
            replies.append(outcome)
        return checked(self, content)

    def on_round(finished: Round) -> None:
        if WARM_UP < finished.number <= WARM_UP + rounds:
            workers = {reply["pid"]: (reply["began"], reply["seconds"]) for reply in replies}
            found.append((finished.seconds_train, workers))
        replies.clear()

    store = noise_writers(folder, sizes(clients))
    work = job(store, MODELS[model], clients, WARM_UP + rounds + 1)
    GridWorkers._checked = remember  # type: ignore[method-assign]
    try:
        with RayEngine(CORES, False, MODELS[model].parameters) as engine:
            engine.run(run(work, on_round), folder)
    finally:
        GridWorkers._checked = checked  # type: ignore[method-assign]
    return found


def idle(seconds: float, workers: dict[int, tuple[float, list[float]]]) -> float:
    """Return the share of a round that its workers did not spend on clients."""
    return 1 - sum(sum(each) for _, each in workers.values()) / (seconds * CORES)


def draw(
    rounds: list[tuple[float, dict[int, tuple[float, list[float]]]]], path: Path, title: str
) -> None:
    """Draw the last rounds: a bar a client, a row a worker."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.6 * CORES), layout="constrained")
    origin = min(began for began, _ in rounds[0][1].values())
    rows = {pid: row for row, pid in enumerate(sorted(rounds[0][1]))}
    for number, (_, workers) in enumerate(rounds):
        for pid, (began, seconds) in workers.items():
            ends = np.cumsum([0.0, *seconds]) + began - origin
            bars = list(zip(ends[:-1], seconds, strict=True))
            shades = [f"C{number}" if i % 2 else "0.75" for i in range(len(bars))]
            axes.broken_barh(bars, (rows[pid] - 0.4, 0.8), facecolors=shades)
    axes.set_yticks(range(len(rows)), [f"worker {row + 1}" for row in range(len(rows))])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(title)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print the idle share of each round, draw two of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cnn", choices=list(MODELS))
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_name("timeline.png"))
    options = parser.parse_args()
    with temporary_cache() as folder:
        rounds = measure(options.model, options.clients, options.rounds, Path(folder))
    shares = [idle(*each) for each in rounds]
    title = f"{options.clients} clients a round, {options.model}, {CORES} workers"
    print(
        f"{title}: idle {100 * np.median(shares):.2f} % "
        f"({100 * min(shares):.2f}-{100 * max(shares):.2f})"
    )
    draw(rounds[-2:], options.picture, f"{title}; a bar is a client, {os.linesep}two rounds")


if __name__ == "__main__":
    main()

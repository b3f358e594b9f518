"""What a federated round costs above the bare compiled training of the same clients.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --models cnn --clients 10 --rounds 20
    python -m benchmarks.overhead --clients 10 30 --strategies all --rounds 3
    python -m benchmarks.overhead --clients 1 2 5 10 30 100 300 1000 --quickstart-clients
    python -m benchmarks.overhead --clients 10 --writers 400 --strategies local_only
    python -m benchmarks.overhead --clients 1000 --strategies all --own-floor

Prints, per model, cohort and strategy, the medians of: floor (one single-threaded process per core,
same clients, FedAvg's compiled epoch, weighted deltas added up, no federation, whatever the
strategy), round (femfed on Flower's Ray-backed engine), and their ratio round by round; a floor
round is run right after every round, so that both see the same machine. `round/own floor` is the
engine's share, and `=` where clients compute as FedAvg's do and the server is given their mean. If
they compute something else, a second model, say, one more floor computes just that, with what they
remember kept in memory (by thirty, in turn); if the server is given every update, as robust rules
are, what it makes of them by itself is added to the floor. With `--own-floor` that one is the only
one, which saves a third of the time. The last columns are the pattern of Flower's TensorFlow
quickstart in the same run, a model built and fitted for every client message: with Flower's default
of two CPUs a client, and with one CPU and one thread each, which suits it better on few cores.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench import CORES, MODELS, equal_writers, floor, job, run, temporary_cache
from femfed import config
from femfed.engine.apps import Job
from femfed.engine.memory import Memories
from femfed.engine.ray import RayEngine
from femfed.engine.rounds import Round
from femfed.strategies.base import Strategy

MANY = 1000  # clients, of whom a round takes minutes
FEW = 30  # clients, of whom two rounds reach what a worker needs

CLIENTS_HALF = ("begin", "phases", "correct_gradients", "finish", "correct_personal_gradients")

Seconds = NDArray[np.float64]


def trains_as_fedavg(strategy: Strategy) -> bool:
    """Return whether the strategy's clients compute what FedAvg's do."""
    same = all(getattr(type(strategy), name) is getattr(Strategy, name) for name in CLIENTS_HALF)
    return same and not strategy.needs and not strategy.pools


def rule_alone(strategy: Strategy, finished: Round) -> float:
    """Return the seconds a strategy takes to make weights of a round's updates, if it gets them."""
    if strategy.averages:
        return 0.0
    trained, drawn = finished.trained, len(finished.cohort)
    start = time.perf_counter()
    strategy.combine(
        finished.weights, trained.updates, finished.state, trained.summary(drawn, drawn)
    )
    return time.perf_counter() - start


def warm_up(strategy: Strategy, clients: int) -> int:
    """Return how many rounds come before those that count.

    The first traces and may not reach all memory where clients are few; the second does. Files of
    what clients remember are new in the first three, as a run's first rounds are; later ones
    overwrite those that nobody needs. Where clients are many, a run of a few warms up before; one
    round writes what the next one reads, and all files are new.
    """
    if clients >= MANY:
        return 1 if strategy.remembers else 0
    if strategy.remembers:
        return 3
    return 1 if clients >= 30 else 2


def measure(
    engine: RayEngine, work: Job, bare: Callable[[], float], own_only: bool = False
) -> tuple[Seconds, Seconds, Seconds]:
    """Return seconds of femfed's rounds, of the floor's and of the strategy's own floor's.

    Args:
        engine: runs them.
        work: what to run; its first rounds do not count.
        bare: runs the floor once.
        own_only: let the strategy's own floor stand for both.
    """
    found: list[tuple[float, ...]] = []
    with contextlib.ExitStack() as own:
        floors = [bare]
        if not trains_as_fedavg(work.strategy):
            mine = own.enter_context(floor(work))
            floors = [mine] if own_only else [bare, mine]
        if work.schedule.clients_per_round >= MANY:
            few = replace(work.schedule, rounds=2, clients_per_round=FEW)
            engine.run(run(replace(work, schedule=few), lambda finished: None), work.store.folder)
            shutil.rmtree(work.memory, ignore_errors=True)

        def on_round(finished: Round) -> None:
            if finished.number > warm_up(work.strategy, work.schedule.clients_per_round):
                seconds = finished.seconds_total - finished.seconds_evaluate
                alone = rule_alone(work.strategy, finished)
                bare_seconds = [once() for once in floors]
                found.append((seconds, bare_seconds[0], bare_seconds[-1] + alone))
            Memories(work.memory).prune(finished.number - 1)

        engine.run(run(work, on_round), work.store.folder)
    rounds, common, own_floor = np.array(found).T
    return rounds, common, own_floor


def quickstart(model: str, clients: int, cpus: int) -> float:
    """Return the median round of the quickstart pattern, run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.quickstart", model, str(clients), "3", str(cpus)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(np.median(json.loads(done.stdout.splitlines()[-1])))


def ratio(rounds: Seconds, bare: Seconds) -> str:
    """Return the median ratio and its range."""
    ratios = rounds / bare
    return f"{np.median(ratios):.3f} ({ratios.min():.3f}-{ratios.max():.3f})"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--writers", type=int, default=0, help="to draw from; else, all train")
    parser.add_argument("--strategies", nargs="+", default=["fedavg"], help="or: all")
    parser.add_argument("--rounds", type=int, default=7, help="fewer for more than 100 clients")
    parser.add_argument("--own-floor", action="store_true", help="the strategy's own, and no other")
    parser.add_argument("--quickstart-clients", nargs="*", type=int, default=[10])
    options = parser.parse_args()
    names = options.strategies
    if names == ["all"]:
        names = sorted(path.stem for path in (config.CONF / "strategy").glob("*.yaml"))
    print(
        f"{CORES} cores, 180 images a client, batch 20, 1 epoch, up to {options.rounds} rounds each"
    )
    print(f"{'quickstart/round':>138}")
    print(
        "model      clients  strategy               floor s  round s  round/floor (min-max)  "
        "round/own floor (min-max)     as documented  1 CPU each"
    )
    for model, clients in itertools.product(options.models, options.clients):
        measured = max(min(2, options.rounds), options.rounds * 100 // max(100, clients))
        with contextlib.ExitStack() as open_now:
            cache = Path(open_now.enter_context(temporary_cache()))
            store = equal_writers(cache, max(options.writers, clients))
            bare = open_now.enter_context(floor(job(store, MODELS[model], clients, 1)))
            engine = open_now.enter_context(RayEngine(CORES, False, MODELS[model].parameters))
            for name in names:
                strategy = config.make(config.compose([f"strategy={name}"]).strategy, "strategy")
                rounds = warm_up(strategy, clients) + measured
                work = job(store, MODELS[model], clients, rounds, strategy=strategy)
                work = replace(work, memory=store.folder / f"memory_{name}")
                seconds, floors, own = measure(engine, work, bare, options.own_floor)
                shutil.rmtree(work.memory, ignore_errors=True)  # some GB, where clients are many
                same = trains_as_fedavg(strategy)
                common = "" if options.own_floor and not same else ratio(seconds, floors)
                line = (
                    f"{model:<10} {clients:>7}  {name:<21}  {np.median(floors):>7.3f}  "
                    f"{np.median(seconds):>7.3f}  {common:>21}  "
                    f"{'=' if same and strategy.averages else ratio(seconds, own):>25}"
                )
                if clients in options.quickstart_clients and name == "fedavg":
                    for cpus in (2, 1):
                        times = quickstart(model, clients, cpus) / np.median(seconds)
                        line += f"  {times:>13.1f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()

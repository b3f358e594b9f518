"""femfed beside other simulators: the same work, the same machine, one run.

    python -m benchmarks.peers
    python -m benchmarks.peers --models cnn --clients 10 --peers pfl_pytorch fedjax --rounds 3

For each model, cohort and peer, femfed and the peer are started one after the other and then train
round by round in turns, so that both see the same machine; one waits while the other works. Each
peer runs in an environment of its own, made the first time (see `environments.py`), as its
documentation says, on the setting that is fastest on few cores (see the `run_*.py`). Prints a
Markdown table at the end:

round s        median of the rounds after the second
round / ours   median over the pairs of rounds (min-max), of the peer's seconds by femfed's
start-up s     from the start of the process to the end of its first round
peak MiB       of all its processes, each process's peak added up
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.bench import CORES, available_precisions
from benchmarks.peers import protocol
from benchmarks.peers.contestant import Contestant, FailedError
from benchmarks.peers.environments import NotInstalledError, environment

SCRIPTS = Path(__file__).parent
ROOT = SCRIPTS.parents[1]
PRECISIONS = ["float32", "bfloat16"]  # of femfed; the first is compared with
MOST_SECONDS = 240  # of the measured rounds of a pair, at least one of each


@dataclass(frozen=True)
class Peer:
    """Who is compared with.

    Attributes:
        title: for the table.
        environment: whose requirements it needs.
        script: what it runs.
        setting: handed to the script.
    """

    title: str
    environment: str
    script: str
    setting: str = ""


PEERS = {
    "pfl_pytorch": Peer("pfl-research, PyTorch", "pfl_pytorch", "run_pfl_pytorch.py"),
    "pfl_tensorflow": Peer("pfl-research, TensorFlow", "pfl_tensorflow", "run_pfl_tensorflow.py"),
    "pytorch": Peer("plain PyTorch loop", "pytorch", "run_pytorch.py"),
    "fedjax": Peer("FedJAX", "fedjax", "run_fedjax.py"),
    "tff": Peer("TensorFlow Federated", "tff", "run_tff.py"),
    "flower_1_cpu": Peer("Flower quickstart, 1 CPU a client", "flower", "run_flower.py", "1"),
    "flower": Peer("Flower quickstart, as documented", "flower", "run_flower.py", "2"),
}


@dataclass
class Result:
    """What a contestant did in one cell."""

    versions: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    startups: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    failure: str = ""


def commands(name: str, python: Path, model: str, clients: int) -> list[str]:
    """Return the command line of femfed in a precision, or of a peer."""
    work = [model, str(clients), str(min(CORES, clients))]
    if name in PRECISIONS:
        return [sys.executable, "-m", "benchmarks.peers.ours", *work, name]
    return [str(python), str(SCRIPTS / PEERS[name].script), *work, PEERS[name].setting]


def variables(name: str) -> dict[str, str]:
    """Return the environment variables of a contestant: only femfed's imports from here."""
    found = dict(os.environ)
    path = found.pop("PYTHONPATH", "")
    if name in PRECISIONS:
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), path]))
    return found


def compete(
    names: list[str], lines: dict[str, list[str]], rounds: int, logs: Path
) -> dict[str, Result]:
    """Return what `names` did in turns; if one fails, nobody has done anything."""
    results = {name: Result() for name in names}
    with ExitStack() as stack:
        running = {}
        for name in names:
            try:
                contestant = Contestant(lines[name], variables(name), logs / f"run_{name}.log")
                running[name] = stack.enter_context(contestant)
                contestant.round()  # the first traces, the second touches all memory
            except FailedError as error:
                results[name].failure = str(error)
                return results
        start = time.perf_counter()
        for _ in range(rounds):
            for name, contestant in running.items():
                results[name].seconds.append(contestant.round())
            if time.perf_counter() - start > MOST_SECONDS:
                break
        for name, contestant in running.items():
            results[name].versions = contestant.versions
            results[name].startups.append(contestant.startup)
            results[name].peaks.append(contestant.peak_memory())
    return results


def ratio(theirs: list[float], ours: list[float]) -> str:
    """Return the median of the ratios pair by pair, with their range."""
    found = [a / b for a, b in zip(theirs, ours, strict=True)]
    return f"**{statistics.median(found):.2f}** ({min(found):.2f}-{max(found):.2f})"


def row(title: str, model: str, clients: int, result: Result, ratios: list[str]) -> str:
    """Return a line of the table."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    round = statistics.median(result.seconds)
    cells = [
        title,
        versions,
        f"`{model}`",
        str(clients),
        f"{clients / round:.1f}",
        f"{round:.2f}",
        *ratios,
        f"{statistics.median(result.startups):.1f}",
        f"{statistics.median(result.peaks):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = list(protocol.PARAMETERS)
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--environments", type=Path, default=cache / "femfed" / "peers")
    options = parser.parse_args()
    precisions = available_precisions()
    pythons, missing = {}, {}
    for name in options.peers:
        try:
            pythons[name] = environment(options.environments, PEERS[name].environment)
        except NotInstalledError as error:
            missing[name] = str(error)
    columns = [f"round / ours, {precision}" for precision in precisions]
    head = ["", "version", "model", "clients", "clients a second", "round s", *columns]
    head += ["start-up s", "peak MiB"]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model, clients in itertools.product(options.models, options.clients):
        ours, theirs = {name: Result() for name in precisions}, []
        for peer, python in pythons.items():
            names = [*precisions, peer]
            lines = {name: commands(name, python, model, clients) for name in names}
            results = compete(names, lines, options.rounds, options.environments)
            failed = [f"{name} failed: {r.failure}" for name, r in results.items() if r.failure]
            if failed:
                theirs.append(f"| {PEERS[peer].title} | {failed[0]} |")
                continue
            ratios = [ratio(results[peer].seconds, results[own].seconds) for own in precisions]
            theirs.append(row(PEERS[peer].title, model, clients, results[peer], ratios))
            print(theirs[-1], flush=True)
            for own in precisions:
                ours[own].versions = results[own].versions
                ours[own].seconds += results[own].seconds
                ours[own].startups += results[own].startups
                ours[own].peaks += results[own].peaks
        for own, result in ours.items():
            if result.seconds:
                against = [
                    "1" if own == other else ratio(result.seconds, ours[other].seconds)
                    for other in precisions
                ]
                table.append(row(f"femfed, {own}", model, clients, result, against))
        table += theirs
    table += [f"| {PEERS[name].title} | not installed: {why} |" for name, why in missing.items()]
    print(f"\n{CORES} cores, 180 images a client, batch 20, 1 epoch\n", *table, sep="\n")


if __name__ == "__main__":
    main()

"""femfed: federated learning on FEMNIST writers, simulated on one machine.

    python simulate.py strategy=fedprox clients=100
    python simulate.py -m strategy=fedavg,fedprox seed=0,1

From the config to objects, from objects to the engine, from the engine to the report.
"""

import contextlib
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from femfed import RunError, Stopped, UserError, checkpoint, config

if TYPE_CHECKING:  # TensorFlow, Flower and Ray take seconds to import: mistakes are told before
    from femfed.data.store import WriterStore
    from femfed.engine.federation import Federation
    from femfed.engine.rounds import Round
    from femfed.report.progress import Progress

LIBRARIES = ("femfed", "flwr", "ray", "tensorflow", "keras", "numpy", "hydra-core")
started = time.perf_counter()
exit_codes: list[int] = []  # of the runs that failed
sweeps: set[Path] = set()  # folders of sweeps that have a finished run

config.register()


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def simulate(cfg: DictConfig) -> None:
    """Run one federation as `cfg` says; in a sweep, a run that fails leaves the others be."""
    global started
    folder = Path(HydraConfig.get().runtime.output_dir)
    choices = HydraConfig.get().runtime.choices
    try:
        if (folder / "rounds.csv").exists():
            raise UserError(f"{folder} holds a run already; give another hydra.run.dir")
        config.check(cfg)
        run_one(cfg, folder, choices["strategy"], choices["model"])
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            sweeps.add(folder.parent)
    except UserError as error:
        discard(folder)
        exit_codes.append(fail(str(error), 2))
    except RunError as error:
        exit_codes.append(fail(str(error), 1))
    started = time.perf_counter()  # of a sweep's next run


def run_one(cfg: DictConfig, folder: Path, strategy_name: str, model_name: str) -> None:
    """Build what `cfg` describes, run it, and leave the results in `folder`."""
    from femfed.engine.federation import open_federation
    from femfed.engine.rounds import Schedule
    from femfed.report.progress import Progress

    dataset = config.make(cfg.dataset, "dataset")
    strategy = config.make(cfg.strategy, "strategy")
    model = config.make(cfg.model, "model")
    title = f"{dataset.name}, {strategy_name}, {model_name}, {cfg.clients} clients, seed {cfg.seed}"
    about = {"dataset": dataset.name, "variant": dataset.variant, "partition": dataset.partition}
    about |= {"strategy": strategy_name, "model": model_name}
    about |= {key: cfg[key] for key in ("clients", "clients_per_round", "rounds", "seed")}
    with (
        noise_to(folder / "simulate.log") as stdout,
        Progress(cfg.rounds, title, stdout.isatty(), cfg.list_clients, stdout) as progress,
    ):
        store, federation = open_federation(
            dataset,
            cache=Path(cfg.cache).expanduser(),
            clients=cfg.clients,
            seed=cfg.seed,
            unseen_fraction=cfg.evaluate.unseen_fraction,
            test_fraction=cfg.evaluate.test_fraction,
            on_status=progress.status,
            on_message=progress.message,
        )
        by_value = cfg.engine.wire == "value"
        workers = cfg.engine.workers or len(os.sched_getaffinity(0))
        if cfg.engine.kind == "inline":
            from femfed.engine.inline import InlineEngine

            choice: Any = InlineEngine()
        else:
            from femfed.engine.ray import RayEngine

            choice = RayEngine(workers, by_value)
        progress.status(f"starting {choice.workers} workers")
        with choice as engine:
            from femfed.client import Local
            from femfed.engine.apps import Job, Run

            keras_model = model.build(cfg.seed)
            weights = keras_model.get_weights()
            results = Results(folder, store, federation, progress, cfg.checkpoint.every)
            job = Job(
                model=model,
                strategy=strategy,
                local=Local(**cfg.local),
                schedule=Schedule(
                    seed=cfg.seed,
                    rounds=cfg.rounds,
                    clients=cfg.clients,
                    clients_per_round=cfg.clients_per_round,
                    failure_rate=cfg.failure_rate,
                    evaluate_every=cfg.evaluate.every,
                ),
                federation=federation,
                store=store,
                test_fraction=cfg.evaluate.test_fraction,
                workers=engine.workers,
                bundle=cfg.engine.bundle,
                by_value=by_value,
                memory=folder.absolute() / "memory",
            )
            run = Run(
                job=job,
                weights=weights,
                state=strategy.init(weights),
                on_round=results.on_round,
                on_clients=progress.clients_done,
                on_status=progress.message,
            )
            engine.run(run, folder)
        keras_model.set_weights(run.weights)
        keras_model.save(folder / "model.keras")
        results.finish(title, about, run.weights, run.peak_memory)
    print(f"results in {os.path.relpath(folder)}")


class Results:
    """Writes what a run leaves, round by round and at its end.

    Args:
        folder: where.
        store: the writers' names and coordinates.
        federation: which of them take part.
        progress: the display.
        checkpoint_every: rounds between checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        store: "WriterStore",
        federation: "Federation",
        progress: "Progress",
        checkpoint_every: int,
    ) -> None:
        from femfed.engine.memory import Memories
        from femfed.report.events import Events
        from femfed.report.files import RunFiles

        self._folder, self._store, self._federation = folder, store, federation
        self._progress, self._checkpoint_every = progress, checkpoint_every
        self._files, self._events = RunFiles(folder), Events(folder)
        self._seconds = {"total": 0.0, "startup": 0.0, "train": 0.0, "evaluate": 0.0}
        self._memories = Memories(folder / "memory")
        self._last: Round | None = None

    def on_round(self, finished: "Round") -> None:
        """Write one round."""
        from femfed.engine import rounds

        if self._last is None:
            self._seconds["startup"] = time.perf_counter() - started - finished.seconds_total
        self._last = finished
        self._seconds["train"] += finished.seconds_train
        self._seconds["evaluate"] += finished.seconds_evaluate
        row = rounds.row(finished)
        clients = rounds.client_rows(finished, self._federation, self._store)
        self._files.append_clients(clients)
        self._files.append_round(row)
        self._events.append_round(row)
        if finished.number % self._checkpoint_every == 0 or finished.seen is not None:
            now = checkpoint.Checkpoint(finished.number, finished.weights, finished.state)
            checkpoint.save(self._folder / "checkpoint", now)
            oldest = checkpoint.rounds(self._folder / "checkpoint")[0]
            self._memories.prune(oldest)
        self._progress.round(row, clients)

    def finish(
        self, title: str, about: dict[str, Any], weights: list[Any], workers_peak: int
    ) -> None:
        """Write what is known at the end only."""
        from femfed.engine import rounds
        from femfed.report.plots import plot_curves, plot_writers

        assert self._last is not None
        self._events.close()
        final = rounds.row(self._last)
        self._files.write_writers(rounds.writer_rows(self._last, self._federation, self._store))
        plot_curves(self._folder, title)
        plot_writers(self._folder, title)
        seconds = {**self._seconds, "total": time.perf_counter() - started}
        seconds["overhead"] = 2 * seconds["total"] - sum(seconds.values())
        own_peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        self._files.write_summary(
            {
                **about,
                "weights_sha256": checkpoint.sha256(weights),
                "test_loss": final["test_loss"],
                "test_accuracy": final["test_accuracy"],
                "unseen_accuracy": final["unseen_accuracy"],
                "seconds": seconds,
                "peak_memory_mb": (own_peak + workers_peak) / 1e6,
                "versions": {"python": platform.python_version(), **versions},
            }
        )


@contextlib.contextmanager
def noise_to(path: Path) -> Iterator[TextIO]:
    """Send what TensorFlow, Ray and their native code print to a file; yield the real stdout."""
    stdout = sys.stdout
    sys.stderr.flush()
    terminal = os.dup(2)
    with path.open("a", buffering=1) as file, contextlib.redirect_stdout(file):
        os.dup2(file.fileno(), 2)
        try:
            yield stdout
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)


def discard(folder: Path) -> None:
    """Remove the folder of a run that was refused; what is not of that run stays."""
    if (folder / "rounds.csv").exists():
        return
    shutil.rmtree(folder / ".hydra", ignore_errors=True)
    (folder / "simulate.log").unlink(missing_ok=True)
    for empty in (folder, folder.parent):
        with contextlib.suppress(OSError):
            empty.rmdir()


def fail(message: str, code: int) -> int:
    """Print one line to stderr and return the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def main() -> None:
    """Run what the command line says; a user's mistake is one line and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print and exit with 1 on
    try:
        simulate()
        for sweep in sweeps:
            from femfed.report.comparison import compare

            for path in compare(sweep):
                print(f"comparison in {os.path.relpath(path)}")
    except (HydraException, OmegaConfBaseException) as error:
        exit_codes.append(fail(config.explain(error), 2))
    except Stopped as stopped:
        exit_codes.append(fail("stopped", 128 + stopped.signal))
    except KeyboardInterrupt:  # before the engine took the signal over
        exit_codes.append(fail("stopped", 130))
    sys.exit(max(exit_codes, default=0))


if __name__ == "__main__":
    main()

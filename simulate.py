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

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from femfed import UserError, checkpoint, config

LIBRARIES = ("femfed", "flwr", "ray", "tensorflow", "keras", "numpy", "hydra-core")
started = time.perf_counter()
exit_codes: list[int] = []  # of the runs that failed

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def simulate(cfg: DictConfig) -> None:
    """Run one federation as `cfg` says; in a sweep, a run that fails leaves the others be."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    choices = HydraConfig.get().runtime.choices
    try:
        config.check(cfg)
        run_one(cfg, folder, strategy=choices["strategy"], model=choices["model"])
    except UserError as error:
        shutil.rmtree(folder)  # nothing ran: only Hydra's notes are in it
        exit_codes.append(fail(str(error), 2))


def run_one(cfg: DictConfig, folder: Path, strategy: str, model: str) -> None:
    """Build what `cfg` describes, run it, and leave the results in `folder`."""
    global started
    dataset = config.make(cfg.dataset, "dataset")
    algorithm = config.make(cfg.strategy, "strategy")
    title = f"{dataset.name}, {strategy}, {model}, {cfg.clients} clients, seed {cfg.seed}"
    from femfed.report.progress import Progress

    with (
        noise_to(folder / "simulate.log"),
        Progress(cfg.rounds, title, sys.stdout.isatty(), cfg.list_clients) as progress,
    ):
        progress.status(f"opening the dataset {dataset.name}")
        wanted = round(cfg.clients / (1 - cfg.evaluate.unseen_fraction))
        store = dataset.store(Path(cfg.cache).expanduser(), wanted)

        from femfed.client import Local
        from femfed.engine import apps, rounds
        from femfed.report.events import Events
        from femfed.report.files import RunFiles
        from femfed.report.plots import plot_curves, plot_writers

        trainable = np.flatnonzero(store.train_examples != 0)
        unseen_fraction = cfg.evaluate.unseen_fraction
        federation = rounds.draw_federation(cfg.seed, trainable, cfg.clients, unseen_fraction)
        spec = config.make(cfg.model, "model")
        built = spec.build(cfg.seed)
        weights = built.get_weights()
        parameters = built.count_params()
        inline = cfg.engine.kind == "inline"
        job = apps.Job(
            model=spec,
            strategy=algorithm,
            local=Local(**OmegaConf.to_container(cfg.local)),
            schedule=rounds.Schedule(
                seed=cfg.seed,
                rounds=cfg.rounds,
                clients=cfg.clients,
                clients_per_round=cfg.clients_per_round,
                evaluate_every=cfg.evaluate.every,
            ),
            federation=federation,
            store=store,
            test_fraction=cfg.evaluate.test_fraction,
            workers=1 if inline else cfg.engine.workers or len(os.sched_getaffinity(0)),
            bundle=cfg.engine.bundle,
            by_value=cfg.engine.wire == "value",
        )
        if store.skipped_writers:
            progress.message(f"{store.skipped_writers} writers without images are left out")
        expected = round(unseen_fraction * len(trainable))
        if len(federation.unseen) < expected:
            progress.message(
                f"{len(federation.unseen)} unseen writers instead of {expected}: "
                f"clients={cfg.clients} of {len(trainable)} writers leaves no more"
            )
        files = RunFiles(folder)
        seconds = {"total": 0.0, "startup": 0.0, "train": 0.0, "evaluate": 0.0, "overhead": 0.0}
        last: list[rounds.Round] = []

        with Events(folder) as events:

            def on_round(finished: rounds.Round) -> None:
                if not last:
                    seconds["startup"] = time.perf_counter() - started - finished.seconds_total
                last[:] = [finished]
                row = rounds.row(finished, parameters)
                clients = rounds.client_rows(finished, federation, store, parameters)
                seconds["train"] += finished.seconds_train
                seconds["evaluate"] += finished.seconds_evaluate
                files.append_clients(clients)
                files.append_round(row)
                events.append_round(row)
                if finished.number % cfg.checkpoint.every == 0 or finished.number == cfg.rounds:
                    now = checkpoint.Checkpoint(finished.number, finished.weights, finished.state)
                    checkpoint.save(folder / "checkpoint", now)
                progress.round(row, clients)

            progress.status(f"starting {job.workers} workers")
            run = apps.Run(
                job=job,
                weights=weights,
                state=algorithm.init(weights),
                on_round=on_round,
                on_clients=progress.clients_done,
                on_status=progress.message,
            )
            if inline:
                from femfed.engine import inline as engine
            else:
                from femfed.engine import ray as engine
            engine.run(run, folder)

        final = rounds.row(last[0], parameters)
        built.set_weights(run.weights)
        built.save(folder / "model.keras")
        files.write_writers(rounds.writer_rows(last[0], federation, store))
        plot_curves(folder, title)
        plot_writers(folder, title)
        seconds["total"] = time.perf_counter() - started
        parts = seconds["startup"] + seconds["train"] + seconds["evaluate"]
        seconds["overhead"] = seconds["total"] - parts
        own_peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        files.write_summary(
            {
                "dataset": dataset.name,
                "strategy": strategy,
                "model": model,
                "clients": cfg.clients,
                "clients_per_round": cfg.clients_per_round,
                "rounds": cfg.rounds,
                "seed": cfg.seed,
                "weights_sha256": checkpoint.sha256(run.weights),
                "test_loss": final["test_loss"],
                "test_accuracy": final["test_accuracy"],
                "unseen_accuracy": final["unseen_accuracy"],
                "seconds": seconds,
                "peak_memory_mb": (own_peak + (0 if inline else run.peak_memory)) / 1e6,
                "versions": {
                    "python": platform.python_version(),
                    **{name: importlib.metadata.version(name) for name in LIBRARIES},
                },
            }
        )
    print(f"results in {os.path.relpath(folder)}")
    started = time.perf_counter()


@contextlib.contextmanager
def noise_to(path: Path) -> Iterator[None]:
    """Send what TensorFlow, Ray and their native code write to stderr to a file of the run."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)


def fail(message: str, code: int) -> int:
    """Print one line to stderr and return the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def main() -> None:
    """Run what the command line says; a user's mistake is one line and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print and exit with 1 on
    try:
        simulate()
    except (HydraException, OmegaConfBaseException) as error:
        exit_codes.append(fail(config.explain(error), 2))
    except KeyboardInterrupt:
        exit_codes.append(fail("stopped", 130))
    sys.exit(max(exit_codes, default=0))


if __name__ == "__main__":
    main()

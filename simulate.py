"""femfed: federated learning on FEMNIST writers, simulated on one machine.

    python simulate.py strategy=fedprox clients=100
    python simulate.py -m strategy=fedavg,fedprox seed=0,1

From the config to objects, from objects to the engine, from the engine to the report.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from femfed import (
    EngineError,
    RunError,
    Stopped,
    UserError,
    __version__,
    command_line,
    config,
    escape_unencodable,
    go_on_without_readers,
    one_line,
    stoppable,
)
from femfed.folder import (
    check_new,
    check_resumed,
    discard,
    explain,
    how_to_resume,
    noise_to,
    owned,
)

# TensorFlow, Flower and Ray take seconds to import: whatever needs them is imported where a user's
# mistake would have been told already.

main_process: list[int] = []  # its id
started = time.perf_counter()
exit_codes: list[int] = []  # of the runs that failed
broken: list[EngineError] = []  # errors after which this process cannot end in peace
finished: list[Path] = []  # folders of the runs that did not
failures: dict[Path, str] = {}  # folders of the runs that failed, and why
sweeps: set[Path] = set()  # folders of the runs of a sweep are below
composed: list[DictConfig] = []  # configs that Hydra made without a complaint
sweep_sizes: list[int] = []  # runs of the sweep, if this is one
engines = contextlib.ExitStack()  # ends what a sweep's runs share
kept: dict[tuple[Any, ...], Any] = {}  # the engine of a sweep's last run, by its settings

config.register()


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def simulate(cfg: DictConfig) -> float | None:
    """Run one federation as `cfg` says; in a sweep, a run that fails leaves the others be.

    Returns:
        The final test accuracy, as sweepers that search expect it; None if the run failed
        or no image is held out.
    """
    global started
    if main_process and main_process[0] != os.getpid():
        with contextlib.suppress(OSError):
            Path(HydraConfig.get().runtime.output_dir).rmdir()
        raise UserError(
            "this hydra/launcher starts runs in other processes, which could not tell this one "
            "what failed nor share its workers; accepted: hydra/launcher=basic; a run uses all "
            "processors by itself (engine.workers)"
        )
    accuracy: float | None = None
    composed.append(cfg)
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    choices = dict(hydra_config.runtime.choices)
    place = config.place_in_sweep(sweep_sizes[-1] if sweep_sizes else None)
    is_sweep = hydra_config.mode is RunMode.MULTIRUN
    if is_sweep:
        sweeps.add(Path(hydra_config.runtime.cwd, hydra_config.sweep.dir))
    before: list[str] | None = None  # names in a new run's folder
    has_begun = False

    def ended() -> str:
        """Return how to go on with the run; if it has not begun, leave nothing of it."""
        how = how_to_resume(folder, cfg.rounds, cfg.checkpoint.every)  # of a resumed run, its own
        if before is not None and not how:
            discard(folder, before)
        return how

    def run_failed(message: str, code: int) -> None:
        """Say why, here and at the end of the run's log, which the comparison reads."""
        exit_codes.append(fail(place.prefix + message, code))
        failures[folder] = message
        log = folder / "simulate.log"
        with contextlib.suppress(OSError):
            if has_begun and log.exists():  # else it may be another run's, or a user's
                with log.open("a") as file:
                    file.write(f"error: {one_line(message)}\n")

    try:
        with owned(folder):
            if OmegaConf.select(cfg, "resume") is not None:
                check_resumed(folder)
                cfg, choices = config.resumed(cfg, choices, hydra_config.overrides.task, folder)
            else:
                before = check_new(folder, "hydra.sweep.dir" if is_sweep else "hydra.run.dir")
            config.check(cfg)
            config.make_paths_absolute(cfg, Path(hydra_config.runtime.cwd))
            save = config.save if before is None else config.save_new

            def accepted() -> None:
                nonlocal has_begun
                save(cfg, folder)
                has_begun = True

            accuracy = run_one(cfg, folder, choices["strategy"], choices["model"], place, accepted)
        finished.append(folder)
    except (UserError, OmegaConfBaseException) as error:
        if before is not None:
            discard(folder, before)
        said = str(error) if isinstance(error, UserError) else config.explain(error)
        run_failed(said, 2)
    except RunError as error:
        said, _, trace = str(error).partition("\n")
        run_failed("; ".join(filter(None, [said, ended()])), 1)
        broken.extend([error] if isinstance(error, EngineError) else [])
        print(trace, end="\n" if trace else "", file=sys.stderr)
    except OSError as error:
        said, advice = explain(error, folder)
        how = ended()
        run_failed(f"{said}; {how or advice}", 1 if how else 2)
    except Stopped as stopped:
        done = f"{len(finished)} runs done" if is_sweep else ""
        fail("; ".join(filter(None, ["stopped", done, ended()])), 0)
        leave(128 + stopped.signal, stopped)
    except Exception as error:
        how = ended()
        if not is_sweep:
            if how:
                fail(place.prefix + how, 1)
            raise
        traceback.print_exc()
        run_failed("; ".join(filter(None, [f"{type(error).__name__}: {error}", how])), 1)
        end_engines()  # the next run starts workers anew
    started = time.perf_counter()  # of a sweep's next run
    return accuracy


def run_one(
    cfg: DictConfig,
    folder: Path,
    strategy_name: str,
    model_name: str,
    place: config.Place,
    accepted: Callable[[], None],
) -> float | None:
    """Build what `cfg` describes, run it, leave the results in `folder`; return the test accuracy.

    `accepted` is called once nothing is refused any more, before the workers start.
    """
    from femfed.engine.federation import open_federation
    from femfed.engine.rounds import NOTHING_FINISHED, Schedule
    from femfed.models import check_model, check_precision, check_weights
    from femfed.report.progress import Progress
    from femfed.results import Results

    dataset = config.make(cfg.dataset, "dataset")
    strategy = config.make(cfg.strategy, "strategy")
    with noise_to(folder / "simulate.log"):  # a user's model may import Keras
        model = config.make(cfg.model, "model")
    check_precision(model, cfg.precision)
    title = f"{dataset.name}, {strategy_name}, {model_name}, {cfg.clients} clients, seed {cfg.seed}"
    title += place.values_beside("strategy", "model", "clients", "seed")
    about = {"dataset": dataset.name, "variant": dataset.variant, "partition": dataset.partition}
    about |= {"strategy": strategy_name, "model": model_name}
    settings = ("clients", "clients_per_round", "rounds", "seed", "precision")
    about |= {key: cfg[key] for key in settings}
    with (
        noise_to(folder / "simulate.log") as stdout,
        Progress(
            cfg.rounds, title + place.number, stdout.isatty(), cfg.list_clients, stdout
        ) as progress,
        contextlib.ExitStack() as own,
    ):
        check_model(model, cfg.seed, cfg.precision)
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
        about["variant"] = dataset.variant_of(store)
        results = Results(
            folder,
            store,
            federation,
            progress,
            cfg.checkpoint.every,
            started,
            evaluate_every=cfg.evaluate.every,
            settings=config.deciding(cfg),
        )
        engine, start = engine_of(cfg, model, progress.status, engines if place.number else own)
        begun = results.rewind(cfg.rounds)
        if begun is not None:
            check_weights(model, begun.weights)
        accepted()
        if cfg.resume is not None:
            progress.message(f"goes on from round {begun.round if begun else 0}")
        start()

        from femfed.engine.apps import Job, Run
        from femfed.local import Local

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
                stop_on_divergence=cfg.stop_on_divergence,
            ),
            federation=federation,
            store=store,
            test_fraction=cfg.evaluate.test_fraction,
            workers=engine.workers,
            bundle=cfg.engine.bundle,
            by_value=cfg.engine.wire == "value",
            memory=folder.absolute() / "memory",
            drop=cfg.on_client_error == "drop",
            precision=cfg.precision,
        )
        run = Run(
            job=job,
            weights=begun.weights if begun else None,
            state=begun.state if begun else None,
            finished=begun.round if begun else NOTHING_FINISHED,
            on_round=results.on_round,
            on_clients=progress.clients_done,
            on_status=progress.message,
            save_as=folder.absolute() / "model.keras",
        )
        engine.run(run, folder)
        own.close()  # all processors for the model and the pictures
        accuracy = results.finish(title, about, run.weights, run.peak_memory)
    print(f"results in {os.path.relpath(folder)}")
    return accuracy


def engine_of(
    cfg: DictConfig, model: Any, on_status: Callable[[str], None], until: contextlib.ExitStack
) -> tuple[Any, Callable[[], None]]:
    """Return the engine that `cfg` asks for and what starts it: a sweep's last one runs already.

    Args:
        cfg: the config of the run.
        model: its model.
        on_status: told what is started.
        until: ends the engine.
    """
    from femfed.engine.footprint import available_cpus

    by_value = cfg.engine.wire == "value"
    workers = cfg.engine.workers or available_cpus()
    settings = (cfg.engine.kind, workers, by_value, model.parameters)
    if settings in kept:
        return kept[settings], lambda: None
    kept.clear()
    until.close()
    if cfg.engine.kind == "inline":
        from femfed.engine.inline import InlineEngine

        choice: Any = InlineEngine()
    else:
        from femfed.engine.ray import RayEngine

        choice = RayEngine(workers, by_value, model.parameters)

    def start() -> None:
        on_status(f"starting {choice.workers} workers")
        until.enter_context(choice)
        if until is engines:
            kept[settings] = choice

    return choice, start


def fail(message: str, code: int) -> int:
    """Print one line to stderr and return the exit code."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return code


def end_engines() -> None:
    """End the engine of a sweep's last run."""
    if kept:
        kept.clear()
        with noise_to(Path(os.devnull)):
            engines.close()


def leave(code: int, error: BaseException) -> None:
    """End this process now.

    Imports that other threads are at would take their seconds first, and Ray without its servers
    would wait for them.
    """
    engines.__exit__(type(error), error, None)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def main() -> None:
    """Run what the command line says; a user's mistake is one line and exit code 2."""
    escape_unencodable()
    go_on_without_readers()
    main_process[:] = [os.getpid()]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print and exit with 1 on
    with stoppable():
        _main()


def _main() -> None:
    line = command_line.CommandLine()
    try:
        line = command_line.parse(config.in_place(sys.argv[1:]))
        if line.has("--version"):
            print(f"femfed {__version__}")
            return
        sys.argv[1:] = config.for_hydra(line)
        sweep_sizes[:] = [config.runs_of(line)] if line.sweep else []
        simulate()
        for sweep in sweeps:
            from femfed.report.comparison import compare

            failed = {path: why for path, why in failures.items() if sweep in path.parents}
            for path in compare(sweep, failed=failed):
                print(f"comparison in {os.path.relpath(path)}")
        end_engines()
    except UserError as error:
        exit_codes.append(fail(str(error), 2))
    except (HydraException, OmegaConfBaseException) as error:
        exit_codes.append(fail(config.explain(error, line), 2))
    except OSError as error:  # of Hydra's, before there is a run
        key = "hydra.sweep.dir" if line.sweep else "hydra.run.dir"
        exit_codes.append(fail(f"{error}; give another {key}", 2))
    except Stopped as stopped:
        fail("stopped", 0)
        leave(128 + stopped.signal, stopped)
    except Exception as error:
        if composed:
            raise
        exit_codes.append(fail(config.explain(error, line), 2))  # Hydra's parsers raise many kinds
    finally:
        end_engines()
    if broken:
        leave(max(exit_codes), broken[0])
    sys.exit(max(exit_codes, default=0))


if __name__ == "__main__":
    main()

"""Flower's Ray-backed simulation engine: the only file that touches `ray` or `flwr.simulation`."""

import contextlib
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from femfed import Stopped

if TYPE_CHECKING:
    from femfed.engine.apps import Run

RESTARTS = 3  # of the engine in a row without a finished round in between
OBJECT_STORE = 128 * 2**20  # bytes; enough for messages that hold names and numbers


class RayEngine:
    """Workers in processes of their own, started when entered and ended when left.

    A worker that dies ends the engine, not the run: the engine starts again and runs the round
    again with the same result, because a round is a pure function of (weights, state, round, seed).

    Args:
        workers: worker processes, one TensorFlow thread each.
        by_value: whether weights travel inside the messages, which takes a larger object store.
    """

    def __init__(self, workers: int, by_value: bool) -> None:
        self.workers = workers
        self._object_store = None if by_value else OBJECT_STORE
        self._cluster = contextlib.ExitStack()

    def __enter__(self) -> "RayEngine":
        # TensorFlow and Flower take seconds to import, Ray takes seconds to start: do both at once.
        imports = threading.Thread(target=_import)
        imports.start()
        self._start()
        imports.join()
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.close()

    def _start(self) -> None:
        self._cluster.enter_context(_ray(self.workers, self._object_store))

    def run(self, run: "Run", folder: Path) -> None:
        """Take `run` to its end.

        Args:
            run: what to run.
            folder: the run's folder, used where shared memory is absent.

        Raises:
            Stopped: SIGINT or SIGTERM asked the run to stop.
            LostWorkerError: workers were lost again and again without a finished round in between.
        """
        from femfed.engine.apps import LostWorkerError, StoppedError, shared_folder

        lost_at, losses = -1, 0
        with _stoppable(run) as (stop, signals), shared_folder(run, folder) as shared:
            while not run.done:
                try:
                    _simulate(run, shared, stop)
                except StoppedError:
                    raise Stopped(signals[0]) from None
                except LostWorkerError as error:
                    losses = losses + 1 if lost_at == run.finished else 1
                    lost_at = run.finished
                    if losses > RESTARTS:
                        raise
                    reason = str(error).splitlines()[0]
                    run.on_status(f"lost a worker, runs round {run.finished + 1} again ({reason})")
                    self._cluster.close()
                    self._start()


def _import() -> None:
    for module in ("femfed.engine.apps", "flwr.simulation"):
        importlib.import_module(module)


def _simulate(run: "Run", shared: Path | None, stop: threading.Event) -> None:
    """Run on Flower's engine until done, a loss or a stop; Flower ends Ray with it."""
    from flwr.simulation import run_simulation

    from femfed.engine.apps import client_app, server_app

    failures: list[Exception] = []
    try:
        run_simulation(
            server_app=server_app(run, shared, stop, failures),
            client_app=client_app,
            num_supernodes=run.job.nodes,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    except BaseException:
        stop.set()  # the engine itself failed: let the ServerApp's thread go
        raise
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _ray(workers: int, object_store: int | None) -> Iterator[None]:
    """Start a Ray of our own: no other cluster joined, no dashboard, loopback only."""
    # Read when ray is imported: it makes Ray take the loopback address as this node's, so that its
    # servers listen there and nowhere else (Ray resolves a loopback `_node_ip_address` away).
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.update(RAY_worker_niceness="0")  # Ray's 15 would let every other program go first
    import ray

    temporary = tempfile.mkdtemp(prefix="femfed-ray-")
    python_path = os.environ.get("PYTHONPATH")
    # Workers import femfed as this process does, wherever it is started from.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    # Flower logs what reaches the user as our own errors.
    flower = logging.getLogger("flwr")
    level = flower.level
    flower.setLevel(logging.CRITICAL + 1)
    try:
        ray.init(
            address="local",
            num_cpus=workers,
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.CRITICAL,
            object_store_memory=object_store,
            _temp_dir=temporary,
        )
        yield
    finally:
        ray.shutdown()
        flower.setLevel(level)
        if python_path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = python_path
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _stoppable(run: "Run") -> Iterator[tuple[threading.Event, list[int]]]:
    """Turn SIGINT and SIGTERM into an event the ServerApp sees; a second one ends at once.

    Yields the event and the list that receives the signal's number.
    """
    stop, signals = threading.Event(), list[int]()

    def on_signal(number: int, frame: FrameType | None) -> None:
        for pid in run.pids:  # a worker in the middle of a bundle would be waited for
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if stop.is_set():
            os._exit(128 + number)
        signals.append(number)
        stop.set()

    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, on_signal) for number in handled}
    try:
        yield stop, signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

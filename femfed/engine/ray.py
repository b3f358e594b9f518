"""Flower's Ray-backed simulation engine; only here and in preload.py `ray` is imported."""

import contextlib
import ctypes
import functools
import importlib
import inspect
import logging
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from femfed import (
    STOPPING,
    EngineError,
    Stopped,
    UserError,
    cleaned_up,
    keep_freed_memory,
    light_imports,
    printable,
    stoppable,
    terminal,
)
from femfed.engine.folders import OwnedFolder
from femfed.engine.footprint import (
    available_memory,
    check_address_space,
    refused_tasks,
    task_limit,
    tasks_left,
)

if TYPE_CHECKING:
    from femfed.engine.apps import Run


RESTARTS = 3  # of the engine in a row without a finished round in between
WORKER_MEMORY = 700 * 2**20  # bytes of a worker without a model: TensorFlow, Flower, Ray
ADDRESS_BYTES = 7 * 2**29  # of a process: libraries, Ray's object store
PARAMETER_MEMORY = 48  # bytes a weight: weights, global weights, gradients, sums, activations
PREFIX = "femfed-ray-"  # of the folder in which Ray's lies
INSIDE = "r"  # Ray's folder; short, because the paths of sockets in it may have 107 bytes
SOCKET_BYTES = 107  # that the path of a Unix socket may have
LONGEST_SOCKET = f"/{PREFIX}12345678/{INSIDE}/session_2026-01-02_03-04-05_123456_1234567/sockets/"
PLACE_BYTES = SOCKET_BYTES - len(LONGEST_SOCKET + "plasma_store")  # of the path before
PLACE = re.compile(r"[A-Za-z0-9/._-]+")  # spaces and others divide Ray's command lines
OTHER_PLACES = ("/tmp", "/var/tmp")
NO_GPUS = dict.fromkeys(
    ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "-1"
)
SETTING = "RAY_"  # how the names of Ray's environment variables begin
ENVIRONMENT = {  # of Ray, instead of the user's
    "RAY_AUTH_MODE": "token",
    # Read when ray is imported: it makes Ray take the loopback address as this node's, so that its
    # servers listen there and nowhere else (Ray resolves a loopback `_node_ip_address` away).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # below `uv run`, workers would get copies of the folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
SERVERS = ("gcs_server", "raylet")  # names of their processes
WORKERS = ("ray::", "default_worker.py")  # in the command line of a worker
BASE_TASKS, WORKER_TASKS = 110, 28  # processes and threads of Ray and of a worker, on two cores
LOOPBACK, LOOPBACK_S = "127.0.0.1", 5.0
PATIENCE = 4  # seconds that a stopped run may write
LOOK_S = 0.1  # between two looks at what starts
START_S = 60.0  # that what starts may do nothing
WORK_S = 2.0  # of processors' time: workers that have done so much more are at something
SILENT = f"no answer for {START_S:.0f} s"
LEFT = b"\0"  # no signal has this number
GRACE_S = 4.0  # that a process has to end, after a signal or after `START_S`
REFUSED_S = 10.0  # that what starts may take when the system has refused it a process
END_S = 30.0  # that Flower's engine may take to end
SERVER_PATIENCE = 4  # seconds that Ray's server is looked for; then Ray asks once a second
CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux's prctl
API_SERVER, PARAMETERS = "start_api_server", "RayParams"
SET_HANDLER, GET_NODE = "set_sigterm_handler", "get_node"
SETTINGS = {  # of Ray, for this Ray only
    "worker_niceness": 0,  # Ray's 15 would let every other program go first
    "preload_python_modules": ["femfed.engine.preload"],
    # Its server looks for its own object store before that is there, and then sleeps: a second, ten
    # times, as Ray comes. Workers that wait for the server take the same.
    "raylet_client_connect_timeout_milliseconds": 50,
    "raylet_client_num_connect_attempts": 200,
}
SHARED_MEMORY = "/dev/shm"
OBJECT_STORE = 128 * 2**20  # bytes; enough for messages that hold names and numbers


_failures: list[str] = []  # of Ray in this process


class RayEngine:
    """Workers in processes of their own, started when entered and ended when left.

    A worker that dies ends the engine, not the run: the engine starts again and runs the round
    again with the same result, because a round is a pure function of (weights, state, round, seed).

    Args:
        workers: worker processes, one TensorFlow thread each.
        by_value: whether weights travel inside the messages, which takes a larger object store.
        parameters: of the model, for an estimate of the workers' memory.

    Raises:
        UserError: there is not memory enough for so many workers, or not room for so many
            processes, or no loopback address.
    """

    def __init__(self, workers: int, by_value: bool, parameters: int) -> None:
        _check_memory(workers, parameters)
        check_address_space(ADDRESS_BYTES)
        _check_tasks(workers)
        _check_loopback()
        keep_freed_memory()
        self.workers = workers
        self._object_store = None if by_value else OBJECT_STORE
        self._ray = contextlib.ExitStack()
        self._temporary: Path | None = None  # Ray's folder
        self._flower: _Flower | None = None

    def __enter__(self) -> "RayEngine":
        try:
            self._start()
        except BaseException:
            self._ray.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None and issubclass(kind, Stopped | EngineError):
            self._ray.__exit__(kind, *error)  # at once, whatever Flower is at
            return
        try:
            self._end()
        except Stopped:
            self._ray.__exit__(*sys.exc_info())
            raise

    def run(self, run: "Run", folder: Path) -> None:
        """Take `run` to its end.

        Args:
            run: what to run.
            folder: the run's folder, used where there is too little shared memory.

        Raises:
            Stopped: a signal asked the run to stop.
            EngineError: workers do not start, or Ray's servers have ended.
            LostWorkerError: workers were lost again and again without a finished round in between.
        """
        from femfed.engine.apps import LostWorkerError, travelling

        lost_at, losses = -1, 0
        with stoppable(), travelling(run, folder) as shared:
            while not run.done:
                try:
                    self._serving(run.job.nodes).federate(run, shared)
                except LostWorkerError as error:
                    self._end()
                    run.blame(shared)
                    losses = losses + 1 if lost_at == run.finished else 1
                    lost_at = run.finished
                    if losses > RESTARTS:
                        raise
                    reason = str(error).splitlines()[0]
                    run.on_status(f"lost a worker, runs round {run.finished + 1} again ({reason})")
                except EngineError:
                    self._flower = None  # it would be waited for
                    raise
                except Exception:
                    self._end()  # who knows what its workers are at
                    raise

    def _serving(self, nodes: int) -> "_Flower":
        """Return Flower's engine with so many nodes, the last run's if it has as many."""
        if self._flower is not None and self._flower.nodes != nodes:
            self._end()
        if self._flower is None:
            self._start()
            self._flower = _Flower(nodes)
        return self._flower

    def _start(self) -> None:
        if self._temporary is None:
            self._temporary = self._ray.enter_context(_ray(self.workers, self._object_store))

    def _end(self) -> None:
        if self._flower is not None:
            self._flower.end()
        self._flower = None
        try:
            self._ray.close()
        finally:
            self._temporary = None


class _Flower:
    """Flower's engine in a thread of its own: it serves run after run, and Ray ends with it.

    Args:
        nodes: Flower nodes to register.
    """

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self._stop = threading.Event()
        self._runs: SimpleQueue[tuple[Run, Path | None] | None] = SimpleQueue()
        self._ends: SimpleQueue[BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def federate(self, run: "Run", shared: Path | None) -> None:
        """Take `run` to its end or to what keeps it from there, which is raised."""
        self._runs.put((run, shared))
        watch = StartWatch("workers")
        try:
            while True:
                with contextlib.suppress(Empty):
                    error = self._ends.get(timeout=LOOK_S)
                    break
                watch.check(started=run.started.is_set())
        except (Stopped, EngineError):
            self._stop.set()
            for pid in _descendants(*WORKERS):  # else one would wait for them
                _send(pid, signal.SIGKILL)
            with contextlib.suppress(Empty):
                self._ends.get(timeout=PATIENCE)  # a round that is finished is written
            raise
        if error is not None:
            watch.check(started=True)  # the end of a server shows as many an error
            raise error

    def end(self) -> None:
        """End the engine, and Ray with it; one that does not end is left alone with its thread."""
        self._runs.put(None)
        self._thread.join(END_S)

    def _serve(self) -> None:
        from flwr.simulation import run_simulation

        from femfed.engine.apps import client_app, server_app
        from femfed.engine.dispatch import prompt_dispatch

        try:
            with prompt_dispatch():
                run_simulation(
                    server_app=server_app(iter(self._runs.get, None), self._stop, self._ends.put),
                    client_app=client_app,
                    num_supernodes=self.nodes,
                    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
                )
        except BaseException as error:
            self._ends.put(error)  # the engine itself failed
            self._stop.set()  # let the ServerApp's thread go


def _check_memory(workers: int, parameters: int) -> None:
    each = WORKER_MEMORY + PARAMETER_MEMORY * parameters
    available = available_memory()
    fit = max(0, (available - each) // each)  # the driver takes less than a worker
    if workers > fit:
        raise UserError(
            f"{workers} workers need about {(workers + 1) * each / 2**30:.1f} GiB of memory, of "
            f"which {available / 2**30:.1f} GiB are available; expected at most {fit} workers: "
            f"engine.workers={max(1, fit)}"
            + ("" if fit else ", or engine=inline, which needs one process only")
        )


def _check_tasks(workers: int) -> None:
    needed, left = BASE_TASKS + WORKER_TASKS * workers, tasks_left()
    if needed > left:
        raise UserError(
            f"{workers} workers need about {needed} processes and threads, of which {left} are "
            f"left below the limit of {task_limit()} (pids.max, ulimit -u); expected room for "
            "them: raise the limit, use fewer engine.workers, or engine=inline, which needs one "
            "process only"
        )


def _check_loopback() -> None:
    try:
        with socket.socket() as free:
            free.bind((LOOPBACK, 0))
            free.listen()
            socket.create_connection(free.getsockname(), timeout=LOOPBACK_S).close()
    except OSError as error:
        raise UserError(
            f"no connection to {LOOPBACK} ({error}), over which Ray's processes talk; expected a "
            "loopback interface that is up (ip link set lo up), or engine=inline, which needs none"
        ) from error


def _import() -> None:
    with light_imports(without=["tensorflow"]):  # which workers need only
        for module in ("femfed.engine.apps", "flwr.simulation"):
            importlib.import_module(module)


@contextlib.contextmanager
def _ray(workers: int, object_store: int | None) -> Iterator[Path]:
    """Start a Ray of our own: no other cluster joined, no dashboard, loopback only.

    Yields the folder of its logs and sockets.
    """
    if _failures:  # Ray cannot start again in this process
        raise EngineError(_failures[0])
    with OwnedFolder(_place(), PREFIX) as owned, _adopting(), _settings():
        # TensorFlow and Flower take seconds to import, Ray takes seconds to start: both at once.
        imports = threading.Thread(target=_import)
        imports.start()
        import ray

        stopped = False
        python_path = os.environ.get("PYTHONPATH")
        # Workers import femfed as this process does, wherever it is started from.
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        # Flower logs what reaches the user as our own errors.
        flower = logging.getLogger("flwr")
        level = flower.level
        flower.setLevel(logging.CRITICAL + 1)
        try:
            with cleaned_up(functools.partial(_remove, owned.path)):
                try:
                    with _started(workers, object_store, owned.path / INSIDE):
                        imports.join()
                        yield owned.path
                except Stopped:
                    stopped = True  # this process ends now, and Ray would take its seconds
                    raise
                except EngineError as error:
                    stopped = True  # Ray would wait for its servers
                    _failures.append(str(error))
                    raise
                finally:
                    if not stopped:
                        ray.shutdown()
        finally:
            flower.setLevel(level)
            if python_path is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = python_path


@contextlib.contextmanager
def _started(workers: int, object_store: int | None, folder: Path) -> Iterator[None]:
    """Start Ray's servers in a thread, so that this one hears signals and sees what goes wrong.

    The thread waits until the block ends: the servers end with the thread that has started them.

    Args:
        workers: processes that Ray may start.
        object_store: bytes, None for as many as Ray takes.
        folder: for Ray's files. Ray gives all users all rights in it.

    Raises:
        EngineError: a server ended, or there is none after `START_S` seconds.
    """
    import ray

    ends: SimpleQueue[BaseException | None] = SimpleQueue()
    over = threading.Event()

    def start() -> None:
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
                _plasma_directory=object_store_folder,
                _temp_dir=str(folder),
                _system_config=dict(SETTINGS),  # into which Ray writes its folder
            )
        except BaseException as error:
            ends.put(error)
        else:
            ends.put(None)
            over.wait()

    object_store_folder = None  # Ray's own choice
    if not os.access(SHARED_MEMORY, os.W_OK):  # absent or read-only: Ray would not start
        object_store_folder = str(folder.parent)
        object_store = object_store or available_memory() // 4
    with _quick_start(), _guarded(folder.parent):
        threading.Thread(target=start, daemon=True).start()
        watch = StartWatch("Ray's servers")
        while True:
            with contextlib.suppress(Empty):
                error = ends.get(timeout=LOOK_S)
                break
            watch.check()
    if error is not None:
        raise watch.error(f"{type(error).__name__}: {error}") from error
    try:
        yield
    finally:
        over.set()


@contextlib.contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Let another process end this one if it neither leaves the block nor hears a signal.

    Ray's native code holds Python's lock while it waits for its servers, without a deadline.

    Args:
        folder: to remove then.
    """
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    code = "import sys; from femfed.engine.ray import guard; guard(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(os.getpid()), str(reads), str(folder)]
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=terminal[-1],
            pass_fds=[reads],
            start_new_session=True,
        ):
            before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)  # a byte a signal
            try:
                yield
            finally:
                signal.set_wakeup_fd(before)
                os.write(writes, LEFT)
                os.close(writes)
    finally:
        os.close(reads)


def guard(parent: str, descriptor: str, folder: str) -> None:
    """End a process that starts Ray unless it says in time that it has ended the block.

    Whatever has ended the process, Ray's processes end and its folder goes. Run by `_guarded`.

    Args:
        parent: the process.
        descriptor: of the pipe into which it writes the numbers of signals as they come.
        folder: of Ray.
    """
    watch, stopped = StartWatch("Ray's servers"), False
    deadline, reason = time.monotonic() + START_S + GRACE_S, SILENT
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([int(descriptor)], [], [], left)[0]:
            continue
        received = os.read(int(descriptor), 100)
        if LEFT in received:
            return
        if not received:
            reason = "Ray ended the process that started it"
            break
        if not stopped and set(received) & set(STOPPING):
            deadline, stopped = time.monotonic() + GRACE_S, True
    print("error:", "stopped" if stopped else watch.error(reason), file=sys.stderr, flush=True)
    _send(int(parent), signal.SIGKILL)
    mark, found = f"RAY_AUTH_TOKEN={os.environ['RAY_AUTH_TOKEN']}".encode(), {0}
    while found:  # those that are killed may just have started another one
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (path / "environ").read_bytes() and int(path.name) != os.getpid():
                    found.add(int(path.name))
        for pid in found:
            _send(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.01)


class StartWatch:
    """Looks, while Ray or its workers start, whether they still can.

    Args:
        starting: names what starts.
    """

    def __init__(self, starting: str) -> None:
        self._starting = starting
        self._servers: set[str] = set()
        self._refused = refused_tasks()
        self._work = 0.0
        self._deadline = time.monotonic() + START_S

    def check(self, started: bool = False) -> None:
        """Raise an error if Ray's servers have ended, or what starts does nothing.

        Args:
            started: whether it has started.

        Raises:
            EngineError: a server has ended, or `START_S` seconds have brought nothing.
        """
        servers, dead = _servers()
        if ended := dead | self._servers - servers:
            gone = f"Ray's server ended ({', '.join(sorted(ended))})"
            raise EngineError(gone) if started else self.error(gone)
        self._servers |= servers
        if started:
            return
        work, now = _work(), time.monotonic()
        if work > self._work + WORK_S:  # workers import TensorFlow: slowly, where the disk is slow
            self._work, self._deadline = work, now + START_S
        if refused_tasks() > self._refused:
            self._deadline = min(self._deadline, now + REFUSED_S)
            self._refused = sys.maxsize
        if now > self._deadline:
            raise self.error(SILENT)

    def error(self, reason: str) -> EngineError:
        """Return the error, with its cause where that can be known."""
        first = reason.strip().splitlines()[0]
        full = self._refused == sys.maxsize or refused_tasks() > self._refused
        cause = f"; the limit of {task_limit()} processes and threads is reached" if full else ""
        return EngineError(
            f"{self._starting} did not start: {first}{cause}; use fewer engine.workers, or "
            "engine=inline, which needs one process only"
        )


def _place() -> Path:
    """Return the folder to make Ray's folder in: the temporary one, or /tmp if Ray cannot use it.

    Raises:
        UserError: Ray can use neither.
    """
    with contextlib.suppress(OSError):  # Python finds no folder that it can write to
        places = (tempfile.gettempdir(), *OTHER_PLACES)
        for place in map(os.path.abspath, places):
            usable = len(os.fsencode(place)) <= PLACE_BYTES and PLACE.fullmatch(place)
            if usable and os.access(place, os.W_OK | os.X_OK):
                return Path(place)
    raise UserError(
        f"Ray finds no place for its files: TMPDIR={printable(os.environ.get('TMPDIR', '/tmp'))}; "
        f"expected a folder that can be written to and has room, with a path of at most "
        f"{PLACE_BYTES} ASCII letters, digits or ._- ; set TMPDIR to one, or use engine=inline"
    )


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Replace the user's settings of Ray by those of this run, among them a token that it only has.

    Ray's servers and workers refuse calls without the token. It is in the environment of this
    process and of those that it starts, which other users cannot read, and in no file.
    """
    users = {name: value for name, value in os.environ.items() if _is_setting(name)}
    _replace_settings({**NO_GPUS, **ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    try:
        importlib.import_module("ray")
        _forget_settings()
        yield
    finally:
        _replace_settings(users)
        _forget_settings()


def _replace_settings(values: dict[str, str]) -> None:
    for name in list(filter(_is_setting, os.environ)):
        del os.environ[name]
    os.environ.update(values)


def _is_setting(name: str) -> bool:
    return name.startswith(SETTING) or name in NO_GPUS


def _forget_settings() -> None:
    """Make Ray read its settings again: it keeps them, the token too, from its first use on."""
    _raylet: Any = sys.modules.get("ray._raylet")  # None if a signal has ended its import
    with contextlib.suppress(AttributeError):  # of another Ray
        _raylet.AuthenticationTokenLoader.instance().reset_cache()
        _raylet.Config.initialize("")


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Become the parent of every process below this one that loses its own.

    Whatever ends Ray's server before what that started, such as Ray's own answer to a SIGTERM, the
    rest would else be nobody's: still there, and not to be found below this process.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(CHILD_SUBREAPER, 0, 0, 0, 0)


@contextlib.contextmanager
def _quick_start() -> Iterator[None]:
    """Have `ray.init` start Ray's two servers only, not sleep for them, and leave SIGTERM to us.

    Without a dashboard, Ray still starts a process that reports its usage: told that it must not,
    it reports that, and it asks the network which cloud this is. The two monitors of logs and of
    clusters that grow are of no use on one machine. Whether the server of this node is there, Ray
    asks once a second. Its answer to a SIGTERM is raised once, and lost where Python drops it
    (`femfed.stop`). There is no public way to do without; where another Ray has not what is
    replaced here, it starts as it does.
    """
    from ray._private import parameter, services, state, utils

    def no_api_server(*_: object, **__: object) -> tuple[None, None]:
        return None, None  # what Ray itself makes of one that does not start

    def no_handler(_: object) -> None:
        """Leave the one that is there."""

    stock_node: Any = getattr(state.GlobalState, GET_NODE, None)

    def prompt_node(self: Any, node_id: str) -> Any:
        deadline = time.monotonic() + SERVER_PATIENCE
        while time.monotonic() < deadline:
            if any(node.get("NodeID") == node_id for node in self.node_table()):
                break
            time.sleep(0.01)
        return stock_node(self, node_id)  # which asks again where it is not there yet

    monitors = {"no_monitor": True, "include_log_monitor": False}
    stock = getattr(parameter, PARAMETERS, None)
    ours: list[tuple[object, str, Callable[..., Any]]] = [
        (services, API_SERVER, no_api_server),
        (utils, SET_HANDLER, no_handler),
    ]
    if stock is not None and set(monitors) <= set(inspect.signature(stock).parameters):
        ours.append((parameter, PARAMETERS, functools.partial(stock, **monitors)))
    if hasattr(state.GlobalState, "node_table"):
        ours.append((state.GlobalState, GET_NODE, prompt_node))
    with contextlib.ExitStack() as restored:
        for owner, name, value in ours:
            if hasattr(owner, name):
                restored.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
        yield


def _servers() -> tuple[set[str], set[str]]:
    """Return the names of Ray's servers that this process has started: those alive, the dead."""
    alive, dead = set[str](), set[str]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text(errors="replace").partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            if int(parent) == os.getpid() and name in SERVERS:
                (dead if state in "ZX" else alive).add(name)
    return alive, dead


def _work() -> float:
    """Return the seconds of processors' time that workers have taken."""
    ticks = 0
    for pid in _descendants(*WORKERS):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            ticks += sum(map(int, stat.rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _remove(folder: Path) -> None:
    """End what is left of Ray, and remove a folder."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found: set[int] = set()
        while new := {*_descendants(PREFIX, "/ray/", *WORKERS)} - found:  # agents: by their path
            for pid in new:  # whoever stands still starts no other, who would outlive them unseen
                _send(pid, signal.SIGSTOP)
            found |= new
        for pid in found:
            _send(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        if not found and not folder.exists():  # as long as one dies, it may write
            return
        time.sleep(0.01)


def _descendants(*parts: str) -> list[int]:
    """Return the processes below this one whose command line has one of `parts` in it."""
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone since
            parents[int(path.name)] = int(
                (path / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
            )
            lines[int(path.name)] = (path / "cmdline").read_text(errors="replace")
    found = []
    for pid, line in lines.items():
        ancestor = parents.get(pid, 0)
        while ancestor not in (0, os.getpid()):
            ancestor = parents.get(ancestor, 0)
        if ancestor and any(part in line for part in parts):
            found.append(pid)
    return found


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

"""Bad surroundings: stopped at any moment, no room, no rights, neighbours, unwanted guests.

A run that is started here as a process has a temporary folder of its own, by which every process of
it is known, and is a session of its own, so that Ctrl-C reaches all of it as from a terminal.
"""

import builtins
import contextlib
import errno
import fcntl
import http.client
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import hydra.core.utils
import numpy as np
import pytest
from omegaconf import OmegaConf

import simulate
from femfed import UserError, config, results
from femfed.engine.memory import Memories
from femfed.engine.wire import lives
from tests.test_simulate import family, rows, summary

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path("/dev/shm")
TINY = [
    "clients=4",
    "clients_per_round=2",
    "rounds=4",
    "evaluate.unseen_fraction=0.34",
    "evaluate.every=1",
    "dataset.writers=6",
    "model=logistic",
]
LONGER = ["rounds=24", "local.epochs=25"]
STOPPABLE = [*TINY, *LONGER, "engine.workers=2"]
LONG = 600  # seconds that anything may take on a busy machine


# In this process, where nothing needs a process of its own ----------------------------------------


@dataclass
class Typed:
    """What came of a command line."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of the error."""
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line


class Shell:
    """Types `python simulate.py` in this process.

    Args:
        place: folder of all runs and of their cache.
        patch: of the test.
    """

    def __init__(self, place: Path, patch: pytest.MonkeyPatch) -> None:
        self.place, self._patch = place, patch

    def type(self, *arguments: str) -> Typed:
        self._patch.setattr(sys, "argv", ["simulate.py", *arguments])
        self._patch.setattr(simulate, "exit_codes", [])
        self._patch.setattr(simulate, "finished", [])
        self._patch.setenv("HYDRA_FULL_ERROR", "")
        self._patch.setattr(os, "dup2", lambda *_: None)  # pytest holds the descriptors
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                simulate.main()
            except SystemExit as exit:
                return Typed(int(exit.code or 0), out.getvalue(), err.getvalue())
        raise AssertionError("no exit code")

    def run(self, name: str, *overrides: str) -> Typed:
        paths = [f"cache={self.place}/cache", f"hydra.run.dir={self.place / name}"]
        return self.type(*TINY, "engine=inline", *overrides, *paths)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell in a folder of its own."""
    with opened(tmp_path) as shell:
        yield shell


@contextlib.contextmanager
def opened(place: Path) -> Iterator[Shell]:
    """Yield a shell whose working folder and handlers of signals do not outlive the block."""
    handled = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in handled]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield Shell(place, patch)
    for number, handler in zip(handled, before, strict=True):
        signal.signal(number, handler)


def result(folder: Path) -> dict[str, Any]:
    """Return what must not depend on what happened on the way."""
    found = {name: summary(folder)[name] for name in ("weights_sha256", "test_accuracy")}
    for name in ("rounds.csv", "clients.csv", "writers.csv"):
        found[name] = [
            {key: cell for key, cell in row.items() if not key.startswith("seconds")}
            for row in rows(folder / name)
        ]
    return found


Undisturbed = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Return a function that gives the result of settings that nothing disturbed."""
    place, known = tmp_path_factory.mktemp("undisturbed"), dict[tuple[str, ...], Any]()

    def of(*overrides: str) -> dict[str, Any]:
        if overrides not in known:
            with opened(place) as shell:
                done = shell.run(str(len(known)), *overrides)
            assert done.code == 0, done.err
            known[overrides] = result(place / str(len(known)))
        return known[overrides]

    return of


# In a process of its own --------------------------------------------------------------------------


@dataclass
class Started:
    """A run in a session and a temporary folder of its own."""

    process: subprocess.Popen[bytes]
    folder: Path
    temporary: Path
    shared: set[Path] = field(default_factory=set)

    @property
    def out(self) -> str:
        return (self.temporary.parent / "out").read_text()

    @property
    def err(self) -> str:
        return (self.temporary.parent / "err").read_text()

    @property
    def rounds(self) -> int:
        """The last round that has its row."""
        table = self.folder / "rounds.csv"
        return max(0, table.read_text().count("\n") - 2) if table.exists() else 0

    def until(self, happened: Callable[["Started"], object]) -> None:
        deadline = time.monotonic() + LONG
        while not happened(self):
            assert time.monotonic() < deadline, self.out + self.err
            assert self.process.poll() is None, self.out + self.err
            time.sleep(0.01)

    def stop(self, *numbers: int, pause: float = 0.0) -> float:
        """Send signals, return the seconds until the process is gone.

        A terminal sends Ctrl-C to all processes of a run, `kill` a SIGTERM to one.
        """
        self.shared = shared_files(self.process.pid)
        start = time.monotonic()
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                send = os.killpg if number == signal.SIGINT else os.kill
                send(self.process.pid, number)
            time.sleep(pause)
        self.process.wait(timeout=LONG)
        return time.monotonic() - start

    def left(self) -> list[str]:
        """Return what is left of the run besides its folder: processes and files."""
        mark, deadline = f"TMPDIR={self.temporary}".encode(), time.monotonic() + 5
        while found := processes_with(mark):
            if time.monotonic() > deadline:  # a process that was killed takes a moment to go
                break
            time.sleep(0.05)
        left = [f"process {pid} {line[:100]}" for pid, line in found.items()]
        left += [str(path) for path in self.temporary.iterdir()]
        left += [str(path) for path in self.shared if path.exists()]
        return left + [str(path) for path in self.folder.glob("femfed-*")]


def shared_files(pid: int) -> set[Path]:
    """Return the files in shared memory that the processes of a run hold."""
    found = set()
    for process in family(pid):
        paths: list[Path] = []
        with contextlib.suppress(FileNotFoundError):  # of a process that has just ended
            paths += Path(f"/proc/{process}/fd").iterdir()
        for path in paths:
            with contextlib.suppress(OSError):
                target = path.readlink()
                if target.is_relative_to(SHARED) and target.exists():
                    found.add(target)
    return found


def processes_with(mark: bytes) -> dict[int, str]:
    """Return the processes whose environment has `mark`: process id -> command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
    return found


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `python simulate.py`; whatever is left of it at the end of the test is killed."""
    all_started: list[Started] = []
    places: list[Path] = []

    def begin(
        *arguments: str,
        name: str = "run",
        script: str = "",
        before: tuple[str, ...] = (),
        **environment: str,
    ) -> Started:
        # Short, because the names of Unix sockets have 107 letters at most.
        place = Path(tempfile.mkdtemp(prefix="sur-", dir="/tmp"))
        places.append(place)
        (place / "t").mkdir()
        typed = ["-c", script] if script else [str(ROOT / "simulate.py")]
        command = [*before, sys.executable, *typed, *arguments]
        if not any(argument.startswith("cache=") for argument in arguments):
            command.append(f"cache={tmp_path}/cache")
        if not any(argument.startswith(("resume=", "-m")) for argument in arguments):
            command.append(f"hydra.run.dir={tmp_path / name}")
        with (place / "out").open("wb") as out, (place / "err").open("wb") as err:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=err,
                env={
                    **os.environ,
                    "PYTHONFAULTHANDLER": "1",  # where a crash, which nobody expects, was
                    "TMPDIR": str(place / "t"),
                    **environment,
                },
                start_new_session=True,
            )
        all_started.append(Started(process, tmp_path / name, place / "t"))
        return all_started[-1]

    yield begin
    for started in all_started:
        for pid in processes_with(f"TMPDIR={started.temporary}".encode()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        started.process.wait(timeout=LONG)
        for path in started.shared:
            if path.is_file() and path.parent.name.startswith("femfed-"):
                shutil.rmtree(path.parent, ignore_errors=True)
    for place in places:
        shutil.rmtree(place, ignore_errors=True)


def how_to_resume(said: str) -> list[str]:
    """Return the arguments of the line that a stopped run said."""
    found = re.search(r"no finished round is lost: python simulate\.py (resume=.+)$", said, re.M)
    assert found, said
    return shlex.split(found[1])


def resumed(started: Started, *overrides: str) -> dict[str, Any]:
    """Type the line that a stopped run said, here in one process; return the result."""
    with opened(started.folder.parent) as shell:
        done = shell.type(*how_to_resume(started.err), "engine=inline", *overrides)
    assert done.code == 0, done.err
    assert "goes on from round" in done.out
    return result(started.folder)


# Stop means stop ----------------------------------------------------------------------------------


def assert_ends_at(number: signal.Signals, run: Started) -> None:
    """Stop a run, which has to leave nothing but the line that says how to go on."""
    seconds = run.stop(number)

    print(f"{seconds:.1f} s from {number.name} to the end")
    assert run.process.returncode == 128 + number, run.err
    assert seconds < 30
    assert run.shared
    assert run.left() == []
    (line,) = run.err.splitlines()
    assert line.startswith("error: stopped; no finished round is lost: ")


def test_ctrl_c_ends_all_and_its_line_gives_the_undisturbed_result(
    start: Start, undisturbed: Undisturbed
) -> None:
    run = start(*STOPPABLE)
    run.until(lambda run: run.rounds >= 3)

    assert_ends_at(signal.SIGINT, run)

    assert 3 <= run.rounds < 24
    again = start(*how_to_resume(run.err))
    assert again.process.wait(timeout=LONG) == 0, again.err
    assert "goes on from round" in again.out
    assert result(run.folder) == undisturbed(*LONGER)


def test_sigterm_ends_a_run_in_one_process_alike(start: Start, undisturbed: Undisturbed) -> None:
    run = start(*STOPPABLE, "engine=inline")
    run.until(lambda run: run.rounds >= 3)

    assert_ends_at(signal.SIGTERM, run)

    assert resumed(run) == undisturbed(*LONGER)


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_second_ctrl_c_is_immediate(start: Start, undisturbed: Undisturbed, pause: float) -> None:
    run = start(*STOPPABLE)
    run.until(lambda run: run.rounds >= 3)

    seconds = run.stop(signal.SIGINT, signal.SIGINT, pause=pause)

    print(f"{seconds:.1f} s from two Ctrl-C to the end")
    assert run.process.returncode == 130
    assert seconds < 30
    assert run.left() == []
    with opened(run.folder.parent) as shell:
        assert shell.type(f"resume={run.folder}", "engine=inline").code == 0
    assert result(run.folder) == undisturbed(*LONGER)


def has_child(part: str) -> Callable[[Started], bool]:
    return lambda run: any(part in line for line in family(run.process.pid).values())


MOMENTS: dict[str, Callable[[Started], object]] = {
    "the run has a config": lambda run: (run.folder / ".hydra" / "config.yaml").exists(),
    "Ray has a folder": lambda run: list(run.temporary.glob("femfed-ray-*")),
    "Ray's store starts": has_child("gcs_server"),
    "workers import": has_child("default_worker.py"),
    "the workers are there": lambda run: shared_files(run.process.pid),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_while_a_run_starts(start: Start, moment: str) -> None:
    run = start(*STOPPABLE)
    run.until(MOMENTS[moment])

    seconds = run.stop(signal.SIGTERM)

    print(f"{seconds:.1f} s from SIGTERM to the end")
    assert run.process.returncode == 143, run.err
    assert seconds < 30
    assert run.left() == []
    (line,) = run.err.splitlines()
    assert line.startswith("error: stopped")


def test_a_lost_terminal_stops_a_run_like_sigterm(start: Start, undisturbed: Undisturbed) -> None:
    run = start(*STOPPABLE, "engine=inline")
    run.until(lambda run: run.rounds >= 3)

    assert_ends_at(signal.SIGHUP, run)

    assert resumed(run) == undisturbed(*LONGER)


def test_a_lost_terminal_does_not_stop_a_run_below_nohup(
    start: Start, undisturbed: Undisturbed
) -> None:
    run = start(*STOPPABLE, "engine=inline", before=("nohup",))
    run.until(lambda run: run.rounds >= 3)

    run.stop(signal.SIGHUP)

    assert run.process.returncode == 0, run.err
    assert result(run.folder) == undisturbed(*LONGER)


def ends(server: str) -> Callable[[Started], None]:
    """Return what kills a server of Ray; its forks, which carry its name, are left alone."""

    def kill(run: Started) -> None:
        for pid, line in family(run.process.pid).items():
            if line.split("\0")[0].endswith(f"/{server}"):
                os.kill(pid, signal.SIGKILL)

    return kill


@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
@pytest.mark.parametrize("rounds", [0, 3])
def test_the_end_of_rays_server_is_a_line(start: Start, server: str, rounds: int) -> None:
    run = start(*STOPPABLE)
    run.until(has_child("default_worker.py") if not rounds else lambda run: run.rounds >= rounds)
    ends(server)(run)

    assert run.process.wait(timeout=LONG) == 1

    (line,) = run.err.splitlines()
    assert f"Ray's server ended ({server})" in line
    assert ("resume=" in line) == bool(rounds)
    assert rounds or "engine=inline" in line
    assert run.left() == []


def test_too_few_processes_for_ray_are_a_line(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray waits for ever where it gets no more threads."""
    monkeypatch.setattr("femfed.engine.ray.tasks_left", lambda: 100)
    done = shell.run("run", "engine=ray", "engine.workers=2")

    assert done.code == 2
    assert "of which 100 are left" in done.error
    assert "engine=inline" in done.error
    assert not (shell.place / "run").exists()


DROPPED = """
import _imp, contextlib, os, signal, sys
import femfed.engine.ray
import femfed.results
import simulate
class Finalized:
    def __del__(self):
        _imp.acquire_lock()  # as a callback of importlib's, which then never lets go of it
        os.kill(os.getpid(), signal.SIGTERM)  # what its handler raises is dropped
quick_start, on_round = femfed.engine.ray._quick_start, femfed.results.Results.on_round
@contextlib.contextmanager
def while_ray_starts():
    with quick_start():
        yield
        Finalized()
def after_a_round(self, finished):
    on_round(self, finished)
    if finished.number == 3:
        Finalized()
if "engine=inline" in sys.argv:
    femfed.results.Results.on_round = after_a_round
else:
    femfed.engine.ray._quick_start = while_ray_starts
sys.argv[0] = "simulate.py"
simulate.main()
"""


@pytest.mark.parametrize("overrides", [(), ("engine=inline",)], ids=["Ray starts", "inline"])
def test_sigterm_within_a_finalizer(start: Start, overrides: tuple[str, ...]) -> None:
    """Python drops exceptions there; the signal has to stop the run all the same."""
    run = start(*STOPPABLE, *overrides, script=DROPPED, PYTHONPATH=str(ROOT))

    run.process.wait(timeout=LONG)

    assert run.process.returncode == 143, run.err
    if overrides:  # otherwise no round is finished, and nothing is left of the run
        log = (run.folder / "simulate.log").read_text()
        assert "Exception ignored in: <function Finalized" in log
    assert run.left() == []
    (line,) = run.err.splitlines()
    assert line.startswith("error: stopped")
    assert run.rounds < 24


def test_a_mistake_that_only_a_worker_sees_is_a_line(start: Start) -> None:
    run = start(*TINY, "engine.workers=1", "strategy=fedper", "model=logistic")

    assert run.process.wait(timeout=LONG) == 2

    (line,) = run.err.splitlines()
    assert line.startswith("error: a head of 2 weight arrays is the whole model; expected fewer")
    assert not run.folder.exists()
    assert run.left() == []


def rays_agents(run: Started) -> list[int]:
    """Return the processes that Ray's server has started for itself, once they are there."""
    return [pid for pid, line in family(run.process.pid).items() if re.match("ray::.+Agent", line)]


def test_those_that_lost_their_parent_end_too(start: Start) -> None:
    run = start(*STOPPABLE)
    # A server that is killed while Ray starts may have Ray's native code wait for it with Python's
    # lock held; then only SIGKILL ends the run, which has another exit code.
    run.until(lambda run: len(rays_agents(run)) == 2 and run.rounds >= 1)
    agents = rays_agents(run)
    (server,) = (pid for pid, line in family(run.process.pid).items() if "raylet/raylet" in line)
    for agent in agents:
        os.kill(agent, signal.SIGSTOP)  # else they would end by themselves
    os.kill(server, signal.SIGKILL)

    try:
        run.stop(signal.SIGTERM)

        assert run.process.returncode == 143, run.err
        assert run.left() == []
        assert not [pid for pid in agents if lives(pid)]
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent, signal.SIGKILL)


CRASH = """
import sys
import femfed.results
import simulate
write = femfed.results.Results.on_round
def on_round(self, finished):
    write(self, finished)
    if finished.number == 3:
        raise ValueError("a bug")
femfed.results.Results.on_round = on_round
sys.argv[0] = "simulate.py"
simulate.main()
"""


def test_a_crash_of_the_driver_leaves_nothing_and_loses_nothing(
    start: Start, undisturbed: Undisturbed
) -> None:
    run = start(*STOPPABLE, script=CRASH, PYTHONPATH=str(ROOT))
    run.until(lambda run: run.rounds >= 1)
    run.shared = shared_files(run.process.pid)

    assert run.process.wait(timeout=LONG) == 1

    assert run.shared
    assert run.left() == []
    first, *trace = run.err.splitlines()
    assert first.startswith("error: no finished round is lost: ")
    assert trace[-1] == "ValueError: a bug"
    assert run.rounds == 3
    assert resumed(run) == undisturbed(*LONGER)


def test_a_sweep_stops_as_a_whole_and_says_what_is_done(
    start: Start, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    slow = ["engine=inline", f"hydra.sweep.dir={tmp_path}/sweep", "hydra.sweep.subdir=${seed}"]
    run = start("-m", *TINY, "local.epochs=200", "seed=0,1,2", *slow)
    run.folder = tmp_path / "sweep" / "1"
    run.until(lambda run: run.rounds >= 1)

    run.stop(signal.SIGINT)

    assert run.process.returncode == 130
    assert run.left() == []
    assert "Traceback" not in run.err
    assert "stopped; 1 runs done; no finished round is lost: " in run.err
    assert (tmp_path / "sweep" / "0" / "summary.json").exists()
    assert not (tmp_path / "sweep" / "2").exists()
    assert resumed(run) == undisturbed("local.epochs=200", "seed=1")


def test_a_run_goes_on_without_the_reader_of_its_output(
    start: Start, undisturbed: Undisturbed
) -> None:
    run = start(*TINY, "engine=inline", before=("sh", "-c", '"$0" "$@" 2>&1 | head -1'))

    assert run.process.wait(timeout=LONG) == 0

    assert run.out.startswith("glyphs")
    assert result(run.folder) == undisturbed()


def test_a_launcher_of_other_processes_is_refused(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As joblib's, whose runs could not tell this process what failed."""
    ids = iter([1])
    monkeypatch.setattr(os, "getpid", lambda: next(ids, 2))

    done = shell.run("run")

    assert done.code == 2
    assert "accepted: hydra/launcher=basic" in done.err.splitlines()[-1]  # after one of Hydra's
    assert not (shell.place / "run" / "rounds.csv").exists()


def test_a_run_without_test_images_ends_well(shell: Shell) -> None:
    """As one on writers of so few images that none is held out."""
    nothing = ["evaluate.test_fraction=0", "evaluate.unseen_fraction=0"]

    done = shell.run("run", "rounds=1", *nothing)

    assert done.code == 0, done.err
    found = result(shell.place / "run")
    assert found["test_accuracy"] is None


def test_a_run_returns_its_final_accuracy(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, undisturbed: Undisturbed
) -> None:
    """Sweepers that search for the best settings ask for it; a run that failed has none."""
    expected = undisturbed()["test_accuracy"]  # before what runs is noted
    returned: list[float | None] = []
    run_job = hydra.core.utils.run_job

    def noted(*arguments: Any, **more: Any) -> Any:
        done = run_job(*arguments, **more)
        returned.append(done.return_value)
        return done

    monkeypatch.setattr("hydra._internal.hydra.run_job", noted)
    assert shell.run("run").code == 0
    assert shell.run("run").code == 2  # it holds a run
    assert returned == [expected, None]


# No room ------------------------------------------------------------------------------------------


def full(patch: pytest.MonkeyPatch, pattern: str, after: int = 0) -> list[Path]:
    """Let the disk be full for files whose path has `pattern` in it; return those written to.

    Args:
        patch: of the test.
        pattern: a regular expression.
        after: how many of these files may be opened before.
    """
    real, hit, found = io.open, list[Path](), list[str]()

    def opened(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        matches = isinstance(file, str | Path) and re.search(pattern, str(file))
        if not matches or not set(mode) & set("wax+"):
            return real(file, mode, *rest, **more)
        found.append(str(file))
        if len(found) <= after:
            return real(file, mode, *rest, **more)
        hit.append(Path(file))
        real(file, mode, *rest, **more).close()
        return real("/dev/full", mode, *rest, **more)

    patch.setattr(io, "open", opened)
    patch.setattr(builtins, "open", opened)
    return hit


# What is written -> where, how often before the disk is full, and the rounds that are then kept.
WRITES = {
    "clients.csv": (r"run/clients\.csv$", 3, 2),
    "rounds.csv": (r"run/rounds\.csv$", 3, 2),
    "tensorboard": (r"run/tensorboard/", 4, 2),
    "checkpoint": (r"run/checkpoint/", 2, 2),
    "the first checkpoint": (r"run/checkpoint/", 0, 0),
    "memory": (r"run/memory/", 5, 2),
    "memory past the cache": (r"run/memory/", 5, 2),
    "model.keras": (r"run/\.model\.keras", 0, 4),
    "writers.csv": (r"run/\.writers\.csv", 0, 4),
    "curves.png": (r"run/\.curves\.png", 0, 4),
    "writers.png": (r"run/\.writers\.png", 0, 4),
    "summary.json": (r"run/\.summary\.json", 0, 4),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_ends_a_run_in_a_line_and_loses_no_round(
    shell: Shell, undisturbed: Undisturbed, what: str
) -> None:
    pattern, after, kept = WRITES[what]
    with pytest.MonkeyPatch.context() as patch:
        if what == "memory past the cache":
            patch.setattr("femfed.engine.apps.available_memory", lambda: 0)
        hit = full(patch, pattern, after)
        done = shell.run("run", "strategy=scaffold")
    assert hit
    assert done.code == 1, done.err
    assert "no finished round is lost: python simulate.py resume=" in done.error
    folder = shell.place / "run"
    partial = [path for path in folder.rglob(".*") if path.is_file()]
    assert partial == []

    again = shell.type(f"resume={folder}")

    assert again.code == 0, again.err
    assert f"goes on from round {min(kept, 3)}" in again.out
    assert result(folder) == undisturbed("strategy=scaffold")


@pytest.mark.parametrize("file", ["images.u8", "labels.u8", "index.json"])
def test_a_full_disk_under_the_cache_leaves_no_half_store(
    shell: Shell, undisturbed: Undisturbed, file: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert full(patch, rf"cache/.*{file}$") == []
        done = shell.run("run")
    assert done.code in (1, 2)
    assert "No space left on device" in done.error
    assert list((shell.place / "cache").iterdir()) == []

    assert shell.run("again").code == 0
    assert result(shell.place / "again") == undisturbed()


def test_a_full_disk_before_the_run_is_a_line(shell: Shell) -> None:
    with pytest.MonkeyPatch.context() as patch:
        full(patch, r"\.hydra/")
        done = shell.run("run")

    assert done.code in (1, 2)
    assert "No space left on device" in done.error
    assert shell.run("again").code == 0


def test_a_full_disk_when_a_run_is_resumed_costs_nothing(
    shell: Shell, undisturbed: Undisturbed
) -> None:
    assert shell.run("run", "rounds=2").code == 0
    folder = shell.place / "run"
    for pattern in (r"\.hydra/config\.yaml", r"run/\.clients\.csv", r"run/\.rounds\.csv"):
        with pytest.MonkeyPatch.context() as patch:
            assert full(patch, pattern) == []
            done = shell.type(f"resume={folder}", "rounds=4")
        assert done.code == 1, pattern
        assert "No space left on device" in done.error

    again = shell.type(f"resume={folder}", "rounds=4")

    assert again.code == 0, again.err
    assert "goes on from round 2" in again.out
    assert result(folder) == undisturbed()


def test_a_file_that_may_not_grow_ends_the_run_in_a_line(
    start: Start, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The limit of a shell's `ulimit -f`: a checkpoint has 195 kB, a table of four rounds 1 kB."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
    script = limit + "import sys, simulate; sys.argv[0] = 'simulate.py'; simulate.main()"
    with opened(tmp_path) as shell:
        assert shell.run("warm", "rounds=1").code == 0  # the images are larger
    run = start(*TINY, "engine=inline", "engine.wire=value", script=script, PYTHONPATH=str(ROOT))

    assert run.process.wait(timeout=LONG) == 1
    (line,) = run.err.splitlines()
    assert os.strerror(errno.EFBIG) in line
    assert resumed(run) == undisturbed()


# Namespaces: a file system and a network of one's own, without privileges -------------------------


def allowed(*flags: str) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["unshare", *flags, "true"], capture_output=True, timeout=LONG)
        return done.returncode == 0
    return False


FILE_SYSTEM = ("unshare", "--user", "--map-root-user", "--mount")
NETWORK = ("unshare", "--user", "--map-root-user", "--net")
needs_file_systems = pytest.mark.skipif(
    not allowed(*FILE_SYSTEM[1:]), reason="this machine lets nobody mount in a namespace"
)
needs_networks = pytest.mark.skipif(
    not (shutil.which("ip") and allowed(*NETWORK[1:])),
    reason="this machine lets nobody make a network namespace, or lacks ip",
)

DISK = """
import os, subprocess, sys
import femfed.engine.federation, femfed.engine.inline, femfed.report.progress, femfed.results
import femfed.client, simulate

place, sizes, arguments = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)

def child(*arguments):
    pid = os.fork()
    if not pid:
        sys.argv[:] = ["simulate.py", *arguments]
        simulate.main()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for size in sizes:
    folder = f"{place}/{size}"
    subprocess.run(["mount", "-o", f"remount,size={size}k", place], check=True)
    print("disk of", size, "exit code", child(*arguments, f"hydra.run.dir={folder}"), flush=True)
    subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
    print("resumed", size, "exit code", child(f"resume={folder}"), flush=True)
    print("sha", os.popen(f"cat {folder}/summary.json").read().split("weights_sha256")[1][4:68])
    subprocess.run(["rm", "-r", folder], check=True)
"""


@needs_file_systems
def test_a_disk_that_is_really_full(tmp_path: Path, undisturbed: Undisturbed) -> None:
    """From a disk that holds not even a log to one on which only the model finds no room."""
    (tmp_path / "disk").mkdir()
    sizes = ["60", "330", "520", "720"]
    command = [*FILE_SYSTEM, sys.executable, "-c", DISK, str(tmp_path / "disk"), ",".join(sizes)]
    command += [*TINY, "engine=inline", f"cache={tmp_path}/cache"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=LONG, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    sha = undisturbed()["weights_sha256"]
    for size in sizes:
        assert f"disk of {size} exit code 1" in done.stdout, done.stdout + done.stderr
        assert f"resumed {size} exit code 0" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count(f"sha {sha}") == len(sizes)


def test_shared_memory_too_small_is_done_without(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, undisturbed: Undisturbed
) -> None:
    usage = shutil.disk_usage
    seen = []

    def used(path: Any) -> Any:
        if Path(path) == SHARED:
            seen.append(sorted(path.name for path in (shell.place / "run").glob("*")))
            return usage(path)._replace(free=100_000)
        return usage(path)

    monkeypatch.setattr(shutil, "disk_usage", used)
    assert shell.run("run").code == 0
    assert seen
    assert list((shell.place / "run").glob("femfed-*")) == []
    assert result(shell.place / "run") == undisturbed()


@needs_file_systems
def test_ray_runs_where_shared_memory_is_tiny(start: Start, undisturbed: Undisturbed) -> None:
    mount = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$0" "$@"'
    run = start(*TINY, "engine.workers=2", before=(*FILE_SYSTEM, "sh", "-c", mount))

    assert run.process.wait(timeout=LONG) == 0, run.err
    assert run.left() == []
    assert result(run.folder) == undisturbed()


# No rights ----------------------------------------------------------------------------------------


def test_an_output_folder_that_is_a_file_is_refused(shell: Shell) -> None:
    (shell.place / "run").write_text("mine")

    done = shell.run("run")

    assert done.code in (1, 2)
    assert str(shell.place / "run") in done.error
    assert (shell.place / "run").read_text() == "mine"


def test_an_output_folder_that_cannot_be_written_is_refused(start: Start, tmp_path: Path) -> None:
    """Read-only for everyone, even for root: a mount, or the mode where that is enough."""
    (tmp_path / "closed").mkdir(mode=0o555)
    before = ()
    if os.access(tmp_path / "closed", os.W_OK):
        if not allowed(*FILE_SYSTEM[1:]):
            pytest.skip("this user may write anywhere")
        closed = shlex.quote(str(tmp_path / "closed"))
        mount = f'mount -t tmpfs -o ro none {closed} && exec "$0" "$@"'
        before = (*FILE_SYSTEM, "sh", "-c", mount)
    run = start(*TINY, "engine=inline", name="closed/run", before=before)

    assert run.process.wait(timeout=LONG) in (1, 2)
    (line,) = run.err.splitlines()
    assert line.startswith("error: ")
    assert str(run.folder) in line
    assert run.left() == []


@pytest.mark.parametrize("name", ["checkpoint", "memory", "rounds.csv", "tensorboard"])
def test_something_else_in_the_way_is_a_line(shell: Shell, name: str) -> None:
    blocked = shell.place / "run" / name
    blocked.parent.mkdir()
    if name == "rounds.csv":
        blocked.mkdir()
    else:
        blocked.write_text("mine")

    done = shell.run("run", "strategy=scaffold")

    assert done.code == 2, done.err
    if name == "rounds.csv":
        assert "holds a run already" in done.error
    else:
        assert f"it holds '{name}'" in done.error
    assert [path.name for path in blocked.parent.iterdir()] == [name]


def test_a_cache_that_cannot_be_made_is_refused(shell: Shell) -> None:
    (shell.place / "cache").write_text("mine")

    done = shell.run("run")

    assert done.code == 2
    assert "give another folder with cache=DIR" in done.error
    assert not (shell.place / "run").exists()


# Neighbours ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def other_ray() -> Iterator[tuple[str, int, Path]]:
    """Start somebody else's cluster; yield its address, its process and its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="sur-", dir="/tmp"))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += [f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false"]
    command += ["--num-cpus=1", "--object-store-memory=80000000", "--node-ip-address=127.0.0.1"]
    command += ["--disable-usage-stats"]
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        try:
            deadline = time.monotonic() + LONG
            while not any("raylet/raylet" in line for line in family(process.pid).values()):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield f"127.0.0.1:{port}", process.pid, folder
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            finally:
                for pid in processes_with(f"TMPDIR={folder}".encode()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                shutil.rmtree(folder, ignore_errors=True)


def servers(pid: int) -> set[int]:
    """Return a cluster's two servers: children of `pid`, while their forks are not."""
    children = {
        int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    }
    return {
        child
        for child, line in family(pid).items()
        if child in children and ("gcs_server" in line or "raylet/" in line)
    }


def test_another_ray_and_its_port_are_left_alone(start: Start, undisturbed: Undisturbed) -> None:
    with other_ray() as (address, pid, folder), contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.socket())
        with contextlib.suppress(OSError):  # Ray's usual port, taken by us or by somebody else
            taken.bind(("127.0.0.1", 6379))
            taken.listen()
        before = servers(pid)
        assert len(before) == 2
        run = start(*TINY, "engine.workers=2", RAY_ADDRESS=address)

        assert run.process.wait(timeout=LONG) == 0, run.err
        assert run.left() == []
        assert servers(pid) == before
        drivers = [path for path in folder.rglob("*") if "core-driver" in path.name]
        assert drivers == []  # a driver that joins has its log there
    assert result(run.folder) == undisturbed()


def test_an_address_of_ray_that_leads_nowhere_is_not_asked(
    start: Start, undisturbed: Undisturbed
) -> None:
    """Two runs at once as well, on one dataset that neither finds converted."""
    runs = [
        start(*TINY, "engine.workers=1", name=name, RAY_ADDRESS="ray://192.0.2.1:10001")
        for name in ("one", "two")
    ]
    for run in runs:
        assert run.process.wait(timeout=LONG) == 0, run.err
        assert run.left() == []
        assert result(run.folder) == undisturbed()
    cache = runs[0].folder.parent / "cache"
    (store,) = cache.iterdir()
    assert {path.name for path in store.iterdir()} == {"images.u8", "labels.u8", "index.json"}


def test_a_run_that_ends_takes_nothing_of_another(tmp_path: Path) -> None:
    """The folders that a run finds in shared memory: those of the dead go, those of others stay."""
    from femfed.engine.wire import shared_folder

    with shared_folder(tmp_path, 1000) as ours, shared_folder(tmp_path, 1000) as theirs:
        abandoned = ours.path.parent / f"femfed-abandoned-{os.getpid()}"
        abandoned.mkdir()
        (abandoned / "lock").touch()
        with shared_folder(tmp_path, 1000):
            pass
        assert not abandoned.exists()
        assert ours.path.exists()
        assert theirs.path.exists()
        with (theirs.path / "lock").open("r+") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Other users of the machine -----------------------------------------------------------------------

# Ray's services, each with a method that only who has the run's token may call.
CALLS = (
    "CoreWorkerService/PushTask",
    "InternalKVGcsService/InternalKVKeys",
    "NodeManagerService/RequestWorkerLease",
    "ObjectManagerService/Push",
)
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F")  # as the kernel writes addresses
NOBODY = 65534  # a user without rights


def listening(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Return the addresses and ports of TCP at which processes listen."""
    held = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            held |= {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {
        (row[1].split(":")[0], int(row[1].split(":")[1], 16))
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in held
    }


def answers(port: int, token: str | None) -> set[str]:
    """Return the codes with which a server answers calls: HTTP's, or gRPC's if it speaks that."""
    sent = {} if token is None else {"authorization": f"Bearer {token}"}
    with (
        contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)
        ) as connection,
        contextlib.suppress(http.client.HTTPException, OSError),
    ):
        connection.request("POST", "/get_or_create_runtime_env", b"", sent)
        return {str(connection.getresponse().status)}
    codes = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for call in CALLS:
            try:
                ask = channel.unary_unary(f"/ray.rpc.{call}")
                ask(b"", timeout=LONG, metadata=tuple(sent.items()))
                codes.add("OK")
            except grpc.RpcError as error:
                codes.add(error.code().name)  # type: ignore[attr-defined]
    return codes


def environment_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    return dict(line.partition("=")[::2] for line in lines)


def test_ray_answers_only_the_run_itself(
    start: Start, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Whatever the user's own settings of Ray say; a wrong token is as good as none."""
    users = {
        "HOME": str(tmp_path),
        "RAY_ADDRESS": "ray://192.0.2.1:10001",
        "RAY_AUTH_MODE": "disabled",
        "RAY_AUTH_TOKEN": "guessed",
        "RAY_TMPDIR": "/nowhere",
        "RAY_START_HOOK": "no.such",
        "RAY_USE_TLS": "1",
        "http_proxy": "http://192.0.2.1:3128",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    run = start(*STOPPABLE, **users)
    run.until(lambda run: run.rounds >= 2)
    processes = family(run.process.pid)
    servers = listening(processes)
    assert len(servers) >= 5
    assert {address for address, _ in servers} <= set(LOOPBACK)
    (worker, *_) = [pid for pid, line in processes.items() if line.startswith("ray::ClientApp")]
    token = environment_of(worker)["RAY_AUTH_TOKEN"]
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert environment_of(worker)["CUDA_VISIBLE_DEVICES"] == "-1"
    for _, port in servers:
        for wrong in (None, "", "guessed", "0" * 64):
            refused = answers(port, wrong)
            assert refused in ({"401"}, {"403"}, {"UNAUTHENTICATED", "UNIMPLEMENTED"}), wrong
        assert not {"401", "403", "UNAUTHENTICATED"} & answers(port, token)

    assert run.process.wait(timeout=LONG) == 0, run.err
    assert run.left() == []
    assert not (tmp_path / ".ray").exists()
    assert token not in run.out + run.err
    for path in run.folder.rglob("*"):
        assert path.is_dir() or token.encode() not in path.read_bytes()
    assert result(run.folder) == undisturbed(*LONGER)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can try as another user")
def test_another_user_gets_into_no_folder_of_a_run(start: Start) -> None:
    """Ray opens its folder to all users: they must not get through to it."""
    run = start(*STOPPABLE)
    run.temporary.parent.chmod(0o755)
    run.until(lambda run: run.rounds >= 1)
    (rays,) = run.temporary.glob("femfed-ray-*")
    shared = {path.parent for path in shared_files(run.process.pid) if path.parent != SHARED}
    inside = [path for folder in (rays, *shared) for path in (folder, *folder.rglob("*"))]
    assert [path for path in inside if path.is_socket()]
    try_all = 'for path do test -r "$path" -o -w "$path" -o -x "$path" && echo "$path"; done; id -u'

    done = subprocess.run(
        ["sh", "-c", try_all, "sh", *map(str, inside)],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
    )

    assert done.stdout.split() == [str(NOBODY)], done.stdout + done.stderr
    assert {path.stat().st_mode & 0o777 for path in (rays, *shared)} == {0o700}


# A clock that jumps -------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, undisturbed: Undisturbed
) -> None:
    """Each time it is asked, it has jumped to a day ago or to a day ahead."""
    real, asked = time.time, list[float]()

    def jumping() -> float:
        asked.append(real() + 86_400 * (-1) ** len(asked))
        return asked[-1]

    monkeypatch.setattr(time, "time", jumping)
    done = shell.run("run")
    monkeypatch.undo()

    assert done.code == 0, done.err
    assert asked
    assert result(shell.place / "run") == undisturbed()
    seconds = summary(shell.place / "run")["seconds"]
    assert all(0 <= value < 3600 for value in seconds.values())
    for row in rows(shell.place / "run" / "rounds.csv"):
        assert all(0 <= float(row[name]) < 3600 for name in row if name.startswith("seconds"))


# Nothing gets in ----------------------------------------------------------------------------------


# A network of which all is loopback and into which all that is sent goes, to be looked at: classic
# BPF takes IPv4 packets that are not for 127.0.0.0/8.
LISTENING = """
import contextlib, ctypes, socket, struct, subprocess, sys
for line in ("ip link set lo up", "ip route add default dev lo"):
    subprocess.run(line.split(), check=True)
code = [(0x28, 0, 0, 12), (0x15, 0, 3, 0x800), (0x30, 0, 0, 30), (0x15, 1, 0, 127),
        (6, 0, 0, 0xFFFF), (6, 0, 0, 0)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
raw.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", len(code), ctypes.addressof(program)))
raw.bind(("lo", 0))
raw.setblocking(False)

def sent():
    found = set()
    with contextlib.suppress(BlockingIOError):
        while True:
            found.add(socket.inet_ntoa(raw.recv(65536)[30:34]))
    return found

sent()
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", ("192.0.2.1", 53))
assert sent() == {"192.0.2.1"}, "would have heard nothing"
done = subprocess.run([sys.executable, "simulate.py", *sys.argv[1:]])
print("sent to", sorted(sent()))
sys.exit(done.returncode)
"""


@needs_networks
def test_a_whole_run_needs_no_network_and_asks_for_none(
    start: Start, undisturbed: Undisturbed
) -> None:
    """No telemetry of Ray or Flower, no name looked up: not a packet leaves for elsewhere."""
    run = start(*TINY, "engine.workers=2", script=LISTENING, before=NETWORK)

    assert run.process.wait(timeout=LONG) == 0, run.err
    assert run.left() == []
    assert run.out.splitlines()[-1] == "sent to []"
    assert result(run.folder) == undisturbed()


@needs_networks
@pytest.mark.parametrize("lost", ["up", "127.0.0.1"])
def test_no_loopback_for_ray_is_a_line(start: Start, lost: str) -> None:
    down = 'ip link set lo up && ip addr del 127.0.0.1/8 dev lo && exec "$0" "$@"'
    ipv6_only = ("sh", "-c", down) if lost == "127.0.0.1" else ()
    run = start(*TINY, "engine.workers=1", before=(*NETWORK, *ipv6_only))

    assert run.process.wait(timeout=LONG) == 2

    (line,) = run.err.splitlines()
    assert line.startswith("error: no connection to 127.0.0.1 ")
    assert "engine=inline" in line
    assert not run.folder.exists()
    assert run.left() == []


def edited(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / ".hydra" / "config.yaml"
    cfg = OmegaConf.load(path)
    change(cfg)
    OmegaConf.save(cfg, path)


@pytest.fixture
def two(shell: Shell) -> Path:
    """A run of two rounds of SCAFFOLD, which has checkpoints and memory."""
    assert shell.run("run", "strategy=scaffold", "rounds=2").code == 0
    return shell.place / "run"


@pytest.mark.parametrize("group", ["dataset", "model", "strategy"])
def test_a_config_that_names_something_else_makes_nothing(
    shell: Shell, two: Path, tmp_path: Path, group: str
) -> None:
    original = (two / ".hydra" / "config.yaml").read_text()
    trace = tmp_path / "trace"
    for target in (
        "os.system",
        "subprocess.Popen",
        "keras.Sequential",
        "flwr.serverapp.strategy.FedAvg",
        "femfed.engine.ray.shutil.rmtree",
        "femfed.engine.ray._send",
        "femfed.engine.inline.TaskIdentity",
        "femfed.config.hydra",
        "femfed.UserError",
        "__main__.main",
    ):
        (two / ".hydra" / "config.yaml").write_text(original)

        def change(cfg: Any, target: str = target) -> None:
            cfg[group] = {"_target_": target, "command": f"touch {trace}"}

        edited(two, change)
        done = shell.type(f"resume={two}", "rounds=3")
        assert done.code == 2, (target, done.err)
        assert target in done.error
    assert not trace.exists()
    (two / ".hydra" / "config.yaml").write_text(original)
    assert shell.type(f"resume={two}", "rounds=3").code == 0


def test_a_dataclass_that_femfed_only_imports_is_not_made() -> None:
    """As `wire.construct` refuses it: Flower's Run stands in femfed.engine.inline as FlowerRun."""
    node = OmegaConf.create({"_target_": "femfed.engine.inline.FlowerRun", "run_id": 1})
    with pytest.raises(UserError, match=r"expected a dataclass of femfed"):
        config.make(node, "model")


def test_flower_rules_of_a_resumed_run_stay_flowers(shell: Shell) -> None:
    assert shell.run("run", "strategy=flower", "rounds=1").code == 0
    folder = shell.place / "run"
    for target in ("os.system", "flwr.serverapp.strategy.Result", "flwr.serverapp.strategy.os"):
        edited(folder, lambda cfg, t=target: cfg.strategy.rule.update({"_target_": t}))
        done = shell.type(f"resume={folder}", "rounds=2")
        assert done.code == 2, done.err
        assert target in done.error


def test_a_resumed_config_cannot_reach_beyond_its_values(shell: Shell, two: Path) -> None:
    """Keys and interpolations of others are refused in a line, not followed."""
    for name, value in (("surplus", 1), ("seed", "${oc.env:HOME}"), ("clients", -1)):
        original = (two / ".hydra" / "config.yaml").read_text()
        edited(two, lambda cfg, n=name, v=value: cfg.update({n: v}))
        done = shell.type(f"resume={two}", "rounds=3")
        assert done.code == 2, done.err
        assert done.error
        (two / ".hydra" / "config.yaml").write_text(original)


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_checkpoint_of_objects_is_not_unpickled(shell: Shell, two: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    newest = two / "checkpoint" / "round_000002.npz"
    with np.load(newest) as arrays:
        kept = dict(arrays)
    kept["weights/0"] = np.array([Planted(trace)], object)
    np.savez(newest, **kept)

    done = shell.type(f"resume={two}", "rounds=3")

    assert done.code == 0, done.err
    assert "round_000002.npz is damaged" in done.out
    assert "goes on from round 1" in done.out
    assert not trace.exists()
    with np.load(newest, allow_pickle=True) as arrays:  # written again by the run
        assert arrays["weights/0"].dtype == np.float32


def test_a_checkpoint_that_is_a_pickle_is_not_unpickled(
    shell: Shell, two: Path, tmp_path: Path
) -> None:
    import pickle

    trace = tmp_path / "trace"
    for path in (two / "checkpoint").iterdir():
        path.write_bytes(pickle.dumps(Planted(trace)))

    done = shell.type(f"resume={two}", "rounds=3")

    assert done.code == 0, done.err
    assert "goes on from round 0" in done.out
    assert not trace.exists()


def test_a_memory_of_objects_is_not_unpickled(shell: Shell, two: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    planted = np.array([Planted(trace)], object)
    for path in (two / "memory").iterdir():
        np.save(path, planted, allow_pickle=True)
        client, round = (int(part) for part in path.stem.split("_")[1::2])
        with pytest.raises(ValueError, match=r"bytes of object"):
            Memories(two / "memory").recall(client, round)

    done = shell.type(f"resume={two}", "rounds=12")

    assert done.code == 2, done.err
    assert "of object" in done.error
    assert not trace.exists()


def test_what_a_run_reads_is_never_a_pickle() -> None:
    for path in [ROOT / "simulate.py", *(ROOT / "femfed").rglob("*.py")]:
        text = path.read_text()
        assert not re.search(r"allow_pickle=True|(?:import|from) (?:pickle|dill|joblib)", text)
        for call in re.findall(r"np\.load\(.*", text):
            assert "allow_pickle=False" in call, path


def test_telemetry_is_off_before_anything_is_imported() -> None:
    code = (
        "import sys, femfed, os; "
        "assert not {'flwr', 'ray', 'tensorflow'} & set(sys.modules); "
        "print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["0", "0"], done.stderr


def test_a_partial_name_is_never_taken_for_a_checkpoint(two: Path) -> None:
    """A run that was killed while it wrote leaves a hidden file, which nobody reads."""
    from femfed import checkpoint

    before = checkpoint.rounds(two / "checkpoint")
    (two / "checkpoint" / ".round_000009.npz.123").write_bytes(b"half")
    assert checkpoint.rounds(two / "checkpoint") == before
    assert results.checkpoint is checkpoint

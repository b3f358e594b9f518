"""What `femfed.engine.ray` replaces in Ray while it starts, and what is imported without."""

import contextlib
import gc
import importlib
import inspect
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private import parameter, services, state, utils

from femfed import Stopped, UserError, light_imports, outlast
from femfed.engine import apps
from femfed.engine import ray as engine
from femfed.engine.apps import ClientError, LostWorkerError
from femfed.engine.folders import OwnedFolder


def test_rays_parts_are_as_known() -> None:
    names = set(inspect.signature(parameter.RayParams).parameters)
    assert {"no_monitor", "include_log_monitor"} <= names
    assert callable(services.start_api_server)
    assert callable(utils.set_sigterm_handler)
    assert list(inspect.signature(state.GlobalState.get_node).parameters) == ["self", "node_id"]
    assert list(inspect.signature(state.GlobalState.node_table).parameters) == ["self"]


def test_ray_starts_our_way_inside_the_block_only() -> None:
    def parts() -> tuple[object, ...]:
        get_node, set_handler = state.GlobalState.get_node, utils.set_sigterm_handler
        return services.start_api_server, parameter.RayParams, get_node, set_handler

    stock = parts()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), engine._quick_start():
        assert services.start_api_server(True, raise_on_failure=True) == (None, None)
        made = parameter.RayParams(num_cpus=1)
        assert made.no_monitor
        assert not made.include_log_monitor
        utils.set_sigterm_handler(lambda *_: None)
        assert signal.getsignal(signal.SIGTERM) is on_sigterm
        assert state.GlobalState.get_node is not stock[2]
        raise RuntimeError
    assert parts() == stock


def test_rays_server_is_seen_as_soon_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own function sleeps for a second where it is not."""
    tables: list[list[dict[str, str]]] = [[], [{"NodeID": "other"}], [{"NodeID": "mine"}]]
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        state.GlobalState, "get_node", lambda self, node: asked.append((node, len(tables)))
    )
    monkeypatch.setattr(state.GlobalState, "node_table", lambda self: tables.pop(0))
    with engine._quick_start():
        state.GlobalState().get_node("mine")
    assert asked == [("mine", 0)]


def test_rays_own_answer_stands_where_its_server_does_not_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def nobody(self: object) -> list[dict[str, str]]:
        asked.append("node_table")
        return []

    monkeypatch.setattr(engine, "SERVER_PATIENCE", 0.05)
    monkeypatch.setattr(state.GlobalState, "get_node", lambda self, node_id: f"no {node_id}")
    monkeypatch.setattr(state.GlobalState, "node_table", nobody)
    with engine._quick_start():
        assert state.GlobalState().get_node(node_id="mine") == "no mine"
    assert len(asked) > 1


def test_another_ray_starts_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def __init__(self, num_cpus: int) -> None: ...

    monkeypatch.setattr(parameter, "RayParams", Other)
    monkeypatch.delattr(services, "start_api_server")
    monkeypatch.delattr(utils, "set_sigterm_handler")
    monkeypatch.delattr(state.GlobalState, "get_node")
    with engine._quick_start():
        assert parameter.RayParams is Other
        assert not hasattr(services, "start_api_server")
        assert not hasattr(utils, "set_sigterm_handler")
        assert not hasattr(state.GlobalState, "get_node")


def test_a_ray_without_a_table_of_nodes_is_asked_as_it_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock = state.GlobalState.get_node
    monkeypatch.delattr(state.GlobalState, "node_table")
    with engine._quick_start():
        assert state.GlobalState.get_node is stock


IN_A_WORKER = """
from femfed.engine import ray as engine
with engine._ray(workers=1, object_store=engine.OBJECT_STORE):
    import ray
    from flwr.simulation.ray_transport.ray_actor import ClientAppActor
    def about(self):
        import os, sys
        return [os.nice(0), *sys.modules]
    print(*ray.get(ClientAppActor.remote().__ray_call__.remote(about)))
"""


@pytest.fixture(scope="module")
def in_a_worker() -> list[str]:
    """A worker's niceness, and the modules it has imported."""
    command = [sys.executable, "-c", IN_A_WORKER]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return done.stdout.split()


def test_workers_let_no_more_programs_go_first_than_the_driver(in_a_worker: list[str]) -> None:
    assert int(in_a_worker[0]) == os.nice(0)


def test_workers_import_what_they_need_before_flower_does(in_a_worker: list[str]) -> None:
    """Flower's actor would bring all of its engine, and TensorFlow with pictures."""
    imported = set(in_a_worker[1:])
    ours = {"femfed.client", "femfed.engine.apps", "femfed.engine.preload", "keras"}
    assert {*ours, "flwr.simulation.ray_transport.ray_actor"} <= imported
    assert not {"flwr.simulation", "sqlalchemy", "fastapi", "matplotlib"} & imported


ONE_AFTER_THE_OTHER = """
from femfed.engine import ray as engine
with engine._ray(workers=1, object_store=engine.OBJECT_STORE) as first:
    pass
with engine._ray(workers=1, object_store=engine.OBJECT_STORE) as second:
    assert not first.exists()
assert not second.exists()
assert not first.exists()
"""


def test_a_second_ray_does_not_know_of_the_first_ones_folder() -> None:
    """Ray writes into the settings that it is given, its folder for one, and made that again."""
    command = [sys.executable, "-c", ONE_AFTER_THE_OTHER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def place_with(temporary: str, patch: pytest.MonkeyPatch) -> Path:
    patch.setenv("TMPDIR", temporary)
    patch.setattr(tempfile, "tempdir", None)  # which Python remembers
    return engine._place()


def test_rays_folder_lies_where_its_sockets_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise Ray ends with an error that says nothing of TMPDIR."""
    monkeypatch.chdir(tmp_path)
    for odd in (tmp_path / ("long" * 10), tmp_path / "\u00fc", tmp_path / "a b", Path("relative")):
        odd.mkdir()
        assert place_with(str(odd), monkeypatch) == Path("/tmp"), odd
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        assert place_with(short, monkeypatch) == Path(short)
        monkeypatch.setattr(engine, "OTHER_PLACES", (f"{short}/gone",))
        with pytest.raises(UserError, match=r"TMPDIR=.*at most \d+ ASCII.*engine=inline"):
            place_with(str(tmp_path / ("long" * 10)), monkeypatch)


PRELOADED = """
import sys
import femfed.engine.preload
actor = sys.modules["flwr.simulation.ray_transport.ray_actor"].ClientAppActor
from flwr.simulation import run_simulation
from flwr.simulation.ray_transport.ray_actor import ClientAppActor
assert ClientAppActor is actor
assert callable(run_simulation)
"""


def test_flowers_engine_can_be_imported_after_its_actor() -> None:
    subprocess.run([sys.executable, "-c", PRELOADED], check=True, timeout=300)


def test_modules_are_missing_inside_the_block_only() -> None:
    assert "this" not in sys.modules  # the Zen of Python, which nobody imports
    with light_imports(without=["this", "json"]), pytest.raises(ModuleNotFoundError):
        assert not gc.isenabled()
        importlib.import_module("this")
    assert "this" not in sys.modules
    assert gc.isenabled()
    assert importlib.import_module("json").loads("1") == 1
    with light_imports(without=["json"]):
        assert importlib.import_module("json").loads("1") == 1  # imported before


def test_a_folder_is_its_process_own_until_the_end(tmp_path: Path) -> None:
    with OwnedFolder(tmp_path, "some-") as mine:
        (mine.path / "file").touch()
        with OwnedFolder(tmp_path, "some-") as other:
            assert mine.path != other.path
            assert mine.path.stat().st_mode & 0o077 == 0
        assert sorted(path.name for path in mine.path.iterdir()) == ["file", "lock"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [ClientError("blamed"), LostWorkerError("again"), OSError("full")]
)
def test_an_engine_that_failed_serves_no_other_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    """A sweep goes on with another run; it has to find no engine rather than a dead one."""
    ended: list[bool] = []

    def federate(*_: Any) -> None:
        raise LostWorkerError("lost") if isinstance(error, ClientError) else error

    def blame(_: Any) -> None:
        if isinstance(error, ClientError):
            raise error

    monkeypatch.setattr(engine, "_check_memory", lambda *_: None)
    monkeypatch.setattr(apps, "travelling", lambda *_: contextlib.nullcontext())
    ours = engine.RayEngine(1, by_value=False, parameters=1)
    monkeypatch.setattr(ours, "_serving", lambda _: SimpleNamespace(federate=federate))
    monkeypatch.setattr(ours, "_end", lambda: ended.append(True))
    run: Any = SimpleNamespace(
        job=SimpleNamespace(nodes=1), done=False, finished=0, blame=blame, on_status=print
    )

    with pytest.raises(type(error), match=str(error)):
        ours.run(run, tmp_path)
    assert len(ended) == (1 + engine.RESTARTS if isinstance(error, LostWorkerError) else 1)


def test_a_signal_does_not_keep_what_ends_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cleanup that no signal began, `Stopped` comes in between, once."""
    removed: list[str] = []

    def interrupted(path: Path, ignore_errors: bool) -> None:
        removed.append(path.name)
        if len(removed) == 1:
            raise Stopped(2)
        rmtree(path)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(Stopped), OwnedFolder(tmp_path, "ours-") as folder:
        pass
    assert removed == [folder.path.name] * 2
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "rays").mkdir()
    removed.clear()
    with pytest.raises(Stopped):
        outlast(lambda: engine._remove(tmp_path / "rays"))
    assert removed == ["rays"] * 2
    assert list(tmp_path.iterdir()) == []


def test_an_end_that_is_interrupted_still_removes_what_ray_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[Any] = []
    monkeypatch.setattr(engine, "_check_memory", lambda *_: None)
    ours = engine.RayEngine(1, by_value=False, parameters=1)
    ours._ray.push(lambda kind, *_: closed.append(kind))

    def interrupted() -> None:
        raise Stopped(2)

    monkeypatch.setattr(ours, "_end", interrupted)
    with pytest.raises(Stopped):
        ours.__exit__(None, None, None)
    assert closed == [Stopped]

"""What `femfed.engine.ray` replaces in Ray while it starts, and what is imported without."""

import contextlib
import gc
import importlib
import inspect
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private import parameter, services, utils

from femfed import Stopped, light_imports, outlast
from femfed.engine import apps
from femfed.engine import ray as engine
from femfed.engine.apps import ClientError, LostWorkerError
from femfed.engine.folders import OwnedFolder


def test_rays_parts_are_as_known() -> None:
    names = set(inspect.signature(parameter.RayParams).parameters)
    assert {"no_monitor", "include_log_monitor"} <= names
    assert callable(services.start_api_server)
    assert callable(utils.set_sigterm_handler)


def test_ray_starts_servers_only_inside_the_block() -> None:
    stock = services.start_api_server, parameter.RayParams, utils.set_sigterm_handler
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), engine._servers_only():
        assert services.start_api_server(True, raise_on_failure=True) == (None, None)
        made = parameter.RayParams(num_cpus=1)
        assert made.no_monitor
        assert not made.include_log_monitor
        utils.set_sigterm_handler(lambda *_: None)
        assert signal.getsignal(signal.SIGTERM) is on_sigterm
        raise RuntimeError
    assert (services.start_api_server, parameter.RayParams, utils.set_sigterm_handler) == stock


def test_another_ray_starts_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def __init__(self, num_cpus: int) -> None: ...

    monkeypatch.setattr(parameter, "RayParams", Other)
    monkeypatch.delattr(services, "start_api_server")
    monkeypatch.delattr(utils, "set_sigterm_handler")
    with engine._servers_only():
        assert parameter.RayParams is Other
        assert not hasattr(services, "start_api_server")
        assert not hasattr(utils, "set_sigterm_handler")


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

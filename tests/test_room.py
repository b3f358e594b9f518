"""How much memory there is, and how much a run took."""

import json
from pathlib import Path

import numpy as np
import pytest

from femfed.engine.apps import Run, travelling
from femfed.engine.room import available_memory, peak_memory, worker_memory
from tests.test_engine import a_job, store  # noqa: F401  # a fixture
from tests.test_resume import run as type_run


def test_available_memory_is_a_sensible_number() -> None:
    assert 2**28 < available_memory() < 2**46


def test_a_run_counts_what_it_took_and_not_what_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep's runs share their processes; inline, driver and worker are one."""
    np.ones(2**26)  # half a GiB, free again
    before = peak_memory()

    type_run(monkeypatch, tmp_path / "run")

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 2**27 < 1e6 * summary["peak_memory_mb"] < before - 2**28


def test_updates_that_would_take_the_workers_memory_travel_through_files(
    store,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it would fit in shared memory itself: that is memory, too."""
    said: list[str] = []
    run = Run(a_job(store, tmp_path), None, None, lambda _: None, lambda *_: None, said.append)
    others = (run.job.workers + 1) * worker_memory(run.job.model.parameters)
    monkeypatch.setattr("femfed.engine.wire.available_memory", lambda: others + run.shared_bytes)
    with travelling(run, tmp_path) as folder:
        assert folder is not None
        assert folder.parent == tmp_path
    assert said == ["weights and updates, 0.0 GiB, do not fit in shared memory"]

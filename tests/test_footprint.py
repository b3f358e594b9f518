"""How much memory there is, and how much a run takes."""

import json
from pathlib import Path

import numpy as np
import pytest

from femfed.engine import footprint
from femfed.engine.apps import Run, travelling
from femfed.engine.footprint import available_memory, forget_peak, peak_memory
from tests.test_engine import a_job, store  # noqa: F401  # a fixture
from tests.test_resume import run as type_run


def test_available_memory_is_a_sensible_number() -> None:
    assert 2**28 < available_memory() < 2**46


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_of_processes_has_less(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it used for the pages of files is given back before anything else."""
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    for name, number in zip(names, (1000, 900), strict=True):
        (folder / f"memory.{name}").write_text(f"{number}\n")
    (folder / "memory.stat").write_text("anon 400\ninactive_anon 30\ninactive_file 500\n")
    monkeypatch.setattr(footprint, "_GROUP", tmp_path)
    assert available_memory() == 600


def test_a_run_counts_what_it_took_and_not_what_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep's runs share their processes; inline, driver and worker are one."""
    forget_peak()
    np.ones(2**26)  # half a GiB, free again
    before = peak_memory()

    type_run(monkeypatch, tmp_path / "run")

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 2**27 < 1e6 * summary["peak_memory_mb"] < before - 2**28


@pytest.mark.parametrize("is_enough", [True, False])
def test_updates_that_take_half_of_the_memory_travel_through_files(
    is_enough: bool,
    store,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    run = Run(a_job(store, tmp_path), None, None, lambda _: None, lambda *_: None, said.append)
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr("femfed.engine.wire.SHARED_MEMORY", tmp_path / "memory")
    there = 2 * run.shared_bytes + is_enough
    monkeypatch.setattr("femfed.engine.wire.available_memory", lambda: there)

    with travelling(run, tmp_path) as folder:
        assert folder is not None
        assert folder.parent == (tmp_path / "memory" if is_enough else tmp_path)
    assert len(said) == (0 if is_enough else 1)
    assert all(f"travel through files in {tmp_path}:" in line for line in said)

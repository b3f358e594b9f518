"""How much memory there is, and how much a run takes."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from femfed.engine import footprint
from femfed.engine.apps import Run, travelling
from femfed.engine.footprint import (
    available_cpus,
    available_memory,
    forget_peak,
    peak_memory,
)
from tests.test_engine import a_job, store  # noqa: F401  # a fixture
from tests.test_resume import TINY, typed
from tests.test_resume import run as type_run


def test_available_memory_is_a_sensible_number() -> None:
    assert 2**28 < available_memory() < 2**46


NESTED = "system.slice/slurmstepd.scope/job_77"  # as Slurm names a job's group
GIB = 2**30


def machine(
    folder: Path, own: str, files: dict[str, dict[str, object]] | None = None
) -> dict[str, Path]:
    """Write control groups and the file that names a process's own; return them as arguments."""
    for group, contents in (files or {}).items():
        (folder / group).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / group / name).write_text(f"{content}\n")
    (folder / "own").write_text(own)
    return {"groups": folder, "own": folder / "own"}


def memory(limit: object, used: int, version: int = 2, files: int = 0) -> dict[str, object]:
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    numbers = {f"memory.{name}": its for name, its in zip(names, (limit, used), strict=True)}
    stat = "total_inactive_file" if version == 1 else "inactive_file"
    return {**numbers, "memory.stat": f"anon 400\ninactive_anon 30\n{stat} {files}"}


NO_LIMIT = 9223372036854771712  # of version 1
MEMORY = {
    "version 2, its root": ("0::/\n", {"": memory(1000, 900, files=500)}, 600),
    "version 1, its root": ("4:memory:/\n", {"memory": memory(1000, 900, 1, files=500)}, 600),
    "version 2, nested": (
        f"0::/{NESTED}\n",
        {NESTED: memory(2 * GIB, GIB), "": memory("max", 3 * GIB)},
        GIB,
    ),
    "version 2, above": (
        f"0::/{NESTED}\n",
        {NESTED: memory("max", 0), "system.slice": memory(3000, 1000)},
        2000,
    ),
    "version 2, slowed down": (
        f"0::/{NESTED}\n",
        {NESTED: {**memory("max", 1000), "memory.high": 3000}},
        2000,
    ),
    "version 1, nested": (
        f"7:cpu,cpuacct:/\n4:hugetlb,memory:/{NESTED}\n0::/\n",
        {f"memory/{NESTED}": memory(5000, 1000, 1), "memory": memory(NO_LIMIT, 9, 1)},
        4000,
    ),
    "version 2 beside version 1": (
        f"1:name=systemd:/\n0::/{NESTED}\n",
        {f"unified/{NESTED}": memory(5000, 1000)},
        4000,
    ),
    "a container's own root": (
        "4:memory:/docker/0123\n",  # as the host names it, which is not mounted here
        {"memory": memory(5000, 1000, 1)},
        4000,
    ),
    "another group": (f"0::/{NESTED}\n", {"user.slice": memory(5000, 1000)}, None),
    "outside of what is mounted": ("0::/../other\n", {"other": memory(5000, 1000)}, None),
    "used up": ("0::/\n", {"": memory(1000, 1001)}, 0),
    "no statistics": ("0::/\n", {"": {"memory.max": 1000, "memory.current": 400}}, 600),
}


@pytest.mark.parametrize("name", MEMORY)
def test_a_group_of_processes_has_less(name: str, tmp_path: Path) -> None:
    """What it used for the pages of files is given back before anything else."""
    own, files, expected = MEMORY[name]

    available = available_memory(**machine(tmp_path, own, files))

    assert available == expected if expected is not None else available > 2**28


def test_no_control_groups_leave_the_machine(tmp_path: Path) -> None:
    absent = tmp_path / "absent"

    assert available_memory(absent, absent) > 2**28
    assert available_cpus(absent, absent) == len(os.sched_getaffinity(0))


CPUS = {  # of a machine of eight
    "no limit": ("0::/\n", {"": {"cpu.max": "max 100000"}}, 8),
    "half": ("0::/\n", {"": {"cpu.max": "50000 100000"}}, 1),
    "two and a half": ("0::/\n", {"": {"cpu.max": "250000 100000"}}, 2),
    "more than there are": ("0::/\n", {"": {"cpu.max": "1600000 100000"}}, 8),
    "nested": (
        f"0::/{NESTED}\n",
        {NESTED: {"cpu.max": "max 100000"}, "system.slice": {"cpu.max": "300000 100000"}},
        3,
    ),
    "version 1": (
        "1:cpu:/\n",
        {"cpu": {"cpu.cfs_quota_us": 400_000, "cpu.cfs_period_us": 100_000}},
        4,
    ),
    "version 1, no limit": (
        "1:cpu:/\n",
        {"cpu": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100_000}},
        8,
    ),
    "version 1, nested": (
        f"1:cpu,cpuacct:/{NESTED}\n",
        {f"cpu,cpuacct/{NESTED}": {"cpu.cfs_quota_us": 200_000, "cpu.cfs_period_us": 100_000}},
        2,
    ),
}


@pytest.mark.parametrize("name", CPUS)
def test_a_quota_is_as_many_processors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    own, files, expected = CPUS[name]

    assert available_cpus(**machine(tmp_path, own, files)) == expected


def test_a_run_starts_as_many_workers_as_its_quota_has_and_its_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"cpu.max": "300000 100000", **memory(5 * GIB // 2, 0)}
    fake = machine(tmp_path, "0::/\n", {"": limits})
    monkeypatch.setattr(footprint, "_GROUP", fake["groups"])
    monkeypatch.setattr(footprint, "_OWN", fake["own"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    folders = [f"hydra.run.dir={tmp_path}/run", f"cache={tmp_path}/cache"]

    by_quota = typed(monkeypatch, *TINY[:-1], "engine=ray", "model=2nn", *folders)
    given = typed(monkeypatch, *TINY[:-1], "engine=ray", "engine.workers=8", *folders)

    for (code, _, line), workers in ((by_quota, 3), (given, 8)):
        assert code == 2
        assert f"{workers} workers need about" in line
        assert (
            "of which 2.5 GiB are available; expected at most 2 workers: engine.workers=2" in line
        )


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_too_few_addresses_are_refused(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (GIB, GIB))
    folders = [f"hydra.run.dir={tmp_path}/run", f"cache={tmp_path}/cache"]

    overrides = (*TINY[:-1], f"engine={engine}", "engine.workers=1")
    code, _, line = typed(monkeypatch, *overrides, *folders)

    assert code == 2
    assert "1.0 GiB of addresses (ulimit -v); accepted: at least" in line
    assert not (tmp_path / "run").exists()


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

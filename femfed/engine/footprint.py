"""How much memory and how many processors there are, and how much memory processes take.

Limits are those of this process's control group and of those above it, as Slurm, systemd, Docker
and Kubernetes set them, in either version of Linux's control groups.
"""

import contextlib
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from femfed import UserError

_GROUP = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_memory(groups: Path | None = None, own: Path | None = None) -> int:
    """Return the bytes that this machine, or a group that this process is in, has to give.

    Args:
        groups: where control groups are mounted.
        own: file that names the groups of this process.
    """
    available = 1024 * _number("MemAvailable:", Path("/proc/meminfo"))
    for folder in _groups("memory", groups or _GROUP, own or _OWN):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),  # beyond, the system slows the group down
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                left += _pages_of_files(folder / "memory.stat")  # given back before anything else
                available = min(available, max(0, left))
    return available


def available_cpus(groups: Path | None = None, own: Path | None = None) -> int:
    """Return how many processors this process may keep busy: by affinity and quota, at least 1.

    Args:
        groups: where control groups are mounted.
        own: file that names the groups of this process.
    """
    available = float(len(os.sched_getaffinity(0)))
    for folder in _groups("cpu", groups or _GROUP, own or _OWN):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            available = min(available, quota / period)
        with contextlib.suppress(OSError, ValueError):
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            if quota > 0:  # -1 is no quota
                period = int((folder / "cpu.cfs_period_us").read_text())
                available = min(available, quota / period)
    return max(1, int(available))


def _groups(controller: str, mounted: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups that may limit it, and of those above them.

    The roots are always among them: in a container, they are its own group, whatever `own` says.
    """
    lines = own.read_text().splitlines() if own.exists() else []
    paths = {mounted: "/", mounted / "unified": "/", mounted / controller: "/"}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, alone or beside version 1
            paths[mounted] = paths[mounted / "unified"] = path
        elif controller in controllers.split(","):
            paths[mounted / controller] = paths[mounted / controllers] = path
    for root, path in paths.items():
        folder = root / path.strip("/")
        if ".." not in folder.parts:  # else the group is outside of what is mounted here
            yield from (parent for parent in folder.parents if root in parent.parents)
            yield folder
        yield root


def check_address_space(needed: int) -> None:
    """Refuse a limit of addresses in which libraries cannot be loaded, as some clusters set it.

    Args:
        needed: bytes of the largest process, most of which it never touches.

    Raises:
        UserError: the limit, and what is needed.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit not in (resource.RLIM_INFINITY, -1) and limit < needed:
        raise UserError(
            f"a process may have {limit / 2**30:.1f} GiB of addresses (ulimit -v); accepted: at "
            f"least {needed / 2**30:.1f} GiB; raise the limit (ulimit -v unlimited, or h_vmem or "
            "its like of a cluster)"
        )


def tasks_left() -> int:
    """Return how many processes and threads the groups of this process, and its user, may add."""
    left = [limit - used for limit, used in map(_task_group, _task_groups())]
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.getuid() and limit != resource.RLIM_INFINITY:  # root's are not counted
        left.append(limit - _tasks_of(os.getuid()))
    return max(0, min(left, default=sys.maxsize))


def task_limit() -> int:
    """Return the lowest limit of processes and threads that holds for this process."""
    limits = [_task_group(folder)[0] for folder in _task_groups()]
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.getuid() and limit != resource.RLIM_INFINITY:
        limits.append(limit)
    return min(limits, default=sys.maxsize)


def refused_tasks() -> int:
    """Return how often the system has refused this process's groups another process or thread."""
    counts = [0]
    for folder in _task_groups():
        with contextlib.suppress(OSError, ValueError):
            counts.append(_number("max", folder / "pids.events"))
    return sum(counts)


def _task_groups() -> Iterator[Path]:
    """Yield the folders of this process's groups that limit tasks."""
    for folder in _groups("pids", _GROUP, _OWN):
        if (folder / "pids.max").exists():
            yield folder


def _task_group(folder: Path) -> tuple[int, int]:
    """Return the limit of tasks in a group, and how many there are."""
    try:
        limit = (folder / "pids.max").read_text().strip()
        used = int((folder / "pids.current").read_text())
        return (sys.maxsize if limit == "max" else int(limit)), used
    except (OSError, ValueError):
        return sys.maxsize, 0


def _tasks_of(user: int) -> int:
    """Return how many processes and threads of a user this process sees."""
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if path.stat().st_uid == user:
                count += _number("Threads:", path / "status")
    return count


def peak_memory(process: int | str = "self") -> int:
    """Return the most bytes of memory that a process has held, this one since `forget_peak`.

    Raises:
        OSError: there is no such process.
        ValueError: it has ended, or has no memory of its own.
    """
    return 1024 * _number("VmHWM:", Path(f"/proc/{process}/status"))


def forget_peak() -> None:
    """Have `peak_memory` begin from what this process holds now: a sweep's runs share processes.

    Where the system refuses it, later runs' peaks include the earlier ones'.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _pages_of_files(stat: Path) -> int:
    """Return the bytes of files' pages that a group and those below it have not used lately."""
    for name in ("total_inactive_file", "inactive_file"):  # version 1; version 2
        with contextlib.suppress(OSError, ValueError):
            return _number(name, stat)
    return 0


def _number(name: str, path: Path) -> int:
    """Return what stands behind a name at the beginning of a line; ValueError if it is nowhere."""
    found = re.search(rf"^{name}\s+(\d+)", path.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} has no {name}")
    return int(found[1])

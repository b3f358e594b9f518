"""How much memory there is, and how much of it processes take."""

import contextlib
import re
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Return the bytes that this machine, or the group of processes this is in, has to give."""
    available = 1024 * _number("MemAvailable:", Path("/proc/meminfo"))
    for folder, limit, used in (
        (_GROUP, "memory.max", "memory.current"),
        (_GROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            left += _number("inactive_file", folder / "memory.stat")  # files' pages: given back
            available = min(available, left)
    return available


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


def _number(name: str, path: Path) -> int:
    """Return what stands behind a name at the beginning of a line; ValueError if it is nowhere."""
    found = re.search(rf"^{name}\s+(\d+)", path.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} has no {name}")
    return int(found[1])

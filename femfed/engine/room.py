"""How much memory there is, and how much of it a run takes."""

import contextlib
import resource
from pathlib import Path

_WORKER = 700 * 2**20  # bytes of a worker without a model: TensorFlow, Flower, Ray
_PARAMETER = 48  # bytes a weight: weights, global weights, gradients, sums, activations


def worker_memory(parameters: int) -> int:
    """Return about the bytes that a worker needs for a model of so many weights.

    The driver needs less than that.
    """
    return _WORKER + _PARAMETER * parameters


def available_memory() -> int:
    """Return the bytes that this machine, or the group of processes this is in, has to give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            group = Path("/sys/fs/cgroup")
            left = int((group / limit).read_text()) - int((group / used).read_text())
            available = min(available, left)
    return available


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held since `forget_peak`."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux


def forget_peak() -> None:
    """Have `peak_memory` begin from what this process holds now: a sweep's runs share processes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")

"""A contestant as the driver sees it: a process that trains a round when asked to."""

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from benchmarks.faults import family, kill
from femfed.engine.footprint import peak_memory

PATIENCE = 30  # seconds that a contestant has for an orderly end


class FailedError(Exception):
    """A contestant ended before it had answered."""


class Contestant:
    """Starts `command`, and leaves none of its processes behind.

    Its start-up is the time to the end of its first round. It stays in the driver's session, so
    that a scheduler that groups by session treats all contestants alike.

    Args:
        command: see `protocol.py`.
        environment: variables that it has.
        log: receives its stderr.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        start = time.perf_counter()
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
            )
        self.versions: dict[str, str] = {}
        self.round()
        self.startup = time.perf_counter() - start

    def round(self) -> float:
        """Return the seconds that one round takes.

        Raises:
            FailedError: it ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        start = time.perf_counter()
        try:
            self._process.stdin.write("round\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        seconds = time.perf_counter() - start
        if not answer:
            self.close()
            lines = [line for line in self._log.read_text().splitlines() if line.strip()]
            raise FailedError(f"{lines[-1] if lines else 'no output'} ({self._log})")
        self.versions = json.loads(answer)["versions"]
        return seconds

    def peak_memory(self) -> float:
        """Return the MiB at which its processes peaked, each by itself, shared pages included."""
        return sum(map(_peak, family(self._process.pid)))

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it: by the end of its input, and what is left by force."""
        members = family(self._process.pid)
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(PATIENCE)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass
        kill([pid for pid, line in members.items() if _line(pid) == line])
        self._process.wait()


def _line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _peak(pid: int) -> float:
    try:
        return peak_memory(pid) / 2**20
    except (OSError, ValueError):  # has ended
        return 0.0

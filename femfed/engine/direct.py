"""Files written and read past the system's cache, while something else goes on.

The disk moves them from and to buffers that are used again, where the cache would need new pages
for each. That takes the disk some time, but hardly any of the processor.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

BLOCK = 4096  # bytes of a file; where a block is overwritten in part, the disk is read first
IOV_MAX = os.sysconf("SC_IOV_MAX")  # parts that Linux writes in a call


class Background:
    """Does one thing at a time in a thread; what it raised is told to who waits for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._doing: list[Future[None]] = []  # one at most

    def begin(self, what: Callable[[], None]) -> None:
        """Begin to do `what`, once the thing before is done.

        Raises:
            Exception: what the thing before raised.
        """
        self.finish()
        self._doing.append(self._thread.submit(what))

    def finish(self) -> None:
        """Wait until all is done.

        Raises:
            Exception: what was raised there.
        """
        wait(self._doing)  # and forget it only then, if this is interrupted
        while self._doing:
            self._doing.pop().result()


def buffer(size: int) -> mmap.mmap:
    """Return zeros that begin where a page does, as a disk wants them."""
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@contextlib.contextmanager
def opened(path: Path, mode: str) -> Iterator[int]:
    """Yield a file's descriptor; errors there tell which file it was."""
    with path.open(mode, buffering=0) as file:
        try:
            yield file.fileno()
        except OSError as error:
            error.filename = error.filename or str(path)
            raise


def past_cache(descriptor: int, move: Callable[[], None]) -> None:
    """Have a file read or written past the system's cache, or through it where that cannot be.

    Args:
        descriptor: of the file.
        move: reads or writes whole blocks from a buffer or to one; called again if it is refused.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0))  # not of macOS
        move()
    except OSError as error:
        if error.errno != errno.EINVAL:  # no such thing on this file system, or of larger blocks
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        move()


def write(descriptor: int, parts: list[memoryview], begin: int = 0) -> None:
    """Write parts one after the other from `begin` on; `parts` is empty afterwards.

    In one call, so that no block is written in part where one of them ends and the next begins. If
    it writes some of them only, as of more than `IOV_MAX` or 2 GiB, another one follows.
    """
    os.lseek(descriptor, begin, os.SEEK_SET)
    while parts:
        written = os.writev(descriptor, parts[:IOV_MAX])
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][written:]


def read(descriptor: int, into: memoryview, size: int, begin: int = 0) -> None:
    """Read `size` bytes of a file from `begin` on; `into` may hold more, to a whole block.

    Raises:
        OSError: there are fewer.
    """
    os.lseek(descriptor, begin, os.SEEK_SET)
    done = 0
    while done < size:
        count = os.readv(descriptor, [into[done:]])
        if not count:
            raise OSError(errno.EIO, f"it ends after {done} of {size} bytes")
        done += count

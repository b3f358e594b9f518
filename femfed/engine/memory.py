"""What clients remember from round to round: a file per client and round, in the run's folder.

Versions make resuming exact: whoever starts again after round r takes every client's newest version
of a round up to r, whatever was written after it. A writer who never took part has no file.

Files that nobody needs any more are overwritten rather than removed: their pages are in memory, and
new ones for a model a client cost more than what is written there. Where there are too many for the
memory, a version is let go from it once its client has trained. Left to itself the system takes
those that were written and not yet read: the ones that the next round begins with.
"""

import contextlib
import ctypes
import mmap
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from femfed.checkpoint import takes
from femfed.local import DivergedError, is_finite

Vector = NDArray[np.float32]

BLOCK = 4096  # bytes of a file; where a block is overwritten in part, the disk is read first
SYNC_FILE_RANGE_WRITE = 2  # of Linux: begin to write, and wait for nothing
IOV_MAX = os.sysconf("SC_IOV_MAX")  # parts that Linux writes in a call


class Memories:
    """The memories of one run.

    Args:
        folder: where they lie; made when the first is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spare = folder / "spare"  # files to overwrite

    def keep(self, client: int, round: int, vectors: Sequence[Vector]) -> None:
        """Write what a client remembers after a round as one vector, whole or not at all.

        Args:
            client: which.
            round: the round.
            vectors: flat, of float32; one after the other in the file.

        Raises:
            DivergedError: it holds NaN or infinity.
        """
        if not all(is_finite(vector) for vector in vectors):
            raise DivergedError("what the client remembers holds NaN or infinity")
        size = sum(vector.size for vector in vectors)
        numbers = [np.asarray(vector, np.float32).view(np.uint8).data for vector in vectors]
        parts = [memoryview(_header(size)), *numbers, memoryview(bytes(-4 * size % BLOCK))]
        self._folder.mkdir(exist_ok=True)
        path = self._path(client, round)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            mode = "r+b" if self._takes_spare(partial) else "wb"
            with partial.open(mode, buffering=0) as file:
                _write(file.fileno(), parts)
                file.truncate(BLOCK + 4 * size)
                _start_writing(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def recall(self, client: int, round: int) -> Vector | None:
        """Return what a client remembers since `round`; None if that is 0, before its first.

        Raises:
            ValueError: its file is not what `keep` writes.
        """
        if not round:
            return None
        path = self._path(client, round)
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            left = path.stat().st_size - file.tell()
            if dtype.hasobject:
                np.load(path, allow_pickle=False)  # refuses it
            if version != (1, 0) or dtype != np.float32 or shape != (left // 4,) or left % 4:
                raise ValueError(
                    f"{path} holds {left} bytes of {dtype} {shape}; expected a vector of float32"
                )
            # Not read: TensorFlow works in the system's pages of the file, which stays as it is.
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return np.frombuffer(pages, np.float32, offset=file.tell())

    def release(self, client: int, round: int) -> None:
        """Ask the system to drop a version from memory, save what is mapped or not on disk yet.

        Its file stays; where there is none any more, or `round` is 0, there is nothing to drop.
        """
        with (
            contextlib.suppress(FileNotFoundError),
            self._path(client, round).open("rb") as file,
        ):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def versions(self, clients: int, finished: int) -> NDArray[np.int64]:
        """Return each client's newest round up to `finished`, 0 where there is none."""
        newest = np.zeros(clients, np.int64)
        for client, round in self._kept():
            if round <= finished:
                newest[client] = max(newest[client], round)
        return newest

    def sync(self, after: int) -> None:
        """Have the disk hold what was kept after a round, before a checkpoint counts on it."""
        paths = [self._path(client, round) for client, round in self._kept() if round > after]
        for path in [*paths, *([self._folder] if paths else [])]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def rewind(self, round: int) -> None:
        """Remove what was kept after `round`, by another run maybe, and what was not finished."""
        for client, version in self._kept():
            if version > round:
                self._path(client, version).unlink()
        for partial in self._folder.glob(".client_*"):  # of a worker that was killed
            partial.unlink()

    def prune(self, round: int) -> None:
        """Let go of what is not needed by anyone who starts again after `round` or later.

        The next round overwrites it; what this one has not is removed.
        """
        self.remove_spare()
        kept = self._kept()
        newest: dict[int, int] = {}
        for client, version in kept:
            if version <= round:
                newest[client] = max(newest.get(client, 0), version)
        for client, version in kept:
            if version < newest.get(client, 0):
                self._spare.mkdir(exist_ok=True)
                path = self._path(client, version)
                path.rename(self._spare / path.name)

    def remove_spare(self) -> None:
        """Remove what `prune` let go of and no round has overwritten."""
        shutil.rmtree(self._spare, ignore_errors=True)

    def _takes_spare(self, partial: Path) -> bool:
        """Move a file that nobody needs to `partial`; return whether there was one."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self._spare) as spare:
            return any(takes(Path(entry), partial) for entry in spare)
        return False

    def _path(self, client: int, round: int) -> Path:
        return self._folder / f"client_{client:06d}_round_{round:06d}.npy"

    def _kept(self) -> list[tuple[int, int]]:
        names = [path.stem.split("_") for path in self._folder.glob("client_*.npy")]
        return [(int(client), int(round)) for _, client, _, round in names]


def _header(size: int) -> bytes:
    """Return how an npy file of float32 begins, filled up with spaces to a whole block."""
    magic = np.lib.format.magic(1, 0)
    about = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (size,)}
    length = BLOCK - len(magic) - 2
    return magic + length.to_bytes(2, "little") + str(about).ljust(length - 1).encode() + b"\n"


def _start_writing(descriptor: int) -> None:
    """Have the disk begin with a file, so that `sync` waits for less of it, where Linux can."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        whole = ctypes.c_int64(0)
        begin(descriptor, whole, whole, SYNC_FILE_RANGE_WRITE)


def _write(descriptor: int, parts: list[memoryview]) -> None:
    """Write parts one after the other; `parts` is empty afterwards.

    In one call, so that no block is written in part where one of them ends and the next begins. If
    it writes some of them only, as of more than `IOV_MAX` or 2 GiB, another one follows.
    """
    while parts:
        written = os.writev(descriptor, parts[:IOV_MAX])
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][written:]

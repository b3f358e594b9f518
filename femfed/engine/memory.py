"""What clients remember from round to round: a file per client and round, in the run's folder.

Versions make resuming exact: whoever starts again after round r takes every client's newest version
of a round up to r, whatever was written after it. A writer who never took part has no file. A file
states the CRC-32 of its numbers, which is checked when it is read; a checkpoint states it as well.

Files that nobody needs any more are overwritten rather than removed: their pages are in memory, and
new ones for a model a client cost more than what is written there. Where there are too many for the
memory, they are written and read past the system's cache (`Uncached`). Left to itself the system
gives up those that were written and not yet read: the ones that the next round begins with.
"""

import contextlib
import ctypes
import io
import mmap
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from femfed.checkpoint import ClientStates, takes
from femfed.engine.direct import BLOCK, Background, buffer, opened, past_cache, read, write
from femfed.local import DivergedError, is_finite

Vector = NDArray[np.float32]

SYNC_FILE_RANGE_WRITE = 2  # of Linux: begin to write, and wait for nothing


class ClientStateError(OSError, ValueError):
    """The file of a client's state is missing, or not what was written."""


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
        parts = _parts(vectors)
        with self.unfinished(client, round) as descriptor:
            write(descriptor, parts)
            os.ftruncate(descriptor, BLOCK + sum(vector.nbytes for vector in vectors))
            _start_writing(descriptor)

    @contextlib.contextmanager
    def unfinished(self, client: int, round: int) -> Iterator[int]:
        """Yield the descriptor of a file that becomes a version once all is written there."""
        self._folder.mkdir(exist_ok=True)
        path = self.path(client, round)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            mode = "r+b" if self._takes_spare(partial) else "wb"
            with opened(partial, mode) as descriptor:
                yield descriptor
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def recall(self, client: int, round: int) -> Vector | None:
        """Return what a client remembers since `round`; None if that is 0, before its first.

        Raises:
            ClientStateError: its file is not what `keep` writes.
        """
        return self._checked(client, round)[0] if round else None

    def _checked(self, client: int, round: int) -> tuple[Vector, int]:
        """Return a client's state and its CRC-32, which is that of the file's first block."""
        path = self.path(client, round)
        with path.open("rb") as file:
            head = file.read(BLOCK)
            begins = _begin_of_numbers(path, head, path.stat().st_size)
            # Not copied: TensorFlow works in the system's pages of the file, which stays as it is.
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            vector = np.frombuffer(pages, np.float32, offset=begins)
            return vector, _check(path, head, vector)

    def versions(self, clients: int, finished: int) -> NDArray[np.int64]:
        """Return each client's newest round up to `finished`, 0 where there is none."""
        newest = np.zeros(clients, np.int64)
        for client, round in self._kept():
            if round <= finished and client < clients:
                newest[client] = max(newest[client], round)
        return newest

    def sync(self, after: int) -> ClientStates:
        """Have the disk hold what was kept after a round, before a checkpoint counts on it.

        Returns:
            The newest state of each client that has one since.

        Raises:
            ClientStateError: a file is not what `keep` writes.
        """
        newest: ClientStates = {}
        for client, round in sorted(self._kept(), key=lambda kept: kept[1]):
            if round > after:
                path = self.path(client, round)
                with path.open("rb", buffering=0) as file:
                    os.fsync(file.fileno())
                    newest[client] = round, _checksum(file.read(BLOCK)) or 0
        if newest:
            descriptor = os.open(self._folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        return newest

    def check(self, states: ClientStates) -> None:
        """Read all files of these states.

        Raises:
            ClientStateError: one is missing, or is not what a checkpoint counts on.
        """
        for client, (round, checksum) in states.items():
            path = self.path(client, round)
            try:
                _, found = self._checked(client, round)
            except FileNotFoundError:
                raise ClientStateError(f"the client state {path} is missing") from None
            if found != checksum:
                raise ClientStateError(f"{path} is not the client state that was written there")

    def states(self, round: int) -> ClientStates:
        """Return each client's newest state up to `round`, as it is.

        For a run of an earlier femfed, whose checkpoints do not know them.

        Raises:
            ClientStateError: a file is not what `keep` writes.
        """
        newest: dict[int, int] = {}
        for client, version in self._kept():
            if 0 < version <= round:
                newest[client] = max(newest.get(client, 0), version)
        return {
            client: (version, self._checked(client, version)[1])
            for client, version in newest.items()
        }

    def rewind(self, states: ClientStates) -> None:
        """Remove what is later than these states, or no state of theirs, and what is unfinished."""
        for client, version in self._kept():
            if version > states.get(client, (0, 0))[0]:
                self.path(client, version).unlink()
        for partial in self._folder.glob(".client_*"):  # of a worker that was killed
            partial.unlink()
        self.remove_spare()

    def prune(self, round: int) -> None:
        """Let go of what is not needed by anyone who starts again after `round` or later.

        The next round overwrites it; what this one has not is removed.
        """
        self.remove_spare()
        kept = self._kept()
        newest: dict[int, int] = {}
        for client, version in kept:
            if 0 < version <= round:
                newest[client] = max(newest.get(client, 0), version)
        for client, version in kept:
            if version < newest.get(client, 0):
                self._spare.mkdir(exist_ok=True)
                path = self.path(client, version)
                path.rename(self._spare / path.name)

    def remove_spare(self) -> None:
        """Remove what `prune` let go of and no round has overwritten."""
        shutil.rmtree(self._spare, ignore_errors=True)

    def path(self, client: int, round: int) -> Path:
        """Return where a version lies."""
        return self._folder / f"client_{client:06d}_round_{round:06d}.npy"

    def _takes_spare(self, partial: Path) -> bool:
        """Move a file that nobody needs to `partial`; return whether there was one."""
        partial.unlink(missing_ok=True)  # of a killed process that had the same number
        with contextlib.suppress(FileNotFoundError), os.scandir(self._spare) as spare:
            return any(takes(Path(entry), partial) for entry in spare)
        return False

    def _kept(self) -> list[tuple[int, int]]:
        paths = self._folder.glob("client_*")
        names = (re.fullmatch(r"client_(\d{6,})_round_(\d{6,})\.npy", path.name) for path in paths)
        return [(int(name[1]), int(name[2])) for name in names if name]


class Uncached:
    """Keeps and recalls memories past the system's cache.

    One is written and another one read while a client trains. As a context, it ends once all is
    written.

    Args:
        memories: of the run; whatever they kept can be recalled here, and the other way round.
    """

    def __init__(self, memories: Memories) -> None:
        self._memories = memories
        self._writing = Background()
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._reading: dict[tuple[int, int], Future[Vector]] = {}  # one at most
        self._to_write, self._to_read, self._lent = buffer(BLOCK), buffer(BLOCK), buffer(BLOCK)

    def __enter__(self) -> "Uncached":
        return self

    def __exit__(self, *error: object) -> None:
        self._finish_reading()
        self._writing.finish()

    def keep(self, client: int, round: int, vectors: Sequence[Vector]) -> None:
        """Begin to write what `Memories.keep` writes, once the one before is written.

        Raises:
            DivergedError: it holds NaN or infinity.
            OSError: the one before could not be written.
        """
        parts = _parts(vectors)
        self._writing.finish()
        size = sum(len(part) for part in parts)
        if len(self._to_write) != size:
            self._to_write = buffer(size)
        self._to_write.seek(0)
        for part in parts:
            self._to_write.write(part)
        end = BLOCK + sum(vector.nbytes for vector in vectors)
        self._writing.begin(lambda: self._write(client, round, end))

    def read_ahead(self, client: int, round: int) -> None:
        """Begin to read what will most likely be recalled next, unless `round` is 0."""
        self._finish_reading()
        if round:
            self._reading[client, round] = self._reader.submit(self._read, client, round)

    def recall(self, client: int, round: int) -> Vector | None:
        """Return what `Memories.recall` returns; it stays until another was, and one is read ahead.

        Raises:
            ClientStateError: its file is not what `keep` writes.
        """
        if not round:
            return None
        if (client, round) not in self._reading:
            self.read_ahead(client, round)
        wait(self._reading.values())
        vector = self._reading.pop((client, round)).result()
        self._to_read, self._lent = self._lent, self._to_read
        return vector

    def _finish_reading(self) -> None:
        wait(self._reading.values())  # one that is not needed has the buffer until then
        self._reading.clear()

    def _write(self, client: int, round: int, end: int) -> None:
        with self._memories.unfinished(client, round) as descriptor:
            past_cache(descriptor, lambda: write(descriptor, [memoryview(self._to_write)]))
            os.ftruncate(descriptor, end)

    def _read(self, client: int, round: int) -> Vector:
        path = self._memories.path(client, round)
        with opened(path, "rb") as descriptor:
            size = os.fstat(descriptor).st_size
            whole = max(BLOCK, size + -size % BLOCK)
            if len(self._to_read) != whole:
                self._to_read = buffer(whole)
            past_cache(descriptor, lambda: read(descriptor, memoryview(self._to_read), size))
        head = self._to_read[:BLOCK]
        begins = _begin_of_numbers(path, head, size)
        vector = np.frombuffer(self._to_read, np.float32, (size - begins) // 4, begins)
        _check(path, head, vector)
        return vector


def _parts(vectors: Sequence[Vector]) -> list[memoryview]:
    """Return what a file of these vectors holds, filled up to a whole block.

    Raises:
        DivergedError: they hold NaN or infinity.
    """
    if not all(is_finite(vector) for vector in vectors):
        raise DivergedError("what the client remembers holds NaN or infinity")
    size, checksum = sum(vector.size for vector in vectors), 0
    numbers = [np.asarray(vector, np.float32).view(np.uint8).data for vector in vectors]
    for part in numbers:
        checksum = zlib.crc32(part, checksum)
    return [memoryview(_header(size, checksum)), *numbers, memoryview(bytes(-4 * size % BLOCK))]


def _begin_of_numbers(path: Path, head: bytes, size: int) -> int:
    """Return where in a file its numbers begin.

    Args:
        path: of the file.
        head: its first block.
        size: of all of it, in bytes.

    Raises:
        ClientStateError: it is not a vector of float32.
    """
    file = io.BytesIO(head[:size])
    try:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # the header is Python text, and what is wrong with it any error
        said = str(error).partition("\n")[0]
        raise ClientStateError(f"the client state {path} is damaged: {said}") from error
    left = size - file.tell()
    if version != (1, 0) or dtype != np.float32 or shape != (left // 4,) or left % 4:
        raise ClientStateError(
            f"{path} holds {left} bytes of {dtype} {shape}; expected a vector of float32"
        )
    return file.tell()


def _check(path: Path, head: bytes, vector: Vector) -> int:
    """Return the checksum of a file's numbers, which its first block states if it states one.

    Raises:
        ClientStateError: they differ.
    """
    stated, found = _checksum(head), zlib.crc32(vector.view(np.uint8).data)
    if stated not in (None, found):
        raise ClientStateError(f"the client state {path} is damaged: its checksum differs")
    return found


def _checksum(head: bytes) -> int | None:
    """Return the checksum that a file's first block states; None in one of an earlier femfed."""
    found = re.search(rb"# CRC-32 ([0-9a-f]{8})", head)
    return int(found[1], 16) if found else None


def _header(size: int, checksum: int) -> bytes:
    """Return how an npy file of float32 begins, filled up with spaces to a whole block.

    The checksum stands in a comment, which NumPy's reader skips.
    """
    magic = np.lib.format.magic(1, 0)
    about = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (size,)}
    text, length = f"{about}  # CRC-32 {checksum:08x}", BLOCK - len(magic) - 2
    return magic + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


def _start_writing(descriptor: int) -> None:
    """Have the disk begin with a file, so that `sync` waits for less of it, where Linux can."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        whole = ctypes.c_int64(0)
        begin(descriptor, whole, whole, SYNC_FILE_RANGE_WRITE)

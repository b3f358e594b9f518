"""Weights and updates to and from Flower records, by reference or by value.

By reference (one machine): weights lie in one file and every worker's running sum in another, in
the run's own folder in shared memory; messages hold only names and numbers. By value: they travel
inside the Flower messages. Both give the same bits, because sums are exact (`local.GRID`).
"""

import contextlib
import dataclasses
import fcntl
import functools
import importlib
import json
import mmap
import os
import select
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import DTypeLike, NDArray

from femfed import UserError
from femfed.engine.direct import BLOCK, Background, buffer, opened, past_cache, read, write
from femfed.engine.folders import OwnedFolder, remove_abandoned
from femfed.engine.footprint import available_memory
from femfed.local import flatten
from femfed.strategies.base import pieces

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "femfed-"
BELL = "bell"  # named pipe that workers write a byte to when they are done
AT = "at-"  # file in which a worker notes the client it trains; its process id follows
NOBODY = -1
TURNS = "turns-"  # file that counts the clients that workers have taken; a number follows
ENDED = 2**62  # turns: more than any cohort has

Vector = NDArray[np.float32]
FloatSum = NDArray[np.float64]


def describe(thing: Any) -> dict[str, Any]:
    """Return a femfed dataclass as plain JSON values; `construct` makes it again."""
    fields = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing)}
    return {"type": f"{type(thing).__module__}.{type(thing).__qualname__}", "fields": fields}


def construct(description: dict[str, Any]) -> Any:
    """Make the dataclass that `describe` described; only femfed's own are made.

    Raises:
        ValueError: the description names anything but a dataclass of femfed.
    """
    module, _, name = description["type"].rpartition(".")
    if not module.startswith("femfed."):
        raise ValueError(f"will not construct {description['type']}; expected a type of femfed")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot construct {description['type']}: {error}") from error
    ours = getattr(made, "__module__", None) == module  # and not something the module imported
    if not (ours and isinstance(made, type) and dataclasses.is_dataclass(made)):
        raise ValueError(f"will not construct {description['type']}; expected a femfed dataclass")
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in description["fields"].items()}
    return made(**frozen)


def to_json(**parts: Any) -> str:
    """Return the one line a worker is told everything with; workers cache what it builds by it."""
    return json.dumps(parts, sort_keys=True)


def shared_folder(fallback: Path, size: int) -> OwnedFolder:
    """Return the run's own folder for what travels by reference.

    Args:
        fallback: folder to make it in where shared memory is absent, too small, or would take more
            than half of the memory there is: workers need some, too.
        size: bytes that will be needed at most.
    """
    remove_abandoned(fallback, PREFIX)  # of a run that had less memory than now
    usable = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    roomy = usable and shutil.disk_usage(SHARED_MEMORY).free > size
    fits = roomy and available_memory() > 2 * size
    return OwnedFolder(SHARED_MEMORY if fits else fallback, PREFIX)


def row_bytes(parameters: int) -> int:
    """Return the bytes from one single update to the next: whole blocks, as the disk wants them."""
    return 4 * parameters + -4 * parameters % BLOCK


def left_by_the_dead(folder: Path) -> list[int]:
    """Return the clients that workers which are gone were training, and forget them."""
    clients = []
    for path in folder.glob(f"{AT}*"):
        if not lives(path.name.removeprefix(AT)):
            clients.append(int(np.fromfile(path, np.int64)[0]))
            path.unlink()
    return [client for client in clients if client != NOBODY]


def lives(pid: int | str) -> bool:
    """Return whether a process runs; one that has ended and that nobody waited for has no name."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


def take_turn(path: Path) -> int:
    """Return how many turns were taken before, and take one: no two processes get the same."""
    with path.open("r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed or the process dies
        turn = int.from_bytes(file.read(8), "little")
        file.seek(0)
        file.write((turn + 1).to_bytes(8, "little"))
    return turn


def mapped(path: Path, size: int, dtype: DTypeLike, *, create: bool = False) -> NDArray[Any]:
    """Map `size` numbers of a shared file; a file made here has its pages reserved.

    Reserving them turns a full shared memory into an error here, where it can be reported, instead
    of a bus error in the middle of a round.

    Raises:
        UserError: there is not enough room.
    """
    length = max(1, size * np.dtype(dtype).itemsize)
    with path.open("w+b" if create else "r+b") as file:
        if create:
            try:
                os.posix_fallocate(file.fileno(), 0, length)
            except OSError as error:
                raise UserError(
                    f"no room for {length / 2**20:.0f} MiB in {path.parent} ({error.strerror}); "
                    "free some, or ask for fewer workers with engine.workers=N"
                ) from error
        return np.frombuffer(mmap.mmap(file.fileno(), length), dtype, count=size)


class Outbox:
    """The driver's end: hands out weights and takes in sums and single updates.

    Args:
        folder: where shared files lie, None to send everything by value.
        parameters: length of the weight vector.
        up: vectors of that length that a client sends: its update, and perhaps another.
        down: vectors of that length that a client is sent: the weights, and what else is broadcast.
    """

    def __init__(self, folder: Path | None, parameters: int, up: int = 1, down: int = 1) -> None:
        self._folder, self._parameters, self._up = folder, parameters, up
        self._files: dict[str, NDArray[Any]] = {}
        self._bell: int | None = None
        self._past_cache = False
        if folder is not None:
            # A name of its own: whoever is left of an engine that was given up takes no turn here.
            self._turns = folder / f"{TURNS}{len(list(folder.glob(f'{TURNS}*')))}"
            self.start_turns()
            with contextlib.suppress(FileExistsError):  # of an engine that was started again
                os.mkfifo(folder / BELL)
            self._bell = os.open(folder / BELL, os.O_RDWR | os.O_NONBLOCK)
            self._files["weights"] = mapped(
                folder / "weights", down * parameters, np.float32, create=True
            )

    def publish(self, weights: Sequence[NDArray[np.float32]]) -> RecordDict:
        """Return what every message carries so that a worker can load `weights`.

        Workers train from these very pages: to be called only while none of them is at a message.
        """
        if self._folder is None:
            return RecordDict({"weights": ArrayRecord([flatten(weights)])})
        flatten(weights, out=self._files["weights"])
        about = ConfigRecord({"path": str(self._folder), "past_cache": self._past_cache})
        return RecordDict({"folder": about})

    def start_turns(self) -> str:
        """Let the workers take turns from the first client on; return the name they need for it."""
        self._turns.write_bytes(bytes(8))
        return self._turns.name

    def turns_taken(self) -> int:
        """Return how many turns were taken; a worker that finds no client left takes one more."""
        return int.from_bytes(self._turns.read_bytes(), "little")

    def end_turns(self) -> None:
        """Let no worker take another client."""
        if self._folder is not None:
            with self._turns.open("r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(ENDED.to_bytes(8, "little"))

    def reserve_updates(self, clients: int) -> None:
        """Make room for `clients` single updates, for strategies that do not average.

        In a file on a disk they go past the system's cache if they take more than half of the
        memory there is.
        """
        if self._folder is not None and "updates" not in self._files:
            size = clients * row_bytes(self._parameters)
            on_a_disk = self._folder.parent != SHARED_MEMORY
            self._past_cache = on_a_disk and size > available_memory() // 2
            self._files["updates"] = mapped(
                self._folder / "updates", size // 4, np.float32, create=True
            )

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bell is not None:
            os.close(self._bell)
        if self._folder is not None and "updates" in self._files:
            # Idle workers hold the removed file until their next run, which needs the room. Whoever
            # reads on finds zeros.
            with (
                contextlib.suppress(OSError),  # a file system that cannot
                (self._folder / "updates").open("r+b") as file,
                mmap.mmap(file.fileno(), 0) as pages,
            ):
                pages.madvise(mmap.MADV_REMOVE)

    def wait(self, seconds: float) -> int:
        """Wait until a worker rings, or so long; return how many rang.

        Workers ring when they have done a message. To ask Flower's grid again and again instead
        would take some percent of a core from them.
        """
        if self._bell is None:
            time.sleep(seconds)
            return 0
        if not select.select([self._bell], [], [], seconds)[0]:
            return 0
        return len(os.read(self._bell, 4096))

    def means(self, replies: list[RecordDict], weight_sum: float) -> list[Vector]:
        """Return the exact sums of all weighted vectors behind `replies`, divided once."""
        sums = [part.reshape(self._up, -1) for part in self._sums(replies)]
        # Each of its own: the allocator keeps no freed memory of more than 32 MiB.
        means = [np.empty(self._parameters, np.float32) for _ in range(self._up)]
        for place, mean in enumerate(means):
            for piece in pieces(mean.size):
                total = sums[0][place, piece].copy()
                for part in sums[1:]:
                    total += part[place, piece]
                mean[piece] = total / weight_sum
        return means

    def _sums(self, replies: list[RecordDict]) -> list[FloatSum]:
        if self._folder is None:
            return [_only_array(r, "total") for r in replies if "total" in r.array_records]
        summed = [r.config_records["sum"] for r in replies if "sum" in r.config_records]
        names = sorted({str(record["file"]) for record in summed})
        for name in names:
            if name not in self._files:
                size = self._up * self._parameters
                self._files[name] = mapped(self._folder / name, size, np.float64)
        return [self._files[name] for name in names]

    def updates(
        self, replies: list[RecordDict], slots: list[list[int]], clients: int
    ) -> NDArray[np.float32]:
        """Return single updates, `[clients, parameters]`, of those in `slots` of each reply."""
        if self._folder is not None:
            whole = self._files["updates"].reshape(-1, row_bytes(self._parameters) // 4)
            return whole[:clients, : self._parameters]
        updates = np.empty((clients, self._parameters), np.float32)
        for reply, rows in zip(replies, slots, strict=True):
            updates[rows] = _only_array(reply, "updates")
        return updates

    def reader(self, row: int) -> Callable[[int, Vector], None] | None:
        """Return what reads a single update (`Update.read`), None where it is in memory."""
        return functools.partial(self._read, row) if self._past_cache else None

    def _read(self, row: int, begin: int, into: Vector) -> None:
        assert self._folder is not None
        size = min(into.nbytes, row_bytes(self._parameters) - 4 * begin)
        place = row * row_bytes(self._parameters) + 4 * begin
        to = into.view(np.uint8).data[:size]
        with opened(self._folder / "updates", "rb") as descriptor:
            past_cache(descriptor, lambda: read(descriptor, to, size, place))


class Inbox:
    """A worker's end, kept from message to message.

    As a context, it ends once all single updates are written.

    Args:
        parameters: length of the weight vector.
        up: vectors of that length that a client sends, as for `Outbox`.
        down: vectors of that length that a client is sent.
    """

    def __init__(self, parameters: int, up: int = 1, down: int = 1) -> None:
        self._parameters, self._up, self._down = parameters, up, down
        self._folder = ""
        self._files: dict[str, NDArray[Any]] = {}
        self._writing = Background()
        self._to_write = buffer(BLOCK)

    def __enter__(self) -> "Inbox":
        return self

    def __exit__(self, *error: object) -> None:
        self._writing.finish()

    def weights(self, content: RecordDict) -> Vector:
        """Return the weights a message carries or points to."""
        if "weights" in content.array_records:
            return _only_array(content, "weights")
        return self._map(content, "weights", self._down * self._parameters, np.float32)

    def sum(self, content: RecordDict) -> tuple[FloatSum, bool]:
        """Return the array to fold into, and whether it lives on between messages."""
        size = self._up * self._parameters
        if "weights" in content.array_records:
            return np.empty(size), False
        return self._map(content, f"sum-{os.getpid()}", size, np.float64), True

    def places(self, content: RecordDict, turns: str, count: int) -> Iterator[int]:
        """Yield which of a message's `count` clients are this worker's to train.

        With `turns`, all workers have the same clients before them, and each takes the next one
        that nobody has taken; without, all clients of the message are its own.
        """
        if not turns:
            yield from range(count)
            return
        while (place := take_turn(self._path(content, turns))) < count:
            yield place

    def note(self, content: RecordDict, client: int) -> None:
        """Leave word of which client is being trained, in case this process does not survive it."""
        if "folder" in content.config_records:
            self._map(content, f"{AT}{os.getpid()}", 1, np.int64)[0] = client

    def ring(self, content: RecordDict) -> None:
        """Tell the driver that a message is done."""
        if "folder" in content.config_records:
            with contextlib.suppress(OSError):  # nobody listens any more
                bell = os.open(self._path(content, BELL), os.O_WRONLY | os.O_NONBLOCK)
                os.write(bell, b"!")
                os.close(bell)

    def put_sum(self, reply: RecordDict, total: FloatSum, *, lives_on: bool) -> None:
        """Put `total`, or its file's name, into the reply."""
        if lives_on:
            reply["sum"] = ConfigRecord({"file": f"sum-{os.getpid()}"})
        else:
            reply["total"] = ArrayRecord([total])

    @contextlib.contextmanager
    def update(self, content: RecordDict, slot: int) -> Iterator[Vector]:
        """Yield the vector to write a client's update to: one of its own, or its shared row.

        Past the cache that is a buffer, and it is written there while the next client trains.

        Raises:
            OSError: the one before could not be written.
        """
        if "weights" in content.array_records:
            yield np.empty(self._parameters, np.float32)
            return
        path, size = self._path(content, "updates"), row_bytes(self._parameters)
        if content.config_records["folder"]["past_cache"]:
            self._writing.finish()
            if len(self._to_write) != size:
                self._to_write = buffer(size)
            yield np.frombuffer(self._to_write, np.float32, self._parameters)
            self._writing.begin(lambda: self._write(path, slot * size))
            return
        shared = self._map(content, "updates", path.stat().st_size // 4, np.float32)
        yield shared[slot * size // 4 :][: self._parameters]

    def put_updates(self, content: RecordDict, reply: RecordDict, updates: list[Vector]) -> None:
        """Put single updates into the reply unless they are in their shared rows already."""
        if "weights" in content.array_records:
            reply["updates"] = ArrayRecord([np.reshape(updates, (-1, self._parameters))])

    def _write(self, path: Path, begin: int) -> None:
        with opened(path, "r+b") as descriptor:
            past_cache(descriptor, lambda: write(descriptor, [memoryview(self._to_write)], begin))

    def _path(self, content: RecordDict, name: str) -> Path:
        return Path(str(content.config_records["folder"]["path"])) / name

    def _map(self, content: RecordDict, name: str, size: int, dtype: DTypeLike) -> NDArray[Any]:
        path = self._path(content, name)
        if str(path.parent) != self._folder:  # another run: let go of the last one's files
            self._folder = str(path.parent)
            self._files.clear()
        if name not in self._files:
            create = name.startswith(("sum-", AT))
            self._files[name] = mapped(path, size, dtype, create=create)
        return self._files[name]


def _only_array(record: RecordDict, name: str) -> NDArray[Any]:
    (array,) = record.array_records[name].to_numpy_ndarrays()
    return array

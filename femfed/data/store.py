"""The memory-mapped store that every dataset is converted to, once.

A store is a folder of three files: `images.u8` (all images, row-major `[n, 28, 28]`), `labels.u8`
(`[n]`) and `index.json` (the writers, in order, and what is said of the dataset). A writer's rows
are contiguous, so a writer is two views and no copy. Workers map the files read-only and share
their pages.

A store made of files is named by its own content, so that files which were moved, copied or touched
lead to the same store. Its `sources.json` remembers the files that it was made of by their place,
sizes and times: while these stay, nothing is read again.

A view is a folder of two: `rows.i32`, which names rows of another store's images, and its own
`index.json`. It regroups images (a selection, a partition) at four bytes an image.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from femfed import UserError, printable
from femfed.seeds import generator

CLASSES = 62
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FORMAT = 3  # raise it when the files of a store change their meaning: older stores are then remade

MOST_NAME_CHARACTERS = 1000  # of a writer's name
# A folder that is being written: what was hashed for its name, then what mkdtemp appends.
SCRATCH = re.compile(r"\.(tff|[a-z_]+(-view)?-[0-9a-f]{16})-[a-z0-9_]{8}")

Bytes = NDArray[np.uint8]
Rows = NDArray[np.int32]
OnWriter = Callable[[int], None]


class DamagedStoreError(ValueError):
    """A store is not what was written; it is made again from its source."""


@dataclass(frozen=True)
class Handwriting:
    """What a dataset knows of one writer, on its way into the store.

    Attributes:
        name: the writer's name in the source, such as `f0027_29`.
        number: the shard the writer stands in (the homework's "number").
        subject_number: the writer's place in that shard.
        images: `[n, 28, 28]` uint8, white background 255.
        labels: `[n]` integers in [0, 62).
        train_examples: the first so many rows are the published training split; None where the
            source publishes no split.
        apart: whether the source keeps this writer apart from those who train. Writers of whom a
            published split has test images only are kept apart as well.
    """

    name: str
    number: int
    subject_number: int
    images: Bytes
    labels: NDArray[Any]
    train_examples: int | None = None
    apart: bool = False


@dataclass(frozen=True)
class Writer:
    """One person's handwriting = one client.

    Attributes:
        name: the writer's name in the source.
        number: the shard the writer stands in.
        subject_number: the writer's place in that shard.
        images: `[n, 28, 28]` uint8, white background 255, a view into the memory-mapped store.
        labels: `[n]` uint8 in [0, 62), a view as well.
        train: rows to train on, `[n_train]` int32.
        test: rows held out, `[n_test]` int32.
    """

    name: str
    number: int
    subject_number: int
    images: Bytes
    labels: Bytes
    train: Rows
    test: Rows


@dataclass(frozen=True)
class Columns:
    """What a store's index says of its writers: one entry each, in order.

    Attributes:
        names: the writers' names.
        numbers: shard of each writer.
        subject_numbers: place of each writer in its shard.
        examples: images of each writer.
        train_examples: length of each writer's published training split, -1 where there is none.
        apart: whether the source keeps the writer apart from those who train.
    """

    names: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    subject_numbers: list[int] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    train_examples: list[int] = field(default_factory=list)
    apart: list[bool] = field(default_factory=list)

    def append(self, writer: Handwriting) -> None:
        """Add one writer."""
        published = writer.train_examples
        self.names.append(writer.name)
        self.numbers.append(writer.number)
        self.subject_numbers.append(writer.subject_number)
        self.examples.append(len(writer.labels))
        self.train_examples.append(-1 if published is None else published)
        self.apart.append(writer.apart or published == 0)

    def copy(self, store: "WriterStore", index: int, examples: int, train_examples: int) -> None:
        """Add writer `index` of `store`, of whom only some images are kept."""
        self.names.append(store.names[index])
        self.numbers.append(int(store.numbers[index]))
        self.subject_numbers.append(int(store.subject_numbers[index]))
        self.examples.append(examples)
        self.train_examples.append(train_examples)
        self.apart.append(bool(store.apart[index]))


View = tuple[Columns, Rows]


@dataclass(frozen=True)
class WriterStore:
    """All writers of one dataset, memory-mapped.

    Attributes:
        folder: where the store lies.
        names: the writers' names, in order.
        numbers: shard of each writer, `[writers]`.
        subject_numbers: place of each writer in its shard, `[writers]`.
        offsets: first row of each writer and one past the last, `[writers + 1]`.
        train_examples: length of each writer's published training split, -1 where there is none.
        apart: whether the source keeps the writer apart from those who train, `[writers]` bool.
        rows: rows of `images` in the writers' order, `[offsets[-1]]`; None where that is all rows.
        images: `[n, 28, 28]` uint8.
        labels: `[n]` uint8.
        skipped_writers: writers of the source without a single image, left out.
        former_names: names that earlier versions of femfed gave to a store of the same content.
    """

    folder: Path
    names: tuple[str, ...]
    numbers: NDArray[np.int64]
    subject_numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]
    train_examples: NDArray[np.int64]
    apart: NDArray[np.bool_]
    rows: Rows | None
    images: Bytes
    labels: Bytes
    skipped_writers: int
    former_names: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path, former_names: tuple[str, ...] = ()) -> "WriterStore":
        """Map the store or view in `folder`; all of it but the images is checked.

        Raises:
            DamagedStoreError: it is not what was written.
        """
        try:
            return replace(cls._open(folder), former_names=former_names)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DamagedStoreError(f"dataset store {folder} is damaged: {error}") from error

    @classmethod
    def _open(cls, folder: Path) -> "WriterStore":
        index = json.loads((folder / "index.json").read_bytes())
        if index.pop("sha256") != _sha256(json.dumps(index).encode()):
            raise ValueError("index.json has changed")
        offsets = np.concatenate([[0], np.cumsum(index["examples"], dtype=np.int64)])
        n, files, rows = int(offsets[-1]), folder, None
        if "view_of" in index:
            rows = np.memmap(folder / "rows.i32", np.int32, "r", shape=(n,))
            if index["rows_sha256"] != _sha256(rows.data):
                raise ValueError("rows.i32 has changed")
            files = folder.parent / index["view_of"]
            n = (files / "labels.u8").stat().st_size
        labels = np.memmap(files / "labels.u8", np.uint8, "r", shape=(n,))
        if (files / "images.u8").stat().st_size != 784 * n:
            raise ValueError(f"images.u8 has not the size of {n} images")
        if rows is None and index["labels_sha256"] != _sha256(labels.data):
            raise ValueError("labels.u8 has changed")
        return cls(
            folder=folder,
            names=tuple(index["names"]),
            numbers=np.asarray(index["numbers"], np.int64),
            subject_numbers=np.asarray(index["subject_numbers"], np.int64),
            offsets=offsets,
            train_examples=np.asarray(index["train_examples"], np.int64),
            apart=np.asarray(index["apart"], np.bool_),
            rows=rows,
            images=np.memmap(files / "images.u8", np.uint8, "r", shape=(n, 28, 28)),
            labels=labels,
            skipped_writers=index["skipped_writers"],
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def known_as(self) -> frozenset[str]:
        """All names that stand for this content: a run that began with one goes on with another."""
        return frozenset((self.folder.name, *self.former_names))

    def whole(self) -> "WriterStore":
        """Return the store of which this is a view; itself if it is none."""
        folder = Path(str(self.images.filename)).parent  # type: ignore[attr-defined]
        return self if self.rows is None else WriterStore.open(folder)

    @property
    def examples(self) -> NDArray[np.int64]:
        """Images of each writer, `[writers]`."""
        return np.diff(self.offsets)

    def rows_of(self, index: int) -> Rows:
        """Return the rows of `images` that writer `index` owns, `[n]`."""
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return (
            np.arange(start, stop, dtype=np.int32) if self.rows is None else self.rows[start:stop]
        )

    def writer(self, index: int, test_fraction: float, seed: int) -> Writer:
        """Return writer `index`, split as published or, where nothing is, by `seed`.

        Args:
            index: the writer's place in the store.
            test_fraction: share of a writer's images held out where no split is published; at
                least one image is always left to train on.
            seed: seed of the run.
        """
        owned = self.rows_of(index)
        n, published = len(owned), int(self.train_examples[index])
        # Rows in sequence are a view of the mapped file; those that a view scattered are copied.
        in_sequence = n > 0 and np.array_equal(owned, np.arange(owned[0], owned[0] + n))
        place: Any = slice(int(owned[0]), int(owned[0]) + n) if in_sequence else owned
        if published >= 0:
            rows, cut = np.arange(n, dtype=np.int32), published
        else:
            rows = generator(seed, "split", client=index).permutation(n).astype(np.int32)
            cut = n - min(n - 1, round(n * test_fraction))
        return Writer(
            name=self.names[index],
            number=int(self.numbers[index]),
            subject_number=int(self.subject_numbers[index]),
            images=self.images[place],
            labels=self.labels[place],
            train=np.sort(rows[:cut]),
            test=np.sort(rows[cut:]),
        )


def stored(
    cache: Path,
    source: dict[str, Any],
    writers: Callable[[], Iterable[Handwriting]],
    on_writer: OnWriter | None = None,
) -> WriterStore:
    """Return the store of `source`, opened if it is there, else made from `writers()`.

    The store is written beside its final place and renamed when whole: a broken source or a killed
    conversion leaves nothing behind that could be taken for a store, and of two conversions at once
    the first to finish wins.

    Args:
        cache: folder that holds all stores.
        source: whatever identifies the content (parameters, versions); a store made from another
            source is never used.
        writers: yields the writers one at a time; called only if there is no store yet.
        on_writer: called with the number of writers written so far.

    Raises:
        UserError: the source holds something that is not FEMNIST, or no image at all.
    """
    return _made(cache, _name(source), lambda folder: _write(folder, writers(), on_writer))


def stored_by_content(
    cache: Path,
    place: dict[str, Any],
    writers: Callable[[], Iterable[Handwriting]],
    on_writer: OnWriter | None = None,
) -> WriterStore:
    """Return the store of what `writers()` yields, named by that.

    Args:
        cache: folder that holds all stores.
        place: identifies the source without reading it: paths, sizes, times, parameters.
        writers: yields the writers one at a time; called only if no store was made of `place`.
        on_writer: called with the number of writers written so far.

    Raises:
        UserError: the source holds something that is not FEMNIST, or no image at all.
    """
    remove_abandoned(cache)
    key = _name(place)
    for file in sorted(cache.glob(f"{place['dataset']}-*/sources.json")):
        about = _sources(file.parent)
        if key in about["sources"]:
            try:
                return WriterStore.open(file.parent, tuple(about["former_names"]))
            except DamagedStoreError:
                shutil.rmtree(file.parent, ignore_errors=True)
    with scratch_folder(cache, key) as partial, _one_line(cache):
        images_sha256 = _write(partial, writers(), on_writer)
        index_sha256 = json.loads((partial / "index.json").read_bytes())["sha256"]
        content = {"dataset": place["dataset"], "index": index_sha256, "images": images_sha256}
        folder = cache / _name(content)
        if not _is_sound(folder):
            shutil.rmtree(folder, ignore_errors=True)
        about = _sources(folder)
        about["sources"] = sorted({*about["sources"], key})
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            # Earlier versions named a store by its source's place; is it the same content?
            if json.loads((cache / key / "index.json").read_bytes())["sha256"] == index_sha256:
                about["former_names"] = sorted({*about["former_names"], key})
        remembered = partial / "sources.json"
        remembered.write_text(json.dumps(about))
        _rename(partial, folder)
        if remembered.exists():
            remembered.replace(folder / "sources.json")
    return WriterStore.open(folder, tuple(about["former_names"]))


def _sources(folder: Path) -> dict[str, list[str]]:
    """Return what a store remembers of its sources; nothing if the file is not what was written."""
    try:
        about = json.loads((folder / "sources.json").read_bytes())
        return {key: list(map(str, about[key])) for key in ("sources", "former_names")}
    except (OSError, ValueError, LookupError, TypeError):
        return {"sources": [], "former_names": []}


def _is_sound(folder: Path) -> bool:
    try:
        WriterStore.open(folder)
    except DamagedStoreError:
        return False
    return True


def viewed(parent: WriterStore, key: dict[str, Any], regroup: Callable[[], View]) -> WriterStore:
    """Return the view of `parent` that `key` describes, opened if it is there, else made.

    Args:
        parent: the store, or a view of it, whose images are regrouped.
        key: whatever identifies the view among all views of `parent`.
        regroup: returns the writers' columns and the rows of `parent.images` in their order.
    """

    def write(folder: Path) -> None:
        columns, rows = regroup()
        with (folder / "rows.i32").open("wb") as file:
            file.write(np.ascontiguousarray(rows, np.int32).data)
            file.flush()
            os.fsync(file.fileno())
        check = _sha256(np.ascontiguousarray(rows, np.int32).data)
        _write_index(folder, columns, parent.skipped_writers, view_of=store.name, rows_sha256=check)

    store = parent.whole().folder
    dataset = store.name.rpartition("-")[0] + "-view"
    name, *former = (
        _name({"view_of": of, **key}, dataset) for of in (parent.folder.name, *parent.former_names)
    )
    return replace(_made(parent.folder.parent, name, write), former_names=tuple(former))


def _name(source: dict[str, Any], dataset: str | None = None) -> str:
    """Return the name of the store of `source`."""
    key = json.dumps({"format": FORMAT, **source}, sort_keys=True)
    return f"{dataset or source['dataset']}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _made(cache: Path, name: str, write: Callable[[Path], object]) -> WriterStore:
    """Open the store called `name` below `cache`, made first by `write` if it is not there."""
    remove_abandoned(cache)
    folder = cache / name
    if (folder / "index.json").exists():
        try:
            return WriterStore.open(folder)
        except DamagedStoreError:
            shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "index.json").exists():
        with scratch_folder(cache, name) as partial, _one_line(cache):
            write(partial)
            _rename(partial, folder)
    return WriterStore.open(folder)


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / "index.json").exists():  # else another process was first
            raise


def check_room(cache: Path, needed_bytes: int) -> None:
    """Refuse to write a store that does not fit on the disk.

    Raises:
        UserError: less is free where `cache` is.
    """
    free_bytes = shutil.disk_usage(cache).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"the dataset takes {needed_bytes / 1e9:,.1f} GB or more in the cache {cache}, where "
            f"{free_bytes / 1e9:,.1f} GB are free; make room there or give another folder with "
            "cache=DIR"
        )


@contextlib.contextmanager
def _one_line(cache: Path) -> Iterator[None]:
    """Say what the system refuses while a store is written as a user's mistake."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the dataset cache {cache}: {error.strerror or error}; make room there "
            "or give another folder with cache=DIR"
        ) from error
    except MemoryError as error:
        raise UserError(
            "the dataset does not fit in this machine's memory; expected files of which each fits; "
            "divide them, or use a machine with more memory"
        ) from error


@contextlib.contextmanager
def scratch_folder(cache: Path, name: str) -> Iterator[Path]:
    """Yield a new folder in `cache`, locked by this process, and remove it at the end.

    The lock is how `remove_abandoned` of another process knows that the folder is in use.

    Raises:
        UserError: nothing can be written to `cache`.
    """
    while True:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"cannot write the dataset cache {cache}: {error.strerror}; "
                "give another folder with cache=DIR"
            ) from error
        with contextlib.suppress(OSError):  # of a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():
            break
        os.close(descriptor)  # another process saw the folder before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_abandoned(cache: Path) -> None:
    """Remove the folders in `cache` that killed processes were writing."""
    for folder in cache.glob(".*"):
        if not SCRATCH.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):  # locked, gone or another user's
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _write(folder: Path, writers: Iterable[Handwriting], on_writer: OnWriter | None) -> str:
    """Write a store and return the hash of its images."""
    columns, all_images = Columns(), hashlib.sha256()
    seen: set[str] = set()
    skipped = 0
    with (folder / "images.u8").open("wb") as images, (folder / "labels.u8").open("wb") as labels:
        for writer in writers:
            _check(writer)
            if writer.name in seen:
                raise UserError(
                    f"writer {printable(writer.name)} occurs twice in the dataset; expected once"
                )
            seen.add(writer.name)
            if not len(writer.labels):
                skipped += 1
                continue
            pixels = np.ascontiguousarray(writer.images).data
            images.write(pixels)
            all_images.update(pixels)
            labels.write(writer.labels.astype(np.uint8).tobytes())
            columns.append(writer)
            if on_writer:
                on_writer(len(columns.names))
        for file in (images, labels):
            file.flush()
            os.fsync(file.fileno())
    if not columns.names:
        raise UserError(f"the dataset has no images ({skipped} writers, all of them empty)")
    check = _sha256((folder / "labels.u8").read_bytes())
    _write_index(folder, columns, skipped, labels_sha256=check)
    return all_images.hexdigest()


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_index(folder: Path, columns: Columns, skipped_writers: int, **more: str) -> None:
    index = {**vars(columns), "skipped_writers": skipped_writers, **more}
    index["sha256"] = _sha256(json.dumps(index).encode())
    (folder / "index.json").write_text(json.dumps(index))


def _check(writer: Handwriting) -> None:
    images, labels, name = writer.images, writer.labels, printable(writer.name)
    if len(writer.name) > MOST_NAME_CHARACTERS:
        raise UserError(
            f"writer {name}: a name of {len(writer.name):,} characters; expected at most "
            f"{MOST_NAME_CHARACTERS:,}; shorten the name"
        )
    if not writer.name.isascii() and any("\ud800" <= char <= "\udfff" for char in writer.name):
        raise UserError(
            f"writer {name}: the name holds half a character; expected Unicode text; rename the "
            "writer"
        )
    if images.dtype != np.uint8 or images.shape != (len(labels), 28, 28):
        raise UserError(
            f"writer {printable(writer.name)}: images are {images.dtype} {images.shape} for "
            f"{len(labels)} labels; expected uint8 ({len(labels)}, 28, 28)"
        )
    outside = np.flatnonzero((labels < 0) | (labels >= CLASSES))
    if outside.size:
        at = int(outside[0])
        raise UserError(
            f"writer {printable(writer.name)}: label {labels[at]} at image {at}; "
            f"expected 0..{CLASSES - 1} (0-9, A-Z, a-z)"
        )

"""The memory-mapped store that every dataset is converted to, once.

A store is a folder of three files: `images.u8` (all images, row-major `[n, 28, 28]`), `labels.u8`
(`[n]`) and `index.json` (the writers, in order, and what is said of the dataset). A writer's rows
are contiguous, so a writer is two views and no copy. Workers map the files read-only and share
their pages.

A view is a folder of two: `rows.i32`, which names rows of another store's images, and its own
`index.json`. It regroups images (a selection, a partition) at four bytes an image.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from femfed import UserError, printable
from femfed.seeds import generator

CLASSES = 62
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FORMAT = 3  # raise it when the files of a store change their meaning: older stores are then remade

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
        apart: whether the source keeps this writer apart from those who train.
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
        self.apart.append(writer.apart)

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

    @classmethod
    def open(cls, folder: Path) -> "WriterStore":
        """Map the store or view in `folder`; all of it but the images is checked.

        Raises:
            DamagedStoreError: it is not what was written.
        """
        try:
            return cls._open(folder)
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
        source: whatever identifies the content (paths, sizes, times, parameters); a store made
            from another source is never used.
        writers: yields the writers one at a time; called only if there is no store yet.
        on_writer: called with the number of writers written so far.

    Raises:
        UserError: the source holds something that is not FEMNIST, or no image at all.
    """
    return _made(
        cache, source["dataset"], source, lambda folder: _write(folder, writers(), on_writer)
    )


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

    store = Path(str(parent.images.filename)).parent  # type: ignore[attr-defined]
    source = {"view_of": parent.folder.name, **key}
    return _made(parent.folder.parent, store.name.rpartition("-")[0] + "-view", source, write)


def _made(
    cache: Path, name: str, source: dict[str, Any], write: Callable[[Path], None]
) -> WriterStore:
    """Open the store of `source` below `cache`, made first by `write` if it is not there."""
    key = json.dumps({"format": FORMAT, **source}, sort_keys=True)
    folder = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if (folder / "index.json").exists():
        try:
            return WriterStore.open(folder)
        except DamagedStoreError:
            shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "index.json").exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
        except OSError as error:
            raise UserError(
                f"cannot write the dataset cache {cache}: {error.strerror}; "
                "give another folder with cache=DIR"
            ) from error
        try:
            write(partial)
            try:
                partial.rename(folder)
            except OSError:
                if not (folder / "index.json").exists():  # else somebody else was first
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return WriterStore.open(folder)


def _write(folder: Path, writers: Iterable[Handwriting], on_writer: OnWriter | None) -> None:
    columns = Columns()
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
            images.write(np.ascontiguousarray(writer.images).data)
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


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_index(folder: Path, columns: Columns, skipped_writers: int, **more: str) -> None:
    index = {**vars(columns), "skipped_writers": skipped_writers, **more}
    index["sha256"] = _sha256(json.dumps(index).encode())
    (folder / "index.json").write_text(json.dumps(index))


def _check(writer: Handwriting) -> None:
    images, labels = writer.images, writer.labels
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

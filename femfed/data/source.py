"""What all datasets have in common: their published counts and what is kept of them."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.data.store import CHARACTERS, CLASSES, Columns, OnWriter, View, WriterStore, viewed
from femfed.seeds import generator

PARTITIONS = ("writer", "iid", "dirichlet", "shards")
WORDS = {"digits": "0-9", "capitals": "A-Z", "small": "a-z"}


@dataclass(frozen=True)
class Published:
    """The counts a variant of FEMNIST is published with.

    Attributes:
        writers: how many.
        images: how many, of all writers.
    """

    writers: int
    images: int


@dataclass(frozen=True)
class Dataset(ABC):
    """What `conf/dataset/NAME.yaml` builds: a source of handwriting, and what is kept of it.

    Attributes:
        partition: `writer` is natural: one writer, one client. Over the same images, `iid` deals
            them out at random, `dirichlet` by a label distribution a client, `shards` by label as
            in the FedAvg paper; see `femfed.data.partition`.
        alpha: of `dirichlet`, above 0: the smaller, the fewer labels a client has.
        shards: of `shards`: pieces of one label (two at most) a client gets.
        classes: labels to keep: `digits`, `capitals`, `small`, a character, a range such as `a-j`,
            a label 0..61, or a list of these; null keeps all.
        fraction: of the images to keep, in (0, 1], by whole writers.
        min_images: writers with fewer images are left out.
        seed: of everything that is drawn of a dataset itself; apart from the run's seed, so that
            a sweep over seeds has the same writers.
    """

    partition: str
    alpha: float
    shards: int
    classes: Any
    fraction: float
    min_images: int
    seed: int

    name: ClassVar[str]
    """The dataset as its yaml is named; every result states it."""
    variant: ClassVar[str]
    """Which FEMNIST this is, in words; every result states it."""
    published: ClassVar[Published | None] = None
    """The published counts of this variant, where there are any."""

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise UserError(
                f"dataset.partition={self.partition}; expected {', '.join(PARTITIONS[:-1])} or "
                f"{PARTITIONS[-1]}"
            )
        for key, valid, expected in (
            ("alpha", 0 < self.alpha < float("inf"), "above 0"),
            ("shards", self.shards >= 1, "at least 1"),
            ("fraction", 0 < self.fraction <= 1, "above 0 and at most 1"),
            ("min_images", self.min_images >= 0, "at least 0"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not valid:
                raise UserError(f"dataset.{key}={getattr(self, key)}; expected {expected}")
        labels_of(self.classes)

    @abstractmethod
    def convert(self, cache: Path, writers: int, on_writer: OnWriter | None = None) -> WriterStore:
        """Return the store of everything the source holds, made now if it is not there.

        Args:
            cache: folder of all stores.
            writers: how many the run wants; a source that can make as many as it likes makes these.
            on_writer: called with the number of writers converted so far.

        Raises:
            UserError: the source is not there, or not what it should be.
        """

    def select(self, everything: WriterStore) -> WriterStore:
        """Return the writers and images that `classes`, `fraction` and `min_images` keep.

        Raises:
            UserError: nothing is kept.
        """
        labels = labels_of(self.classes)
        if len(labels) == CLASSES and self.fraction == 1 and not self.min_images:
            return everything
        key = {
            "classes": sorted(labels),
            "fraction": self.fraction,
            "min_images": self.min_images,
            "seed": self.seed,
        }
        return viewed(everything, key, lambda: self._select(everything, labels))

    def remarks(self, everything: WriterStore) -> list[str]:
        """Say in a line each what was left out and how the counts differ from the published ones.

        Writers whom the source keeps apart do not count.
        """
        lines = []
        if everything.skipped_writers:
            lines.append(f"{everything.skipped_writers} writers without images are left out")
        if self.published is None:
            return lines
        trainable = ~everything.apart
        images = int(everything.examples[trainable].sum())
        return lines + [
            f"{count:,} {what}, where {self.variant} is published with {published:,}"
            for what, count, published in (
                ("writers", int(trainable.sum()), self.published.writers),
                ("images", images, self.published.images),
            )
            if count != published
        ]

    def _select(self, everything: WriterStore, labels: frozenset[int]) -> View:
        wanted = np.isin(np.arange(CLASSES), list(labels))
        kept: list[tuple[int, NDArray[np.int32], int]] = []
        for index in range(len(everything)):
            rows, train = everything.rows_of(index), int(everything.train_examples[index])
            keep = wanted[everything.labels[rows]]
            if keep.any() and keep.sum() >= self.min_images:
                kept.append((index, rows[keep], int(keep[:train].sum()) if train >= 0 else -1))
        if not kept:
            raise UserError(
                f"no writer has {max(1, self.min_images)} images of dataset.classes="
                f"{self.classes}; expected some writers to be left; lower dataset.min_images or "
                "keep more classes"
            )
        if self.fraction < 1:
            # Whole writers in a drawn order, until so many images are there: LEAF's `--sf`.
            order = generator(self.seed, "fraction").permutation(len(kept))
            images = np.cumsum([len(kept[place][1]) for place in order])
            enough = int(np.searchsorted(images, self.fraction * images[-1])) + 1
            kept = [kept[place] for place in np.sort(order[:enough])]
        columns = Columns()
        for index, rows, train in kept:
            columns.copy(everything, index, len(rows), train)
        return columns, np.concatenate([rows for _, rows, _ in kept])


def labels_of(classes: Any) -> frozenset[int]:
    """Return the labels that `dataset.classes` keeps.

    Raises:
        UserError: `classes` names something that is not a label, character, range or word.
    """
    if classes is None:
        return frozenset(range(CLASSES))
    entries: Sequence[Any] = (
        classes if isinstance(classes, Sequence) and not isinstance(classes, str) else [classes]
    )
    labels: set[int] = set()
    for entry in entries:
        text = WORDS.get(str(entry), str(entry))
        ends = re.fullmatch(r"([0-9A-Za-z])(?:-([0-9A-Za-z]))?", text)
        if ends:
            first, last = (CHARACTERS.index(end) for end in (ends[1], ends[2] or ends[1]))
            labels.update(range(first, last + 1))
        elif text.isdecimal() and int(text) < CLASSES:
            labels.add(int(text))
        if not (ends and first <= last) and not (text.isdecimal() and int(text) < CLASSES):
            raise UserError(
                f"dataset.classes={classes}: {entry!r} is no class; expected digits, capitals, "
                "small, a character, a range such as a-j, a label 0..61, or a list of these"
            )
    if not labels:
        raise UserError(f"dataset.classes={classes} keeps nothing; expected at least one class")
    return frozenset(labels)


def located(path: str | None, name: str, expected: str) -> Path:
    """Return where `dataset.path` is, resolved.

    Args:
        path: as the user gave it.
        name: of the dataset.
        expected: what should be there, in words.

    Raises:
        UserError: there is no path, or nothing at it.
    """
    if path is None or not str(path).strip():
        raise UserError(
            f"dataset.path is {path!r}; dataset={name} needs dataset.path=PATH, {expected}"
        )
    # The shell leaves the tilde of `dataset.path=~/leaf` alone; where there is no such home,
    # Path.expanduser would raise and this leaves it too.
    root = Path(os.path.expanduser(str(path)))
    try:
        there = root.exists()
    except OSError as error:
        raise unreadable(root, error) from error
    if not there:
        raise UserError(
            f"dataset.path={path} does not exist (looked for {root.absolute()}); "
            f"expected {expected}; correct dataset.path=PATH"
        )
    return root.resolve()


def fingerprint(root: Path, files: Iterable[Path]) -> list[list[Any]]:
    """Return name, size and time of every file: a store is made again when one of them changes.

    Raises:
        UserError: a file cannot be looked at.
    """
    marks = []
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise unreadable(file, error) from error
        marks.append([os.path.relpath(file, root), status.st_size, status.st_mtime_ns])
    return marks


def unreadable(file: Path, error: OSError) -> UserError:
    """Return the error that says that `file` cannot be read."""
    return UserError(
        f"cannot read {file}: {error.strerror or error}; expected a readable file or folder; "
        "correct its permissions or dataset.path=PATH"
    )

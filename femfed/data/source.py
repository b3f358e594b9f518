"""What all datasets have in common: their published counts and what is kept of them."""

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from femfed import UserError, printable
from femfed.data.store import (
    CHARACTERS,
    CLASSES,
    Bytes,
    Columns,
    Handwriting,
    OnWriter,
    View,
    WriterStore,
    check_room,
    stored_by_content,
    viewed,
)
from femfed.seeds import generator

PARTITIONS = ("writer", "iid", "dirichlet", "shards")
WORDS = {"digits": "0-9", "capitals": "A-Z", "small": "a-z"}
SUBSETS = (26, 36, 47)  # numbers of classes of other sets: letters, one case, EMNIST's merged ones
FREE_IMAGES = 100_000  # that files of any size may hold
LEAST_IMAGE_BYTES = 16  # of an image in a file, however well it is packed, beyond those
MOST_FILE_BYTES = 8  # of a file for a byte of its store: LEAF's JSON has 6
DARK = 64  # grey below which a pixel of the border is dark; the paper of black scans has 0
DARK_SHARE = 0.9  # of an image's border where the paper is dark
MOST_FOLDERS = 1000  # that are looked into for the dataset's files


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
    family: ClassVar[str | None] = None
    """What data with other counts are called, where `variant` would claim too much."""
    labels_hint: ClassVar[str] = ""
    """How to name labels that stand for other characters."""
    digits_only: ClassVar[bool] = False
    """Whether the variant has no letters."""

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

    def writers_made(self, writers: int) -> int | None:
        """Return how many writers a source makes if it is asked for so many; None if it has them.

        Raises:
            UserError: these are too many.
        """
        return None

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
        most = int(everything.labels.max()) + 1
        if not self.digits_only and (most <= 10 or most in SUBSETS):
            most = max(most, 10)
            lines.append(
                f"{most} classes, labels 0..{most - 1}: they are taken for "
                f"{_characters(most)}{self.labels_hint}"
            )
        writers, images = _counts(everything)
        return lines + [
            f"{count:,} {what}, where {self.variant} is published with {published:,}"
            for what, count, published in (
                ("writers", writers, self.published.writers),
                ("images", images, self.published.images),
            )
            if count != published
        ]

    def variant_of(self, store: WriterStore) -> str:
        """Say which FEMNIST `store`, or the store it is a view of, really is; results state it."""
        if self.published is None:
            return self.variant
        writers, images = _counts(store.whole())
        if (writers, images) == (self.published.writers, self.published.images):
            return self.variant
        return f"{self.family or self.variant}: {writers:,} writers, {images:,} images"

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


def _counts(everything: WriterStore) -> tuple[int, int]:
    """Return the writers who may train, and their images."""
    trainable = ~everything.apart
    return int(trainable.sum()), int(everything.examples[trainable].sum())


def _characters(most: int) -> str:
    """Return the characters of the labels below `most` as ranges: `0-9, A-Z`."""
    groups = (CHARACTERS[start : min(stop, most)] for start, stop in ((0, 10), (10, 36), (36, 62)))
    return ", ".join(f"{group[0]}-{group[-1]}" for group in groups if group)


def labels_of(classes: Any) -> frozenset[int]:
    """Return the labels that `dataset.classes` keeps.

    Raises:
        UserError: `classes` names something that is not a label, character, range or word.
    """
    return frozenset(range(CLASSES) if classes is None else labels_in_order("classes", classes))


def labels_in_order(key: str, classes: Any) -> tuple[int, ...]:
    """Return the labels that `dataset.{key}` names, in its order.

    Raises:
        UserError: `classes` names something that is not a label, character, range or word.
    """
    entries: Sequence[Any] = (
        classes if isinstance(classes, Sequence) and not isinstance(classes, str) else [classes]
    )
    labels: list[int] = []
    for entry in entries:
        text = WORDS.get(str(entry), str(entry))
        ends = re.fullmatch(r"([0-9A-Za-z])(?:-([0-9A-Za-z]))?", text)
        if ends:
            first, last = (CHARACTERS.index(end) for end in (ends[1], ends[2] or ends[1]))
            labels.extend(range(first, last + 1))
        elif text.isdecimal() and int(text) < CLASSES:
            labels.append(int(text))
        if not (ends and first <= last) and not (text.isdecimal() and int(text) < CLASSES):
            raise UserError(
                f"dataset.{key}={classes}: {entry!r} is no class; expected digits, capitals, "
                "small, a character, a range such as a-j, a label 0..61, or a list of these"
            )
    if not labels:
        raise UserError(f"dataset.{key}={classes} names nothing; expected at least one class")
    return tuple(labels)


def located(path: str | None, name: str, expected: str) -> Path:
    """Return where `dataset.path` is: folders are resolved, a linked file keeps its own name.

    Args:
        path: as the user gave it.
        name: of the dataset.
        expected: what should be there, in words.

    Raises:
        UserError: there is no path, nothing at it, or a file that no loader reads.
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
        is_folder, is_file = root.is_dir(), root.is_file()
        link = root.is_symlink()
    except OSError as error:
        raise unreadable(root, error) from error
    except ValueError as error:  # a NUL
        raise UserError(
            f"dataset.path={printable(path)}: {error}; expected {expected}; correct "
            "dataset.path=PATH"
        ) from error
    if not there:
        problem = "is a link to nothing" if link else "does not exist"
        raise UserError(
            f"dataset.path={path} {problem} (looked for {root.absolute()}); "
            f"expected {expected}; correct dataset.path=PATH"
        )
    if not (is_folder or is_file):
        raise UserError(
            f"dataset.path={path} is neither a folder nor a file; expected {expected}; correct "
            "dataset.path=PATH"
        )
    # Data managers (DVC, git-annex, the hub's cache) link names to files that are called by hashes.
    return root.resolve() if is_folder else root.parent.resolve() / root.name


# How a name ends, how such a file begins -> what it is, and what to do with it.
ARCHIVE = "an archive; unpack it{how} and give its folder"
PICKLE = (
    "pickled, which can run code and is not loaded; load it where you trust it and write its "
    "arrays as LEAF's JSON (docs/datasets.md, 'Other layouts')"
)
OTHER_LAYOUTS: tuple[tuple[tuple[str, ...], tuple[bytes, ...], str], ...] = (
    (
        (".npz",),
        (),
        "NumPy arrays, perhaps PFLlib's, which are pickled; write them as LEAF's JSON "
        "(docs/datasets.md, 'Other layouts')",
    ),
    ((".pt", ".pth", ".pkl"), (), PICKLE),
    (
        (".mat",),
        (),
        "a Matlab file, perhaps EMNIST's; write its arrays as LEAF's JSON (docs/datasets.md, "
        "'Other layouts')",
    ),
    (
        (".arrow",),
        (),
        "an Arrow cache of the library datasets; save it as Parquet (datasets.Dataset.from_file"
        "(FILE).to_parquet('train.parquet')) and use dataset=femnist",
    ),
    ((".tar.gz", ".tgz"), (), ARCHIVE.format(how=" (tar xzf {name})")),
    ((".tar.bz2", ".tbz2"), (), ARCHIVE.format(how=" (tar xjf {name})")),
    ((".tar.xz", ".txz"), (), ARCHIVE.format(how=" (tar xJf {name})")),
    ((".tar",), (), ARCHIVE.format(how=" (tar xf {name})")),
    ((".zip",), (b"PK\3\4", b"PK\5\6"), ARCHIVE.format(how=" (unzip {name})")),
    ((".7z",), (b"7z\xbc\xaf\x27\x1c",), ARCHIVE.format(how=" (7z x {name})")),
    ((".rar",), (b"Rar!",), ARCHIVE.format(how="")),
    ((".gz",), (b"\x1f\x8b",), "packed; unpack it (gunzip {name}) and give what comes out"),
    ((".bz2",), (b"BZh",), "packed; unpack it (bunzip2 {name}) and give what comes out"),
    (
        (".xz", ".lzma"),
        (b"\xfd7zXZ\0",),
        "packed; unpack it (xz -d {name}) and give what comes out",
    ),
    (
        (".zst",),
        (b"\x28\xb5\x2f\xfd",),
        "packed; unpack it (zstd -d {name}) and give what comes out",
    ),
    ((".h5", ".hdf5"), (b"\x89HDF",), "HDF5; TFF's is read by dataset=tff"),
    ((".sqlite", ".sqlite3"), (b"SQLite format 3\0",), "SQLite; TFF's is read by dataset=tff"),
    ((".parquet",), (b"PAR1",), "Parquet; the hub's is read by dataset=femnist"),
    (
        ("-ubyte", "-ubyte.gz", "-int", "-int.gz"),
        (b"\0\0\x08\x03", b"\0\0\x0c\x02"),
        "an idx file; QMNIST's folder is read by dataset=qmnist",
    ),
    ((".json",), (), "JSON; LEAF's is read by dataset=leaf"),
    ((".csv",), (), "a csv table; FedScale's folder is read by dataset=fedscale"),
    ((".png", ".jpg"), (), "an image; FedScale's folder is read by dataset=fedscale"),
)


def other_layout(file: Path, reads: Sequence[str]) -> str | None:
    """Say what a file is that the loader does not read, and what to do; None if it is unknown.

    Args:
        file: by its own name and its first bytes.
        reads: ends of the names that the loader does read.
    """
    name = file.name.lower()
    if name.endswith(tuple(reads)) and ".tar." not in name:
        return None
    head = b""
    with contextlib.suppress(OSError):
        if file.is_file():
            with file.open("rb") as stream:
                head = stream.read(16)
    by_name = [text for ends, _, text in OTHER_LAYOUTS if name.endswith(ends)]
    by_head = [text for _, heads, text in OTHER_LAYOUTS if heads and head.startswith(heads)]
    for text in (*by_name, *by_head):
        return text.replace("{name}", printable(file.name))
    return None


def refuse_other_layout(file: Path, reads: Sequence[str]) -> None:
    """Refuse a file, given as `dataset.path`, that is of another layout.

    Raises:
        UserError: it is, by its name or by how it begins.
    """
    if said := other_layout(file, reads):
        raise UserError(f"dataset.path={file} is {said}; expected {_ends(reads)}")


def _ends(reads: Sequence[str]) -> str:
    return f"a folder or a file *{', *'.join(reads)}" if reads else "a folder"


def inside(root: Path, reads: Sequence[str]) -> str:
    """Say which other data a folder holds, as the end of a message; empty if none is known."""
    try:
        names = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
    except OSError:
        return ""
    for name in names[:MOST_FOLDERS]:
        if said := other_layout(root / name, reads):
            return f"; {printable(name)} in it is {said}"
    return ""


def folder_that_fits(root: Path, fits: Callable[[Path], bool], depth: int = 2) -> Path | None:
    """Return `root` or, if it does not fit, the one folder below it that does; None if none does.

    Args:
        root: as the user gave it.
        fits: whether a folder holds the dataset.
        depth: how many folders deep to look; the first depth where one fits counts.

    Raises:
        UserError: several of one depth fit, or one cannot be looked into.
    """
    level = [root]
    for _ in range(depth + 1):
        found = [folder for folder in level if fits(folder)]
        if len(found) > 1:
            names = ", ".join(printable(folder.relative_to(root)) for folder in found[:5])
            raise UserError(
                f"{root} holds {len(found)} folders with data: {names}; expected one; give the one "
                f"that is meant, such as dataset.path={found[0]}"
            )
        if found:
            return found[0]
        level = [
            Path(entry.path)
            for folder in level
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
            if not entry.name.startswith((".", "__")) and entry.is_dir()
        ][:MOST_FOLDERS]
    return None


def files_in(folder: Path, ends: tuple[str, ...]) -> list[Path]:
    """Return the files of a folder, sorted, whose own names end in one of `ends`."""
    # macOS leaves a hidden "._NAME" beside every NAME it packs or copies.
    return sorted(
        file
        for file in folder.iterdir()
        if file.name.lower().endswith(ends) and not file.name.startswith(".") and file.is_file()
    )


def most_images(files: Iterable[Path]) -> int:
    """Return how many images files can hold: a small file that claims more is hostile or broken."""
    return FREE_IMAGES + sum(file.stat().st_size for file in files) // LEAST_IMAGE_BYTES


def stored_files(
    cache: Path,
    source: dict[str, Any],
    root: Path,
    files: Sequence[Path],
    writers: Callable[[], Iterable[Handwriting]],
    on_writer: OnWriter | None = None,
) -> WriterStore:
    """Return the store of files, which are read only if they are new or have changed.

    Args:
        cache: folder of all stores.
        source: the dataset and whatever else decides how the files are read.
        root: the folder that the files' names start at.
        files: the files.
        writers: yields the writers of the files.
        on_writer: called with the number of writers converted so far.

    Raises:
        UserError: a file is not what it should be.
    """
    place = {**source, "path": str(root), "files": fingerprint(root, files)}
    most = most_images(files)
    least_bytes = sum(file.stat().st_size for file in files) // MOST_FILE_BYTES

    def checked() -> Iterator[Handwriting]:
        check_room(cache, least_bytes)
        return _checked(writers(), root, most)

    return stored_by_content(cache, place, checked, on_writer)


def _checked(writers: Iterable[Handwriting], root: Path, most: int) -> Iterator[Handwriting]:
    """Yield the writers, of whom the paper is white and who have no more than `most` images."""
    images = 0
    for writer in writers:
        images += len(writer.images)
        if images > most:
            raise UserError(
                f"{root} holds more than {most:,} images, which is more than files of its size "
                "can; expected real handwriting; copy or download the files again"
            )
        if _is_on_dark_paper(writer.images):
            raise UserError(
                f"{root}: writer {printable(writer.name)} has light ink on dark paper; expected "
                "dark ink on white paper, 255; invert the images (255 - pixel, or 1 - pixel where "
                "white is 1)"
            )
        yield writer


def _is_on_dark_paper(images: Bytes) -> bool:
    """Whether the borders of half of a writer's images are dark; ink seldom comes near them."""
    if not len(images) or images.shape[1:] != (28, 28):
        return False
    edges = (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
    dark = np.mean(np.concatenate(edges, axis=1) < DARK, axis=1)
    return bool(np.mean(dark > DARK_SHARE) >= 0.5)


def fingerprint(root: Path, files: Iterable[Path]) -> list[list[Any]]:
    """Return name, size and time of every file: they are read again when one of these changes.

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

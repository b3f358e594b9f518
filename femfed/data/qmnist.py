"""MNIST's digits with their writers, whom QMNIST found again: idx files, plain or gzipped.

Yadav and Bottou, "Cold Case: The Lost MNIST Digits", NeurIPS 2019,
https://arxiv.org/abs/1905.10498, https://github.com/facebookresearch/qmnist. An idx file is a
header of big-endian 32-bit integers and rows of data:

    images  0x00000803, n, 28, 28, then n x 28 x 28 bytes, white ink 255 on black paper 0
    labels  0x00000c02, n, 8, then n x 8 big-endian 32-bit integers: class 0-9, NIST series, NIST
            writer id, digit's index of the writer, NIST class code, digit's index in all of NIST,
            duplicate, unused; or, as `.tsv`, a line a row with tabs between them

MNIST's training images are QMNIST's one by one, and MNIST's 10,000 test images are the first of
QMNIST's 60,000, so that QMNIST's labels fit both. Nobody wrote in both training and test set.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.data.source import (
    Dataset,
    Published,
    folder_that_fits,
    inside,
    located,
    most_images,
    other_layout,
    stored_files,
    unreadable,
)
from femfed.data.store import Handwriting, OnWriter, WriterStore

HOME = "https://github.com/facebookresearch/qmnist"
AGAIN = "copy or download the file again"
IMAGES, LABELS, MNIST_LABELS = 0x0803, 0x0C02, 0x0801  # magic numbers
MOST = 402_953  # digits in all of NIST
IDX = ("-ubyte", "-ubyte.gz", "-int", "-int.gz", ".tsv", ".tsv.gz")  # ends of the files' names
LONGEST = 100  # bytes of a row of eight numbers in text

# By preference; each may end in .gz.
TRAIN_IMAGES = (
    "qmnist-train-images-idx3-ubyte",
    "train-images-idx3-ubyte",
    "train-images.idx3-ubyte",
)
TRAIN_LABELS = ("qmnist-train-labels-idx2-int", "qmnist-train-labels.tsv")
TEST_IMAGES = ("qmnist-test-images-idx3-ubyte", "t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte")
TEST_LABELS = ("qmnist-test-labels-idx2-int", "qmnist-test-labels.tsv")

Files = tuple[Path, Path]


@dataclass(frozen=True)
class Qmnist(Dataset):
    """The digits of QMNIST or MNIST by their writers, in files the user has.

    Attributes:
        path: a folder with the training images of either and QMNIST's labels of them. Where test
            images and QMNIST's test labels lie there too, their writers come last and stay apart.
    """

    path: str | None

    name = "qmnist"
    variant = "QMNIST (digits with writer ids)"
    published = Published(writers=539, images=60_000)
    digits_only = True

    def convert(self, cache: Path, writers: int, on_writer: OnWriter | None = None) -> WriterStore:
        """Return the store of all digits; all their writers are in it, however many are wanted.

        Raises:
            UserError: a file is missing, or not what is published.
        """
        root = located(
            self.path, self.name, "the folder that holds the idx files of QMNIST (or of MNIST)"
        )
        try:
            if root.is_dir():  # else _train_files says so
                root = folder_that_fits(root, _fits) or root
            train, test = _train_files(root), _test_files(root)
        except OSError as error:
            raise unreadable(root, error) from error
        files = (*train, *(test or ()))
        source = {"dataset": self.name}
        return stored_files(cache, source, root, files, lambda: _writers(train, test), on_writer)


def _fits(root: Path) -> bool:
    return any(_find(root, names) for names in (TRAIN_IMAGES, TRAIN_LABELS))


def _train_files(root: Path) -> Files:
    if not root.is_dir():
        other = other_layout(root, IDX)
        what = f"it is {other}" if other else f"give dataset.path={root.parent}"
        raise UserError(
            f"dataset.path={root} is a file; expected the folder that holds {TRAIN_IMAGES[0]}.gz "
            f"and {TRAIN_LABELS[0]}.gz; {what}"
        )
    images, labels = _find(root, TRAIN_IMAGES), _find(root, TRAIN_LABELS)
    if images is None:
        raise UserError(
            f"no training images in {root}; expected {TRAIN_IMAGES[0]}[.gz] or MNIST's "
            f"{TRAIN_IMAGES[1]}[.gz]; download them from {HOME} or give their dataset.path=DIR"
            f"{inside(root, IDX)}"
        )
    if labels is None:
        raise UserError(
            f"no training labels with writers in {root}; expected {TRAIN_LABELS[0]}[.gz] (MNIST's "
            f"own label files do not say who wrote); download it from {HOME}, it fits MNIST's "
            "images too"
        )
    return images, labels


def _test_files(root: Path) -> Files | None:
    """Return the test files if there are both: MNIST's own test set names no writers."""
    images, labels = _find(root, TEST_IMAGES), _find(root, TEST_LABELS)
    return (images, labels) if images and labels else None


def _find(root: Path, names: tuple[str, ...]) -> Path | None:
    files = (root / f"{name}{suffix}" for name in names for suffix in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def _writers(train: Files, test: Files | None) -> Iterator[Handwriting]:
    sets = [(*train, _labels(train[1]))]
    if test:
        sets.append((*test, _labels(test[1])))
        both = np.intersect1d(sets[0][2][:, 2], sets[1][2][:, 2])
        if both.size:
            raise UserError(
                f"{test[1]}: writer {both[0]} stands in {train[1].name} too, one of {both.size}; "
                f"expected other writers than those who train; download both again from {HOME}"
            )
    place = 0
    for apart, (image_file, label_file, labels) in enumerate(sets):
        images = _idx(image_file, IMAGES, (28, 28))
        if image_file.name.startswith("t10k"):
            labels = labels[: len(images)]
        if len(images) != len(labels):
            raise UserError(
                f"{image_file}: {len(images)} images, but {len(labels)} rows in "
                f"{label_file.name}; expected one row an image; {AGAIN} from {HOME}"
            )
        order = np.argsort(labels[:, 2], kind="stable")
        ids, starts = np.unique(labels[order, 2], return_index=True)
        for writer, rows in zip(ids, np.split(order, starts[1:]), strict=True):
            number, subject_number = divmod(place, 100)
            yield Handwriting(
                name=f"f{writer:04d}",
                number=number,
                subject_number=subject_number,
                images=255 - images[rows],
                labels=labels[rows, 0],
                apart=bool(apart),
            )
            place += 1


def _labels(file: Path) -> NDArray[np.int64]:
    """Return the rows of a label file, `[n, 8]`."""
    rows = _table(file) if ".tsv" in file.suffixes else _idx(file, LABELS, (8,)).astype(np.int64)
    for column, name, most in ((0, "class", 9), (2, "writer id", 9999)):
        values = rows[:, column]
        outside = np.flatnonzero((values < 0) | (values > most))
        if outside.size:
            at = int(outside[0])
            raise UserError(
                f"{file}: {name} {values[at]} in row {at}; expected 0..{most}; {AGAIN} from {HOME}"
            )
    return rows


def _table(file: Path) -> NDArray[np.int64]:
    text = _read(file, 0, MOST * LONGEST)
    try:
        if not text.strip():
            raise ValueError("no rows")
        rows = np.loadtxt(BytesIO(text), np.int64, delimiter="\t", comments=None, ndmin=2)
        if rows.shape[1] != 8:
            raise ValueError(f"{rows.shape[1]} columns")
    except ValueError as error:
        raise UserError(
            f"{file}: {str(error).rstrip('.')}; expected rows of 8 integers with tabs between "
            f"them; {AGAIN} from {HOME}"
        ) from error
    return rows


def _idx(file: Path, magic: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the rows of an idx file, `[n, *shape]`: uint8 images or big-endian int32 labels."""
    dtype = np.dtype(np.uint8 if magic == IMAGES else ">i4")
    header = 8 + 4 * len(shape)
    head = _read(file, 0, header)[:header]
    found = int.from_bytes(head[:4])
    if len(head) >= 4 and found != magic:
        if (found, magic) == (MNIST_LABELS, LABELS):
            raise UserError(
                f"{file}: one column, the class, as in MNIST's own label files; expected QMNIST's "
                f"8 columns, which say who wrote; download {TRAIN_LABELS[0]}.gz from {HOME}"
            )
        raise UserError(
            f"{file}: begins with 0x{found:08x}; expected 0x{magic:08x}, an idx file of "
            f"{'images' if magic == IMAGES else 'labels'}; {AGAIN} from {HOME}"
        )
    if len(head) < header:
        raise UserError(
            f"{file}: ends after {len(head)} bytes; expected a header of {header}; {AGAIN}"
        )
    n, *sizes = np.frombuffer(head[4:], ">u4").tolist()
    most = min(MOST, most_images([file])) if file.suffix == ".gz" else MOST
    if sizes != list(shape) or not 0 < n <= most:
        raise UserError(
            f"{file}: the header says {' x '.join(map(str, (n, *sizes)))}; expected n x "
            f"{' x '.join(map(str, shape))} with n in 1..{most:,}; {AGAIN} from {HOME}"
        )
    size = n * int(np.prod(shape)) * dtype.itemsize
    body = _read(file, header, size)
    if len(body) != size:
        much = "more than that" if len(body) > size else f"only {len(body):,}"
        raise UserError(
            f"{file}: {much} after the header of {n:,} rows; expected {size:,} bytes; {AGAIN}"
        )
    return np.frombuffer(body, dtype).reshape(n, *shape)


def _read(file: Path, start: int, size: int) -> bytes:
    """Return `size` bytes from `start` on of what a file holds, and one more if there are more.

    However far a gzipped file would expand, no more of it is expanded.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            stream.seek(start)
            return stream.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{file}: cannot be unzipped: {error}; expected a whole gzip file; {AGAIN}"
        ) from error
    except OSError as error:
        raise unreadable(file, error) from error

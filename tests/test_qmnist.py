"""QMNIST's idx files: read as published, or refused with the file, the row and the place."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from femfed import UserError
from femfed.data.qmnist import MOST, Qmnist
from femfed.data.store import WriterStore
from tests.handwriting import REAL_DATA, needs_real_data, qmnist_writers, whole

IMAGES = "qmnist-train-images-idx3-ubyte"
LABELS = "qmnist-train-labels-idx2-int"
TEST_IMAGES = "qmnist-test-images-idx3-ubyte"
TEST_LABELS = "qmnist-test-labels-idx2-int"
OWNERS = [2100, 3, 0, 3, 2100, 3, 12]  # writers of seven rows


def idx(array: NDArray[np.generic]) -> bytes:
    """Return an idx file of uint8 or int32 values: magic number, sizes, big-endian data."""
    kind = {"uint8": 0x08, "int32": 0x0C}[array.dtype.name]
    head = np.array([kind << 8 | array.ndim, *array.shape], ">u4")
    return head.tobytes() + array.astype(array.dtype.newbyteorder(">")).tobytes()


def pixels(rows: int, first: int = 0) -> NDArray[np.uint8]:
    """Return images whose pixel p of row r is first + r + p, so that no two are the same."""
    values = first + np.arange(rows)[:, None] + np.arange(784)
    return values.astype(np.uint8).reshape(-1, 28, 28)


def table(owners: list[int], first: int = 0) -> NDArray[np.int32]:
    """Return QMNIST's eight columns; the class of row r is first + r."""
    rows = np.zeros((len(owners), 8), np.int32)
    rows[:, 0] = (first + np.arange(len(owners))) % 10
    rows[:, 2] = owners
    rows[:, 1] = 4 * (rows[:, 2] >= 2100)
    rows[:, 3] = [owners[:row].count(owner) for row, owner in enumerate(owners)]
    rows[:, 4] = 30 + rows[:, 0]
    rows[:, 5] = np.arange(len(owners))
    return rows


def store(path: Path, cache: Path) -> WriterStore:
    return whole(Qmnist, path=str(path)).convert(cache, 2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """QMNIST's training files, not gzipped, of seven digits by four writers."""
    folder = tmp_path / "qmnist"
    folder.mkdir()
    (folder / IMAGES).write_bytes(idx(pixels(7)))
    (folder / LABELS).write_bytes(idx(table(OWNERS)))
    return folder


def gzipped(file: Path) -> Path:
    zipped = file.with_name(f"{file.name}.gz")
    zipped.write_bytes(gzip.compress(file.read_bytes(), mtime=0))
    file.unlink()
    return zipped


def is_the_seven(made: WriterStore) -> None:
    """Assert that `made` holds the seven digits, by writer and in the rows' order."""
    order = [2, 1, 3, 5, 6, 0, 4]
    assert made.names[:4] == ("f0000", "f0003", "f0012", "f2100")
    assert made.examples[:4].tolist() == [1, 3, 1, 2]
    np.testing.assert_array_equal(made.images[:7], 255 - pixels(7)[order])
    assert made.labels[:7].tolist() == order


def test_every_digit_comes_to_its_writer_with_dark_ink_on_white(folder: Path, cache: Path) -> None:
    made = store(folder, cache)

    is_the_seven(made)
    assert len(made) == 4
    assert made.train_examples.tolist() == [-1] * 4
    assert made.numbers.tolist() == [0] * 4
    assert made.subject_numbers.tolist() == [0, 1, 2, 3]
    assert not made.apart.any()


def test_gzipped_files(folder: Path, cache: Path) -> None:
    for name in (IMAGES, LABELS):
        gzipped(folder / name)

    is_the_seven(store(folder, cache))


def test_plain_file_is_preferred(folder: Path, cache: Path) -> None:
    (folder / f"{IMAGES}.gz").write_bytes(b"not read")

    is_the_seven(store(folder, cache))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images.idx3-ubyte"])
def test_images_of_mnist_with_labels_of_qmnist(name: str, folder: Path, cache: Path) -> None:
    (folder / IMAGES).rename(folder / name)
    # MNIST's own label and test files say nothing of writers and are not needed.
    (folder / "train-labels-idx1-ubyte").write_bytes(b"not read")
    (folder / "t10k-images-idx3-ubyte").write_bytes(b"not read")

    is_the_seven(store(folder, cache))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_labels_in_text(suffix: str, folder: Path, cache: Path) -> None:
    (folder / LABELS).unlink()
    lines = ["\t".join(map(str, row)) for row in table(OWNERS).tolist()]
    text = folder / "qmnist-train-labels.tsv"
    text.write_text("".join(f"{line}\n" for line in lines))
    if suffix:
        gzipped(text)

    is_the_seven(store(folder, cache))


def test_writers_of_the_test_set_come_last_and_stay_apart(folder: Path, cache: Path) -> None:
    (folder / TEST_IMAGES).write_bytes(idx(pixels(4, first=100)))
    (folder / TEST_LABELS).write_bytes(idx(table([2350, 1, 2350, 1], first=4)))

    made = store(folder, cache)

    is_the_seven(made)
    assert made.names[4:] == ("f0001", "f2350")
    assert made.apart.tolist() == [False] * 4 + [True] * 2
    assert made.train_examples.tolist() == [-1] * 6
    assert made.subject_numbers.tolist() == list(range(6))
    np.testing.assert_array_equal(made.images[7:], 255 - pixels(4, first=100)[[1, 3, 0, 2]])
    assert made.labels[7:].tolist() == [5, 7, 4, 6]


def test_test_images_of_mnist_are_the_first_of_qmnist_s(folder: Path, cache: Path) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(pixels(2, first=100)))
    (folder / TEST_LABELS).write_bytes(idx(table([2350, 1, 2350, 2351], first=4)))

    made = store(folder, cache)

    assert made.names[4:] == ("f0001", "f2350")
    assert made.labels[7:].tolist() == [5, 4]


def test_hundred_writers_are_a_shard(tmp_path: Path, cache: Path) -> None:
    (tmp_path / IMAGES).write_bytes(idx(pixels(101)))
    (tmp_path / LABELS).write_bytes(idx(table(list(range(101)))))

    made = store(tmp_path, cache)

    assert made.numbers.tolist() == [0] * 100 + [1]
    assert made.subject_numbers.tolist() == [*range(100), 0]


def test_changed_source_is_stored_anew(folder: Path, cache: Path) -> None:
    first = store(folder, cache)
    (folder / LABELS).write_bytes(idx(table(OWNERS, first=1)))
    (folder / IMAGES).write_bytes(idx(pixels(7)))

    assert store(folder, cache).folder != first.folder


Spoil = Callable[[Path], object]


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def labels(row: int, column: int, value: int) -> Spoil:
    """Write the label file with one value changed."""
    rows = table(OWNERS)
    rows[row, column] = value
    return lambda folder: (folder / LABELS).write_bytes(idx(rows))


def text(rows: str) -> Spoil:
    def change(folder: Path) -> None:
        (folder / LABELS).unlink()
        (folder / "qmnist-train-labels.tsv").write_text(rows)

    return change


def sizes(*values: int) -> Callable[[bytes], bytes]:
    return lambda old: old[:4] + np.array(values, ">u4").tobytes() + old[4 + 4 * len(values) :]


def bomb(folder: Path) -> None:
    """Gzip the seven images with 64 MB of zeros behind them."""
    held = (folder / IMAGES).read_bytes()
    (folder / f"{IMAGES}.gz").write_bytes(gzip.compress(held + bytes(1 << 26), 1))
    (folder / IMAGES).unlink()


def shorten(folder: Path) -> None:
    zipped = gzipped(folder / IMAGES)
    zipped.write_bytes(zipped.read_bytes()[:-12])


def spoil_zip(folder: Path) -> None:
    zipped = gzipped(folder / IMAGES)
    held = bytearray(zipped.read_bytes())
    held[20:40] = b"\xff" * 20
    zipped.write_bytes(held)


def add_test(owners: list[int]) -> Spoil:
    def change(folder: Path) -> None:
        (folder / TEST_IMAGES).write_bytes(idx(pixels(len(owners))))
        (folder / TEST_LABELS).write_bytes(idx(table(owners)))

    return change


BROKEN: dict[str, tuple[Spoil, list[str]]] = {
    "no images": (lambda f: (f / IMAGES).unlink(), ["no training images in", IMAGES]),
    "no labels": (lambda f: (f / LABELS).unlink(), ["no training labels with writers", LABELS]),
    "images are a folder": (
        lambda f: ((f / IMAGES).unlink(), (f / IMAGES).mkdir()),
        ["no training images in"],
    ),
    "labels for images": (
        rewrite(IMAGES, lambda _: idx(table(OWNERS))),
        [IMAGES, "begins with 0x00000c02; expected 0x00000803"],
    ),
    "images for labels": (
        rewrite(LABELS, lambda _: idx(pixels(7))),
        [LABELS, "begins with 0x00000803; expected 0x00000c02"],
    ),
    "zip under the plain name": (
        rewrite(IMAGES, gzip.compress),
        [IMAGES, "begins with 0x1f8b0800; expected"],
    ),
    "labels of MNIST": (
        rewrite(LABELS, lambda _: idx(np.arange(7, dtype=np.uint8))),
        [LABELS, "one column", "who wrote; download", "github.com/facebookresearch/qmnist"],
    ),
    "empty file": (rewrite(IMAGES, lambda _: b""), [IMAGES, "ends after 0 bytes"]),
    "half a header": (rewrite(IMAGES, lambda old: old[:10]), ["ends after 10 bytes; expected"]),
    "cut off": (
        rewrite(IMAGES, lambda old: old[:-1]),
        [IMAGES, "only 5,487 after the header of 7 rows; expected 5,488 bytes"],
    ),
    "too long": (
        rewrite(LABELS, lambda old: old + b"\0"),
        [LABELS, "more than that after the header of 7 rows; expected 224 bytes"],
    ),
    "27 x 28": (
        rewrite(IMAGES, lambda _: idx(pixels(7)[:, 1:])),
        [IMAGES, "the header says 7 x 27 x 28; expected n x 28 x 28"],
    ),
    "seven columns": (
        rewrite(LABELS, lambda _: idx(table(OWNERS)[:, 1:])),
        [LABELS, "the header says 7 x 7; expected n x 8"],
    ),
    "no rows": (rewrite(IMAGES, sizes(0, 28, 28)), ["the header says 0 x 28 x 28"]),
    "four milliard rows": (
        rewrite(IMAGES, sizes(2**32 - 1, 28, 28)),
        ["the header says 4294967295 x 28 x 28", "n in 1..402,953"],
    ),
    "as many rows as there can be": (
        rewrite(IMAGES, sizes(MOST, 28, 28)),
        ["only 5,488 after the header of 402,953 rows; expected 315,915,152 bytes"],
    ),
    "one image too few": (
        rewrite(IMAGES, lambda _: idx(pixels(6))),
        [IMAGES, f"6 images, but 7 rows in {LABELS}"],
    ),
    "class 10": (labels(5, 0, 10), [LABELS, "class 10 in row 5; expected 0..9"]),
    "class -1": (labels(0, 0, -1), [LABELS, "class -1 in row 0"]),
    "writer -3": (labels(6, 2, -3), [LABELS, "writer id -3 in row 6; expected 0..9999"]),
    "zip cut off": (shorten, [f"{IMAGES}.gz: cannot be unzipped: ", "expected a whole gzip file"]),
    "zip spoilt": (spoil_zip, [f"{IMAGES}.gz: cannot be unzipped: "]),
    "not a zip": (
        lambda f: (f / IMAGES).rename(f / f"{IMAGES}.gz"),
        ["cannot be unzipped: Not a gzipped file"],
    ),
    "zip that expands": (bomb, [f"{IMAGES}.gz", "more than that after the header of 7 rows"]),
    "text with a word": (
        text("1\t0\tx\t0\t31\t0\t0\t0\n"),
        ["labels.tsv: could not convert string 'x'", "row 0, column 3", "rows of 8 integers"],
    ),
    "text with a huge number": (text(f"{10**30}" + "\t0" * 7), ["labels.tsv: ", f"{10**30}"]),
    "text with spaces": (text("1 0 0 0 31 0 0 0\n"), ["labels.tsv: could not convert string"]),
    "text of two columns": (text("1\t0\n"), ["labels.tsv: 2 columns"]),
    "uneven text": (text("1\t0\n1\n"), ["labels.tsv: "]),
    "text of no rows": (text("\n"), ["labels.tsv: no rows"]),
    "writer in both sets": (add_test([2350, 3]), [TEST_LABELS, "writer 3 stands in", LABELS]),
    "test images too few": (
        lambda f: (add_test([2350])(f), (f / TEST_IMAGES).write_bytes(idx(pixels(2)))),
        [TEST_IMAGES, "2 images, but 1 rows in"],
    ),
    "test images of MNIST too many": (
        lambda f: (
            (add_test([2350])(f), (f / TEST_IMAGES).rename(f / "t10k-images-idx3-ubyte"))
            and (f / "t10k-images-idx3-ubyte").write_bytes(idx(pixels(2)))
        ),
        ["t10k-images-idx3-ubyte: 2 images, but 1 rows in"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_one_clear_line_and_no_store(case: str, folder: Path, cache: Path) -> None:
    change, said = BROKEN[case]
    change(folder)

    refuses(folder, cache, said)


def test_a_file_for_the_folder_is_refused(folder: Path, cache: Path) -> None:
    refuses(folder / IMAGES, cache, ["is a file; expected the folder", f"dataset.path={folder}"])


@pytest.mark.parametrize("path", [None, ""])
def test_no_path_says_which_key_to_set(path: str | None, cache: Path) -> None:
    with pytest.raises(UserError, match=r"dataset=qmnist needs dataset\.path=PATH"):
        whole(Qmnist, path=path).convert(cache, 2)


def test_unreadable_file_is_named(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def deny(path: Path, *mode: str) -> Any:  # chmod would not stop tests that run as root
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *mode)

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(UserError, match=rf"cannot read {folder}/.*: Permission denied; "):
        store(folder, cache)
    monkeypatch.undo()
    assert not list(cache.iterdir())


def refuses(path: Path, cache: Path, said: list[str]) -> None:
    """Assert that `path` gives one line that says all of `said`, and leaves no file behind."""
    with pytest.raises(UserError) as caught:
        store(path, cache)
    message = str(caught.value)
    assert [part for part in said if part not in message] == [], message
    assert "\n" not in message
    assert not cache.exists() or not list(cache.iterdir())


@needs_real_data
def test_real_training_set_in_mnist_s_order(tmp_path: Path, cache: Path) -> None:
    with np.load(REAL_DATA / "qmnist_train_writers.npz") as file:
        images, classes, writer = file["images"], file["labels"], file["writer"]
        ids = np.array([int(name[1:]) for name in file["writer_names"]], np.int32)
    # MNIST is shuffled; a stable sort by writer undoes whatever order within a writer is kept.
    order = np.random.default_rng(0).permutation(len(images))
    rows = np.zeros((len(images), 8), np.int32)
    rows[:, 0], rows[:, 2], rows[:, 4] = classes, ids[writer], 30 + classes
    (tmp_path / f"{IMAGES}.gz").write_bytes(gzip.compress(idx(images[order]), 1))
    (tmp_path / f"{LABELS}.gz").write_bytes(gzip.compress(idx(rows[order]), 1))
    dataset = whole(Qmnist, path=str(tmp_path))

    made = dataset.convert(cache, 2)

    assert dataset.remarks(made) == []
    assert made.names == tuple(name for name, _, _ in qmnist_writers())
    assert made.numbers.tolist() == [place // 100 for place in range(539)]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    kept = order[np.lexsort((np.arange(len(order)), writer[order]))]
    np.testing.assert_array_equal(made.images, 255 - images[kept])
    np.testing.assert_array_equal(made.labels, classes[kept])
    assert np.median(made.images) == 255  # white paper

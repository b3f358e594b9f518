"""TFF's EMNIST in both its forms: read as published, or refused with the file and the place."""

import lzma
import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from hashlib import sha256
from operator import itemgetter
from pathlib import Path

import h5py
import numpy as np
import pytest

import femfed.data.tff as tff
from femfed import UserError
from femfed.data.store import WriterStore
from femfed.data.tff import Tff, TffDigits
from tests.handwriting import Person, needs_real_data, qmnist_writers, whole

TRAIN, TEST = "fed_emnist_train.h5", "fed_emnist_test.h5"
DATABASE = "emnist_all.sqlite"


def person(name: str, first: int, examples: int) -> Person:
    """Return a writer whose image i is all first + i, but for one row of all 256 values."""
    images = np.repeat(np.arange(first, first + examples, dtype=np.uint8), 784)
    images = images.reshape(-1, 28, 28)
    images.reshape(-1, 784)[:, :256] += np.arange(256, dtype=np.uint8)
    return name, images, np.arange(first, first + examples) % 10


# f0001 has 3 images to train on and 1 to test with, f0000 2 and 2; one half has f0002, one f0003.
TRAINS = [person("f0001_41", 0, 3), person("f0000_14", 10, 2), person("f0002_26", 20, 4)]
TESTS = [person("f0000_14", 30, 2), person("f0003_42", 40, 1), person("f0001_41", 50, 1)]
HALVES = {"train": TRAINS, "test": TESTS}


def write_hdf5(file: Path, writers: Iterable[Person]) -> Path:
    """Write one half as TFF publishes it in HDF5."""
    with h5py.File(file, "w") as half:
        examples = half.create_group("examples")
        for name, images, labels in writers:
            group = examples.create_group(name)
            group.create_dataset("label", data=labels.astype(np.int32))
            group.create_dataset("pixels", data=images.astype(np.float32) / np.float32(255))
    return file


def varint(value: int) -> bytes:
    head = b""
    value %= 1 << 64  # a negative number takes ten bytes
    while value > 127:
        head, value = head + bytes([value % 128 + 128]), value // 128
    return head + bytes([value])


def block(field: int, content: bytes) -> bytes:
    """Return a message or packed list as field `field` of another message."""
    return varint(field * 8 + 2) + varint(len(content)) + content


def example(**features: bytes) -> bytes:
    """Return a serialized tf.train.Example of serialized features."""
    entries = (block(1, key.encode()) + block(2, value) for key, value in features.items())
    return block(1, b"".join(block(1, entry) for entry in entries))


def floats(values: object) -> bytes:
    return block(2, block(1, np.asarray(values, "<f4").tobytes()))


def integers(*values: int) -> bytes:
    return block(3, block(1, b"".join(map(varint, values))))


def write_sqlite(
    file: Path, splits: dict[str, list[Person]], indexed: bool = True, encoding: str = "UTF-8"
) -> Path:
    """Write the splits as TFF publishes them in SQLite; without its indexes, rows are mixed too."""
    placed = [
        (at, (split, name, example(label=integers(int(label)), pixels=floats(image / 255))))
        for split, writers in splits.items()
        for name, images, labels in writers
        for at, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    if not indexed:  # every writer's own rows stay in their order
        placed.sort(key=itemgetter(0))
    rows = [row for _, row in placed]
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(f"PRAGMA encoding = '{encoding}'")
        database.execute(
            "CREATE TABLE examples (split_name TEXT NOT NULL, client_id TEXT NOT NULL, "
            "serialized_example_proto BLOB NOT NULL)"
        )
        database.execute(
            "CREATE TABLE client_metadata (client_id TEXT NOT NULL, split_name TEXT NOT NULL, "
            "num_examples INTEGER NOT NULL)"
        )
        if indexed:
            database.execute(
                "CREATE INDEX idx_examples_client_id_split ON examples (split_name, client_id)"
            )
        database.executemany("INSERT INTO examples VALUES (?, ?, ?)", rows)
        database.executemany(
            "INSERT INTO client_metadata VALUES (?, ?, ?)",
            [
                (name, split, len(labels))
                for split, writers in splits.items()
                for name, _, labels in writers
            ],
        )
    return file


def store(path: Path, cache: Path, kind: type[Tff] = Tff) -> WriterStore:
    return whole(kind, path=str(path)).convert(cache, 2)


def stores(cache: Path) -> list[Path]:
    return list(cache.iterdir()) if cache.exists() else []


def refuses(path: Path, cache: Path, said: list[str], kind: type[Tff] = Tff) -> None:
    """Assert that `path` gives one line that says all of `said`, and leaves no file behind."""
    with pytest.raises(UserError) as caught:
        store(path, cache, kind)
    message = str(caught.value)
    assert [part for part in said if part not in message] == [], message
    assert "expected" in message
    assert "\n" not in message
    assert message.isprintable()
    assert not stores(cache)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    """The two halves in HDF5."""
    folder = tmp_path / "tff"
    folder.mkdir()
    write_hdf5(folder / TRAIN, TRAINS)
    write_hdf5(folder / TEST, TESTS)
    return folder


@pytest.fixture
def sqlite(tmp_path: Path) -> Path:
    """The database of all four splits; the digits are others than those of all characters."""
    folder = tmp_path / "tff"
    folder.mkdir(exist_ok=True)
    splits = {f"all_{half}": writers for half, writers in HALVES.items()}
    digits = [person("f0009_14", 60, 2)]
    write_sqlite(
        folder / DATABASE, {**splits, "digits_only_train": digits, "digits_only_test": digits}
    )
    return folder


def is_all_of_it(made: WriterStore) -> bool:
    """Assert that every image and label of HALVES is in its place."""
    assert made.names == ("f0000_14", "f0001_41", "f0002_26", "f0003_42")
    assert made.examples.tolist() == [2 + 2, 3 + 1, 4, 1]
    assert made.train_examples.tolist() == [2, 3, 4, 0]
    assert made.numbers.tolist() == [0] * 4
    assert made.subject_numbers.tolist() == [0, 1, 2, 3]
    parts = [TRAINS[1], TESTS[0], TRAINS[0], TESTS[2], TRAINS[2], TESTS[1]]
    np.testing.assert_array_equal(made.images, np.concatenate([images for _, images, _ in parts]))
    np.testing.assert_array_equal(made.labels, np.concatenate([labels for _, _, labels in parts]))
    return True


def test_hdf5_keeps_every_image_label_and_the_published_split(hdf5: Path, cache: Path) -> None:
    made = store(hdf5, cache)

    assert is_all_of_it(made)
    assert made.images[0].ravel()[:256].tolist() == [(10 + k) % 256 for k in range(256)]
    assert made.writer(0, test_fraction=0.9, seed=1).test.tolist() == [2, 3]
    assert stores(cache) == [made.folder]


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16le"])
@pytest.mark.parametrize("indexed", [True, False])
def test_sqlite_keeps_every_image_label_and_the_published_split(
    indexed: bool, encoding: str, tmp_path: Path, cache: Path
) -> None:
    splits = {f"all_{half}": writers for half, writers in HALVES.items()}
    file = write_sqlite(tmp_path / "a ?%20#.sqlite", splits, indexed, encoding)

    assert is_all_of_it(store(file, cache))


def test_digits_are_splits_of_the_same_database(sqlite: Path, cache: Path) -> None:
    made = store(sqlite, cache, TffDigits)

    assert (made.names, made.examples.tolist()) == (("f0009_14",), [4])
    assert made.train_examples.tolist() == [2]
    assert is_all_of_it(store(sqlite, cache))
    assert len(stores(cache)) == 2


@pytest.mark.parametrize("form", [lzma.FORMAT_ALONE, lzma.FORMAT_XZ])
def test_packed_database_is_unpacked_for_a_while(form: int, sqlite: Path, cache: Path) -> None:
    file = sqlite / DATABASE
    (sqlite / f"{DATABASE}.lzma").write_bytes(lzma.compress(file.read_bytes(), form))
    file.unlink()

    made = store(sqlite, cache)

    assert is_all_of_it(made)
    assert stores(cache) == [made.folder]
    assert [file.name for file in sqlite.iterdir()] == [f"{DATABASE}.lzma"]


def test_hdf5_goes_before_sqlite_and_that_before_its_packed_self(
    hdf5: Path, sqlite: Path, cache: Path
) -> None:
    assert hdf5 == sqlite
    (sqlite / f"{DATABASE}.lzma").write_bytes(b"never read")

    assert is_all_of_it(store(sqlite, cache))
    for name in (TRAIN, TEST):
        (hdf5 / name).write_bytes(b"never read")
    refuses(hdf5, cache / "other", [f"{TRAIN}: not HDF5"])
    for name in (TRAIN, TEST):
        (hdf5 / name).unlink()
    assert is_all_of_it(store(sqlite, cache))


def test_other_datasets_may_lie_in_the_same_folder(sqlite: Path, cache: Path) -> None:
    for name in ("shakespeare.sqlite", "cifar100.sqlite", "stackoverflow.sqlite.lzma"):
        (sqlite / name).write_bytes(b"never read")
    assert is_all_of_it(store(sqlite, cache))
    write_hdf5(sqlite / TRAIN, TRAINS)
    write_hdf5(sqlite / TEST, TESTS)
    for name in ("shakespeare_train.h5", "shakespeare_test.h5"):
        (sqlite / name).write_bytes(b"never read")
    assert is_all_of_it(store(sqlite, cache))


def test_writers_are_numbered_by_their_places(tmp_path: Path, cache: Path) -> None:
    write_hdf5(tmp_path / "x.h5", [person(f"w{place:03}", 0, 1) for place in reversed(range(102))])

    made = store(tmp_path / "x.h5", cache)

    assert made.names == tuple(f"w{place:03}" for place in range(102))
    assert made.numbers.tolist() == [0] * 100 + [1] * 2
    assert made.subject_numbers.tolist() == [*range(100), 0, 1]


@pytest.mark.parametrize(
    ("name", "path"), [(TRAIN, TRAIN), ("emnist.h5", ""), ("train_and_test.h5", "")]
)
def test_one_hdf5_file_publishes_no_split(name: str, path: str, hdf5: Path, cache: Path) -> None:
    (hdf5 / TEST).unlink()
    (hdf5 / TRAIN).rename(hdf5 / name)

    made = store(hdf5 / path, cache)

    assert made.names == ("f0000_14", "f0001_41", "f0002_26")
    assert made.train_examples.tolist() == [-1, -1, -1]


def test_halves_are_found_by_other_names(hdf5: Path, cache: Path) -> None:
    (hdf5 / TRAIN).rename(hdf5 / "My-Train.HDF5")
    (hdf5 / TEST).rename(hdf5 / "my-test.h5")
    (hdf5 / f"._{TEST}").write_bytes(b"left by macOS")

    assert is_all_of_it(store(hdf5, cache))


def test_both_variants_may_lie_in_one_folder(hdf5: Path, cache: Path) -> None:
    for half in HALVES:
        write_hdf5(hdf5 / f"fed_emnist_digitsonly_{half}.h5", [person("f0009_14", 60, 2)])

    assert is_all_of_it(store(hdf5, cache))
    assert store(hdf5, cache, TffDigits).names == ("f0009_14",)
    (hdf5 / TRAIN).rename(hdf5 / "emnist_train.h5")
    assert is_all_of_it(store(hdf5, cache))
    for name in ("emnist_train.h5", TEST):
        (hdf5 / name).unlink()
    refuses(hdf5, cache / "other", ["fed_emnist_digitsonly_test.h5", "use dataset=tff_digits"])


def test_writers_without_images_are_counted_and_keep_their_place(
    tmp_path: Path, cache: Path
) -> None:
    write_hdf5(tmp_path / "x.h5", [person("a", 0, 1), person("b", 0, 0), person("c", 0, 2)])

    made = store(tmp_path / "x.h5", cache)

    assert made.skipped_writers == 1
    assert made.subject_numbers.tolist() == [0, 2]


def test_second_opening_reads_no_file(
    sqlite: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store(sqlite, cache)

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(tff, "_database", refuse)

    assert store(sqlite, cache).folder == first.folder


def test_changed_source_is_stored_anew(hdf5: Path, cache: Path) -> None:
    first = store(hdf5, cache)
    stat = (hdf5 / TEST).stat()
    with h5py.File(hdf5 / TEST, "r+") as file:
        file["examples/f0003_42/label"][0] = 61
    os.utime(hdf5 / TEST, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))

    second = store(hdf5, cache)

    assert (first.labels[-1], second.labels[-1]) == (0, 61)


def test_published_counts_are_compared(hdf5: Path, cache: Path) -> None:
    said = whole(Tff, path=str(hdf5)).remarks(store(hdf5, cache))

    assert "3 writers, where TFF federated EMNIST is published with 3,400" in said
    assert "12 images, where TFF federated EMNIST is published with 749,068" in said


Change = Callable[[h5py.Group], object]


def replace(key: str, values: object, **more: object) -> Change:
    """Return a change of the dataset `key` of writer f0000_14, which has 2 test images."""

    def change(writer: h5py.Group) -> None:
        del writer[key]
        writer.create_dataset(key, data=values, **more)

    return change


def white(change: Callable[[np.ndarray], object], dtype: type = np.float32) -> Change:
    """Return a change of two white images."""
    images = np.ones((2, 28, 28), dtype)
    change(images)
    return replace("pixels", images)


def empty(key: str, shape: tuple[int, ...], **more: object) -> Change:
    """Return a change that declares a dataset but writes none of it."""

    def change(writer: h5py.Group) -> None:
        del writer[key]
        writer.create_dataset(key, shape, "f4" if key == "pixels" else "i4", **more)

    return change


def link(key: str, target: object) -> Change:
    def change(group: h5py.Group) -> None:
        del group[key]
        group[key] = target

    return change


def elsewhere(writer: h5py.Group) -> None:
    del writer["pixels"]
    other = Path(writer.file.filename).with_name("raw.bin")
    other.write_bytes(bytes(2 * 784 * 4))
    writer.create_dataset("pixels", (2, 28, 28), "f4", external=[(str(other), 0, 2 * 784 * 4)])


def virtual(writer: h5py.Group) -> None:
    del writer["pixels"]
    layout = h5py.VirtualLayout((2, 28, 28), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "pixels", (2, 28, 28))
    writer.create_virtual_dataset("pixels", layout)


WRITER = f"{TEST}: writer f0000_14: "
BOMB = 10**9
BROKEN_HDF5: dict[str, tuple[Change, list[str]]] = {
    "no pixels": (lambda w: w.pop("pixels"), [WRITER, "no pixels; expected examples/WRITER/{"]),
    "no label": (lambda w: w.pop("label"), [WRITER, "no label; expected"]),
    "no examples": (lambda w: w.file.pop("examples"), [f"{TEST}: no examples; expected"]),
    "examples is a dataset": (
        lambda w: link("examples", np.zeros(3))(w.file),
        [f"{TEST}: examples is a Dataset; expected a Group"],
    ),
    "writer is a dataset": (
        lambda w: link("f0000_14", np.zeros(3))(w.parent),
        [f"{TEST}: writer f0000_14: f0000_14 is a Dataset"],
    ),
    "pixels is a group": (
        lambda w: (w.pop("pixels"), w.create_group("pixels")),
        [WRITER, "pixels is a Group; expected a Dataset"],
    ),
    "pixels are bytes": (
        white(lambda x: None, np.uint8),
        [WRITER, "pixels is uint8 (2, 28, 28); expected float32 (2, 28, 28)"],
    ),
    "labels are floats": (replace("label", np.zeros(2)), [WRITER, "label is float64 (2,)"]),
    "labels are words": (replace("label", ["a", "b"]), [WRITER, "label is object (2,)"]),
    "labels are nothing": (replace("label", h5py.Empty("i4")), [WRITER, "label is int32 None"]),
    "one label": (replace("label", 3), [WRITER, "label is int64 (); expected int32 (0,)"]),
    "flat pixels": (
        replace("pixels", np.ones((2, 784), np.float32)),
        [WRITER, "pixels is float32 (2, 784); expected float32 (2, 28, 28)"],
    ),
    "an image too many": (
        replace("pixels", np.ones((3, 28, 28), np.float32)),
        [WRITER, "pixels is float32 (3, 28, 28); expected float32 (2, 28, 28), one entry an im"],
    ),
    "pixel NaN": (
        white(lambda x: x.__setitem__((1, 0, 5), np.nan)),
        [WRITER, "pixel 5 of image 1 is nan; expected 0..1"],
    ),
    "pixel infinite": (
        white(lambda x: x.__setitem__((0, 1, 0), -np.inf)),
        [WRITER, "pixel 28 of image 0 is -inf"],
    ),
    "pixels of 0..255": (
        white(lambda x: x.__imul__(255)),
        [WRITER, "pixel 0 of image 0 is 255.0", "divide values of 0..255 by 255"],
    ),
    "label 62": (
        replace("label", np.array([0, 62])),
        [WRITER, "label 62 at image 1; expected 0..61 (0-9, A-Z, a-z)"],
    ),
    "label -1": (replace("label", np.array([-1, 0])), [WRITER, "label -1 at image 0"]),
    "label beyond int64": (
        replace("label", np.array([0, 2**64 - 1], np.uint64)),
        [WRITER, f"label {2**64 - 1} at image 1"],
    ),
    "bomb": (
        lambda w: (
            empty("label", (BOMB,), chunks=(1000,))(w),
            empty("pixels", (BOMB, 28, 28), chunks=(1000, 28, 28), compression="gzip")(w),
        ),
        [WRITER, "label is declared with 1,000,000,000 images; expected at most 50,000"],
    ),
    "bomb of one chunk": (
        empty("pixels", (2, 28, 28), chunks=(10**6, 28, 28), maxshape=(None, 28, 28)),
        [WRITER, "pixels is declared with 1,000,000 images"],
    ),
    "never written": (
        empty("pixels", (2, 28, 28)),
        [WRITER, "pixels was never written; expected 2 entries"],
    ),
    "link to another file": (
        link("pixels", h5py.ExternalLink(TRAIN, "/examples/f0000_14/pixels")),
        [WRITER, "pixels is a link to '/examples/f0000_14/pixels'; expected the data themselves"],
    ),
    "soft link": (
        link("pixels", h5py.SoftLink("/examples/f0001_41/pixels")),
        [WRITER, "pixels is a link to '/examples/f0001_41/pixels'"],
    ),
    "writer in another file": (
        lambda w: link("f0000_14", h5py.ExternalLink(TRAIN, "/examples/f0000_14"))(w.parent),
        [WRITER, "f0000_14 is a link"],
    ),
    "examples in another file": (
        lambda w: link("examples", h5py.ExternalLink(TRAIN, "/examples"))(w.file),
        [f"{TEST}: examples is a link to '/examples'"],
    ),
    "data in a raw file": (elsewhere, [WRITER, "pixels lies in other files"]),
    "data put together from other files": (virtual, [WRITER, "pixels lies in other files"]),
    "name of two lines": (
        lambda w: w.parent.create_group("a\nb"),
        [f"{TEST}: a writer is called 'a\\nb'; expected a printable name"],
    ),
    "name that is not UTF-8": (
        lambda w: w.parent.create_group(b"a\xff"),
        [f"{TEST}: a writer is called 'a\\udcff'"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_HDF5)
def test_broken_hdf5_is_one_clear_line_and_no_store(case: str, hdf5: Path, cache: Path) -> None:
    change, said = BROKEN_HDF5[case]
    with h5py.File(hdf5 / TEST, "r+") as file:
        change(file["examples/f0000_14"])

    refuses(hdf5, cache, [str(hdf5), *said])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[: len(text) // 2], "truncated file"),
        (lambda text: b"", "not HDF5"),
        (lambda text: b"PK\3\4" + text[4:], "file signature not found"),
        (lambda text: text[:600] + bytes(len(text) - 600), "not HDF5, or broken: "),
    ],
)
def test_file_that_is_not_hdf5_is_named(
    spoil: Callable[[bytes], bytes], said: str, hdf5: Path, cache: Path
) -> None:
    (hdf5 / TEST).write_bytes(spoil((hdf5 / TEST).read_bytes()))

    refuses(hdf5, cache, [f"{hdf5 / TEST}: not HDF5, or broken: ", said, "download the file again"])


def test_letters_are_not_digits(hdf5: Path, cache: Path) -> None:
    with h5py.File(hdf5 / TEST, "r+") as file:
        file["examples/f0000_14/label"][1] = 10

    refuses(
        hdf5,
        cache,
        [WRITER, "label 10 at image 1; expected 0..9 (digits only; dataset=tff has the letters)"],
        TffDigits,
    )


Sql = Callable[[sqlite3.Connection], object]
OF_WRITER = f"{DATABASE}: writer f0000_14, split all_test: "
WHERE = "WHERE client_id = 'f0000_14' AND split_name = 'all_test'"
ONES = np.ones(784)


def sql(command: str, *values: object) -> Sql:
    return lambda database: database.execute(command, values)


def second_image(text: object) -> Sql:
    """Return a change of the second of the 2 test images of f0000_14."""
    return sql(
        "UPDATE examples SET serialized_example_proto = ? WHERE rowid = "
        f"(SELECT max(rowid) FROM examples {WHERE})",
        text,
    )


BROKEN_SQLITE: dict[str, tuple[Sql, list[str]]] = {
    "no examples": (sql("DROP TABLE examples"), ["or broken: no such table: examples; expected"]),
    "no metadata": (sql("DROP TABLE client_metadata"), ["no such table: client_metadata"]),
    "no num_examples": (
        sql("ALTER TABLE client_metadata DROP COLUMN num_examples"),
        ["no such column: num_examples", "client_metadata (client_id, split_name, num_examples)"],
    ),
    "no proto": (
        sql("ALTER TABLE examples RENAME serialized_example_proto TO proto"),
        ["no such column: serialized_example_proto"],
    ),
    "half a split": (
        sql("DELETE FROM client_metadata WHERE split_name = 'all_test'"),
        ["no writer of split all_test; expected the splits all_train and all_test"],
    ),
    "num_examples wrong": (
        sql(f"UPDATE client_metadata SET num_examples = 3 {WHERE}"),
        [OF_WRITER, "says 3 num_examples but examples holds 2; expected the same"],
    ),
    "num_examples too low": (
        sql(f"UPDATE client_metadata SET num_examples = 1 {WHERE}"),
        [OF_WRITER, "says 1 num_examples but examples holds more; expected the same"],
    ),
    "num_examples beyond any writer": (
        sql(f"UPDATE client_metadata SET num_examples = {BOMB} {WHERE}"),
        ["client 'f0000_14' has 1000000000 num_examples", "with a number up to 50,000"],
    ),
    "num_examples is a word": (
        sql(f"UPDATE client_metadata SET num_examples = 'few' {WHERE}"),
        ["client_metadata, split all_test: client 'f0000_14' has 'few' num_examples"],
    ),
    "client twice": (
        sql(f"INSERT INTO client_metadata SELECT * FROM client_metadata {WHERE}"),
        ["client_metadata, split all_test: client 'f0000_14' stands there twice"],
    ),
    "no examples of a client": (
        sql(f"DELETE FROM examples {WHERE}"),
        [OF_WRITER, "says 2 num_examples but examples holds none"],
    ),
    "client not in the metadata": (
        sql(f"DELETE FROM client_metadata {WHERE}"),
        [OF_WRITER, "says 0 num_examples but examples holds more"],
    ),
    "name is a blob": (
        sql("UPDATE client_metadata SET client_id = x'00ff' WHERE client_id = 'f0000_14'"),
        ["client b'\\x00\\xff' has 2 num_examples; expected every client once, by a name"],
    ),
    "name is a blob in the examples": (
        sql(f"UPDATE examples SET client_id = x'00ff' {WHERE}"),
        [DATABASE, "writer b'\\x00\\xff'", "says 0 num_examples"],
    ),
    "name that is not UTF-8": (
        sql("UPDATE client_metadata SET client_id = CAST(x'61ff0a' AS TEXT)"),
        ["or broken: Could not decode to UTF-8"],
    ),
    "name of two lines": (
        lambda database: [
            database.execute(f"UPDATE {table} SET client_id = 'a' || char(10) {WHERE}")
            for table in ("examples", "client_metadata")
        ],
        ["a writer is called 'a\\n'"],
    ),
    "no proto at all": (second_image(b"\xff\xff"), [OF_WRITER, "image 1 is no tf.train.Example"]),
    "proto cut off": (
        second_image(example(pixels=floats(ONES), label=integers(3))[:-1]),
        [OF_WRITER, "image 1 is no tf.train.Example; expected one with pixels and label"],
    ),
    "proto is text": (second_image("pixels"), [OF_WRITER, "image 1 is no tf.train.Example"]),
    "proto is empty": (second_image(b""), [OF_WRITER, "image 1 has no pixels, only []"]),
    "no label": (
        second_image(example(pixels=floats(ONES))),
        [OF_WRITER, "image 1 has no label, only ['pixels']"],
    ),
    "783 floats": (
        second_image(example(pixels=floats(ONES[1:]), label=integers(3))),
        [OF_WRITER, "image 1 has 783 floats in pixels and 1 integers in label; expected 784"],
    ),
    "half a float": (
        second_image(example(pixels=block(2, block(1, bytes(3138))), label=integers(3))),
        [OF_WRITER, "image 1 has 784.5 floats"],
    ),
    "pixels are integers": (
        second_image(example(pixels=integers(*[1] * 784), label=integers(3))),
        [OF_WRITER, "image 1 has 0 floats"],
    ),
    "label is a float": (
        second_image(example(pixels=floats(ONES), label=floats([3]))),
        [OF_WRITER, "and 0 integers in label"],
    ),
    "two labels": (
        second_image(example(pixels=floats(ONES), label=integers(3, 4))),
        [OF_WRITER, "and 2 integers in label"],
    ),
    "pixel NaN": (
        second_image(example(pixels=floats([np.nan] * 784), label=integers(3))),
        [OF_WRITER, "pixel 0 of image 1 is nan"],
    ),
    "pixels of 0..255": (
        second_image(example(pixels=floats(ONES * 255), label=integers(3))),
        [OF_WRITER, "pixel 0 of image 1 is 255.0", "divide values of 0..255"],
    ),
    "label 62": (
        second_image(example(pixels=floats(ONES), label=integers(62))),
        [OF_WRITER, "label 62 at image 1; expected 0..61"],
    ),
    "label -1": (
        second_image(example(pixels=floats(ONES), label=integers(-1))),
        [OF_WRITER, "label -1 at image 1"],
    ),
    "bomb": (
        sql(f"UPDATE examples SET serialized_example_proto = zeroblob(50000000) {WHERE}"),
        [DATABASE, "or broken: string or blob too big"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_SQLITE)
def test_broken_sqlite_is_one_clear_line_and_no_store(case: str, sqlite: Path, cache: Path) -> None:
    change, said = BROKEN_SQLITE[case]
    with closing(sqlite3.connect(sqlite / DATABASE)) as database, database:
        change(database)

    refuses(sqlite, cache, [f"{sqlite / DATABASE}: ", *said])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[: len(text) // 2], "database disk image is malformed"),
        (lambda text: text[:50], "database disk image is malformed"),
        (lambda text: b"", "no such table"),
        (lambda text: b"PK\3\4" + text[4:], "file is not a database"),
        (lambda text: text[:4096] + bytes(len(text) - 4096), "database disk image is malformed"),
        (lambda text: text.replace(b"num_exam", b"num\xff\n\x1bam"), ""),
    ],
)
def test_file_that_is_not_sqlite_is_named(
    spoil: Callable[[bytes], bytes], said: str, sqlite: Path, cache: Path
) -> None:
    file = sqlite / DATABASE
    file.write_bytes(spoil(file.read_bytes()))

    refuses(file, cache, [f"{file}: not TFF's SQLite database, or broken: {said}", "expected"])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[:-40], "the LZMA data are cut off after"),
        (lambda text: b"", "the LZMA data are cut off after 0 bytes"),
        (lambda text: b"PK\3\4" + text[4:], "not LZMA, or broken: "),
        (lambda text: text[:40] + b"\xff" * 40 + text[80:], "not LZMA, or broken: "),
        # The dictionary of 4 GiB that the second to fifth byte declare would be allocated.
        (lambda text: text[:1] + b"\xff\xff\xff\xff" + text[5:], "not LZMA, or broken: Memory"),
        (lambda text: lzma.compress(b"SQLite?", lzma.FORMAT_ALONE), "not TFF's SQLite database"),
    ],
)
def test_broken_packed_database_is_refused_and_nothing_left(
    spoil: Callable[[bytes], bytes], said: str, sqlite: Path, cache: Path
) -> None:
    file = sqlite / f"{DATABASE}.lzma"
    file.write_bytes(spoil(lzma.compress((sqlite / DATABASE).read_bytes(), lzma.FORMAT_ALONE)))

    refuses(file, cache, [f"{file}: {said}", "expected"])


def test_packed_bomb_stops_at_the_limit(
    sqlite: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tff, "MOST_UNPACKED", 3 << 20)
    file = sqlite / "bomb.sqlite.xz"
    file.write_bytes(lzma.compress(bytes(5 << 20)))

    refuses(file, cache, [f"{file} unpacks to more than 3,145,728 bytes", "xz -d bomb.sqlite.xz"])


def test_full_disk_says_what_to_do(
    sqlite: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sqlite / f"{DATABASE}.lzma").write_bytes(lzma.compress((sqlite / DATABASE).read_bytes()))
    open_file = Path.open

    def full(path: Path, mode: str = "r", **more: object) -> object:
        if "unpacked" in path.name and "w" in mode:
            raise OSError(28, "No space left on device")
        return open_file(path, mode, **more)

    monkeypatch.setattr(Path, "open", full)
    refuses(
        sqlite / f"{DATABASE}.lzma",
        cache,
        ["cannot unpack", f"to {cache}: No space left on device", "cache=DIR"],
    )


@pytest.mark.parametrize("path", [None, "  "])
def test_no_path_says_which_key_to_set(path: str | None, cache: Path) -> None:
    with pytest.raises(UserError, match=r"dataset=tff_digits needs dataset\.path=PATH"):
        whole(TffDigits, path=path).convert(cache, 2)


def test_missing_path_is_named(tmp_path: Path, cache: Path) -> None:
    refuses(tmp_path / "nowhere", cache, ["nowhere does not exist", "fed_emnist_train.h5"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], ["no .h5 and no .sqlite files in", "expected fed_emnist_train.h5"]),
        (["fed_emnist.tar.bz2"], ["no .h5 and no .sqlite files", "unpack fed_emnist.tar.bz2"]),
        ([TRAIN], ["has no test half beside fed_emnist_train.h5", "dataset.path=", TRAIN]),
        ([TEST], ["has no train half beside fed_emnist_test.h5"]),
        (["a.h5", "b.h5"], ["has no train half beside a.h5"]),
        (["a_train.h5", "train.h5", "test.h5"], ["a_train.h5 and train.h5 in", "both the train h"]),
        (["train.h5", "test.h5", "a_test.h5"], ["a_test.h5 and test.h5 in", "both the test half"]),
        (["a.sqlite", "b.sqlite"], ["holds a.sqlite and b.sqlite; expected one", "=", "a.sqlite"]),
    ],
)
def test_other_folders_are_refused(
    names: list[str], said: list[str], tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "tff").mkdir()
    for name in names:
        (tmp_path / "tff" / name).touch()

    refuses(tmp_path / "tff", cache, [str(tmp_path / "tff"), *said])


def test_other_file_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "fed_emnist.tar.bz2").touch()

    refuses(tmp_path / "fed_emnist.tar.bz2", cache, ["neither HDF5 nor SQLite", "tar xjf fed_emn"])


@pytest.mark.parametrize("name", [DATABASE, f"{DATABASE}.lzma"])
def test_unreadable_file_is_named(
    name: str, sqlite: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sqlite / name).touch()

    def deny(path: Path, *_: object) -> None:  # chmod would not stop tests that run as root
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", deny)
        refuses(sqlite / name, cache, [f"cannot read {sqlite / name}: Permission denied"])


def test_example_is_what_tensorflow_writes() -> None:
    pixels = (np.arange(784) % 256).astype(np.float32) / np.float32(255)

    written = example(label=integers(37), pixels=floats(pixels))

    # Of tf.train.Example's SerializeToString(deterministic=True), TensorFlow 2.21.
    digest = "0f4edb08cbb99c65246c00bf3543d9658d3d140f884b71eaa4320644a2404f63"
    assert sha256(written).hexdigest() == digest
    assert tff._example(written, "here", 0) == (pixels.tobytes(), 37)


@needs_real_data
@pytest.mark.parametrize("form", ["hdf5", "sqlite"])
def test_qmnist_writers_survive_the_published_layout(
    form: str, tmp_path: Path, cache: Path
) -> None:
    writers = [writer for _, writer in zip(range(4), qmnist_writers(), strict=False)]
    halves = {
        "train": [(name, images[:-9], labels[:-9]) for name, images, labels in writers],
        "test": [(name, images[-9:], labels[-9:]) for name, images, labels in writers],
    }
    if form == "hdf5":
        for half, people in halves.items():
            write_hdf5(tmp_path / f"fed_emnist_digitsonly_{half}.h5", people)
    else:
        splits = {f"digits_only_{half}": people for half, people in halves.items()}
        write_sqlite(tmp_path / DATABASE, splits)

    made = store(tmp_path, cache, TffDigits)

    assert made.names == tuple(name for name, _, _ in writers)
    assert (made.examples - made.train_examples).tolist() == [9] * 4
    np.testing.assert_array_equal(made.images, np.concatenate([writer[1] for writer in writers]))
    np.testing.assert_array_equal(made.labels, np.concatenate([writer[2] for writer in writers]))
    assert np.median(made.images) == 255  # white paper

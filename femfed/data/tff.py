"""TensorFlow Federated's EMNIST: LEAF's handwriting as TFF publishes it, in HDF5 or in SQLite.

Made by The TensorFlow Federated Authors of Caldas et al., "LEAF: A Benchmark for Federated
Settings", 2018, https://arxiv.org/abs/1812.01097, and documented at
https://www.tensorflow.org/federated/api_docs/python/tff/simulation/datasets/emnist/load_data.
A writer stands in the train half and in the test half under the same name. Two forms are read:

HDF5, of `fed_emnist.tar.bz2` and `fed_emnist_digitsonly.tar.bz2`: one file a half, such as
`fed_emnist_train.h5` and `fed_emnist_test.h5`, each with

    examples/<writer>/pixels    float32 [n, 28, 28], k/255, white paper 1
    examples/<writer>/label     int32 [n]

SQLite, `emnist_all.sqlite` or as it is downloaded, `emnist_all.sqlite.lzma`: one file of all halves
`all_train`, `all_test`, `digits_only_train` and `digits_only_test`, with the tables

    client_metadata (client_id TEXT, split_name TEXT, num_examples INTEGER)
    examples (split_name TEXT, client_id TEXT, serialized_example_proto BLOB)

A `serialized_example_proto` is one image as a `tf.train.Example` with the features `pixels`, 784
floats, and `label`, one integer.
"""

import lzma
import math
import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from heapq import merge
from itertools import groupby, islice
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import h5py
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from femfed import UserError, printable
from femfed.data.source import (
    Dataset,
    Published,
    files_in,
    folder_that_fits,
    inside,
    located,
    most_images,
    other_layout,
    stored_files,
    unreadable,
)
from femfed.data.store import (
    CLASSES,
    Bytes,
    Handwriting,
    OnWriter,
    WriterStore,
    scratch_folder,
)

PIXELS = 28 * 28
PER_NUMBER = 100  # writers that share a number, as in LEAF's shards
HDF5 = (".h5", ".hdf5")
SQLITE = (".sqlite", ".sqlite3")
PACKED = (".lzma", ".xz")
ENDS = (*HDF5, *SQLITE, *PACKED)
EXPECTED = (
    "the folder that holds TFF's fed_emnist_train.h5 and fed_emnist_test.h5 or emnist_all.sqlite"
)
TABLES = (
    "client_metadata (client_id, split_name, num_examples) and examples (split_name, client_id, "
    "serialized_example_proto)"
)
AGAIN = "copy or download the file again"

# Declared sizes cost a broken file nothing: what is beyond these is refused before it is read.
MOST_IMAGES = 50_000  # of one writer in one half, where TFF's have some hundreds
MOST_UNPACKED = 16 << 30  # bytes, where emnist_all.sqlite has 4.7e9
FREE_UNPACKED = 1 << 26  # bytes that a packed file of any size may unpack to
MOST_RATIO = 500  # bytes for every packed one, beyond those; of TFF's, some 30
MOST_MEMORY = 256 << 20  # bytes to unpack with, where xz -9 needs 65 MiB
MOST_BLOB = 1 << 20  # bytes of one image in SQLite, where TFF's have some 3,200
CHUNK = 1 << 20
MOST_LINE_CHARACTERS = 300  # of what a library says
STEP = 10_000  # SQLite's instructions from one look at how many there were to the next
FREE_INSTRUCTIONS = 2_000_000  # of a file of any size, and one for every byte: a row has some 10


@dataclass(frozen=True)
class Tff(Dataset):
    """Federated EMNIST as TensorFlow Federated publishes it, in files the user has.

    Attributes:
        path: a folder with the train and the test file in HDF5, or else with the SQLite database
            (TFF's own is `~/.tff`); a database, packed or not; or one HDF5 file, which publishes no
            split.
    """

    path: str | None

    name = "tff"
    variant = "TFF federated EMNIST"
    published = Published(writers=3_400, images=671_585 + 77_483)

    prefix: ClassVar[str] = "fed_emnist"
    """How the names of the HDF5 files begin."""
    splits: ClassVar[tuple[str, str]] = ("all_train", "all_test")
    """What the train and the test half are called in the database."""
    labels: ClassVar[int] = CLASSES
    """How many labels there are."""

    def convert(self, cache: Path, writers: int, on_writer: OnWriter | None = None) -> WriterStore:
        """Return the store of the files; all their writers are in it, however many are wanted.

        The files themselves are read only if no store was made of them yet, or if a file's size or
        time has changed since. A packed database is unpacked into `cache` for as long as it takes.

        Raises:
            UserError: the path, a file or a writer's data is not what TFF publishes.
        """
        root = located(self.path, self.name, EXPECTED)
        try:
            files = self._find(root)
        except OSError as error:
            raise unreadable(Path(error.filename or root), error) from error
        source = {"dataset": self.name}
        with ExitStack() as stack:
            return stored_files(
                cache,
                source,
                root,
                files,
                lambda: _writers(self._halves(files, cache, stack)),
                on_writer,
            )

    def _find(self, root: Path) -> list[Path]:
        """Return the train and the test file, or the one file that holds all there is."""
        if not root.is_dir():
            other = other_layout(root, ENDS)
            if other or root.suffix.lower() not in ENDS:
                what = other or f"unpack an archive first (tar xjf {self.prefix}.tar.bz2)"
                raise UserError(
                    f"dataset.path={root} is neither HDF5 nor SQLite by its name; expected .h5, "
                    f".sqlite or .sqlite.lzma; {'it is ' if other else ''}{what}"
                )
            return [root]
        folder = folder_that_fits(root, lambda at: bool(files_in(at, ENDS))) or root
        files = files_in(folder, ENDS)
        if hdf5 := _called(files, HDF5):
            return self._halves_of(folder, hdf5)
        for suffixes in (SQLITE, PACKED):
            found = _called(files, suffixes)
            if len(found) > 1:
                raise UserError(
                    f"{folder} holds {found[0].name} and {found[1].name}; expected one database; "
                    f"give the one that is meant, dataset.path={found[0]}"
                )
            if found:
                return found
        raise UserError(
            f"no .h5 and no .sqlite files in {root}; expected {self.prefix}_train.h5 and "
            f"{self.prefix}_test.h5, or emnist_all.sqlite; unpack {self.prefix}.tar.bz2 and give "
            f"its folder with dataset.path=DIR{inside(root, ENDS)}"
        )

    def _halves_of(self, root: Path, files: list[Path]) -> list[Path]:
        names = {file.name: file for file in files}
        exact = [f"{self.prefix}_{half}.h5" for half in ("train", "test")]
        if set(exact) <= set(names):
            return [names[name] for name in exact]
        # Both variants lie in one folder where TFF has downloaded them.
        other = [file for file in files if "digits" in file.name and self.labels == CLASSES]
        files = [file for file in files if file not in other]
        if other and not files:
            raise UserError(
                f"{other[0]} is the digits-only variant by its name; expected {exact[0]} and "
                f"{exact[1]}; use dataset=tff_digits, or give dataset.path=FILE one file"
            )
        halves = {
            half: [f for f in files if half in f.name.lower() and other not in f.name.lower()]
            for half, other in (("train", "test"), ("test", "train"))
        }
        if len(files) == 1 and not any(halves.values()):
            return files
        for half, found in halves.items():
            if len(found) > 1:
                raise UserError(
                    f"{found[0].name} and {found[1].name} in {root} are both the {half} half by "
                    f"their names; expected one, such as {self.prefix}_{half}.h5; take one away"
                )
            if not found:
                raise UserError(
                    f"{root} has no {half} half beside {files[0].name}; expected {exact[0]} and "
                    f"{exact[1]}; add the missing one, or use a file alone, without a split, with "
                    f"dataset.path={files[0]}"
                )
        return [file for (file,) in halves.values()]

    def _halves(self, files: list[Path], cache: Path, stack: ExitStack) -> list[Iterator["_Part"]]:
        """Return the halves, opened: each gives its writers in the order of their names."""
        file = files[0]
        if file.suffix.lower() in HDF5:
            opened = [(_hdf5_file(file, stack), file) for file in files]
            return [_hdf5(*half, half is opened[0], self.labels) for half in opened]
        database = file
        if file.suffix.lower() in PACKED:
            database = stack.enter_context(scratch_folder(cache, "tff")) / "unpacked.sqlite"
            _unpack(file, database)
        connection = _database(database, file, stack)
        counts = [_counts(connection, file, split) for split in self.splits]
        for split, count in zip(self.splits, counts, strict=True):
            if not count:
                raise UserError(
                    f"{file}: client_metadata has no writer of split {split}; expected the splits "
                    f"{self.splits[0]} and {self.splits[1]}; {AGAIN}"
                )
        return [
            _sqlite(connection, file, split, count, self.labels)
            for split, count in zip(self.splits, counts, strict=True)
        ]


@dataclass(frozen=True)
class TffDigits(Tff):
    """The digits of federated EMNIST as TensorFlow Federated publishes them, apart.

    Attributes:
        path: as of `Tff`; the database is the same one, the HDF5 files are others.
    """

    name = "tff_digits"
    variant = "TFF federated EMNIST, digits only"
    published = Published(writers=3_383, images=341_873 + 40_832)
    digits_only = True

    prefix = "fed_emnist_digitsonly"
    splits = ("digits_only_train", "digits_only_test")
    labels = 10


@dataclass(frozen=True)
class _Part:
    """What one half holds of a writer."""

    name: str
    is_train: bool
    images: Bytes
    labels: NDArray[Any]


def _called(files: list[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files of one form: those of EMNIST, should there be others beside them."""
    found = [file for file in files if file.suffix.lower() in suffixes]
    # TFF and Keras download all their datasets to one folder.
    return [file for file in found if "emnist" in file.name.lower()] or found


def _writers(halves: list[Iterator[_Part]]) -> Iterator[Handwriting]:
    # Of equal names, merge gives the train half's part first.
    parts = merge(*halves, key=attrgetter("name"))
    for place, (name, group) in enumerate(groupby(parts, key=attrgetter("name"))):
        found = list(group)
        number, subject_number = divmod(place, PER_NUMBER)
        train_examples = sum(len(part.labels) for part in found if part.is_train)
        yield Handwriting(
            name=name,
            number=number,
            subject_number=subject_number,
            images=np.concatenate([part.images for part in found]),
            labels=np.concatenate([part.labels for part in found]),
            train_examples=train_examples if len(halves) == 2 else None,
        )


def _part(
    where: str, name: str, is_train: bool, pixels: NDArray[Any], labels: NDArray[Any], classes: int
) -> _Part:
    """Return a writer's part, checked: `pixels` float `[n, 28, 28]` 0..1, `labels` integer `[n]`.

    Args:
        where: file and writer.
        name: of the writer.
        is_train: whether it is of the train half.
        pixels: as the file has them.
        labels: as the file has them.
        classes: how many labels there are.
    """
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        kinds = "digits only; dataset=tff has the letters" if classes == 10 else "0-9, A-Z, a-z"
        raise UserError(
            f"{where}: label {labels[at]} at image {at}; expected 0..{classes - 1} ({kinds}); "
            f"{AGAIN}"
        )
    inside = (pixels >= 0) & (pixels <= 1)
    if not inside.all():
        at, pixel = divmod(int(np.argmin(inside)), PIXELS)
        raise UserError(
            f"{where}: pixel {pixel} of image {at} is {pixels[at].flat[pixel]}; expected 0..1 with "
            "white paper 1; divide values of 0..255 by 255, undo any other normalisation"
        )
    return _Part(name, is_train, np.rint(pixels * 255).astype(np.uint8), labels)


def _named(file: Path, name: str) -> str:
    """Return where a writer stands, in words; a name of control characters would break the line."""
    if not name.isprintable():
        raise UserError(
            f"{file}: a writer is called '{printable(name)}'; expected a printable name such as "
            f"f0000_14; {AGAIN}"
        )
    return f"{file}: writer {name:.80}"


def _line(error: Exception) -> str:
    """Return what a library says, which may quote bytes of a broken file, as one line."""
    said = str(error)[:MOST_LINE_CHARACTERS]
    return "".join(letter if letter.isprintable() else "?" for letter in said)


@contextmanager
def _hdf5_of(file: Path) -> Iterator[None]:
    """Tell what h5py finds wrong with `file` in one line."""
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise unreadable(file, PermissionError(error.errno, "Permission denied")) from error
    except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
        raise UserError(
            f"{file}: not HDF5, or broken: {_line(error)}; expected a whole file of TFF's; {AGAIN}"
        ) from error


def _hdf5_file(file: Path, stack: ExitStack) -> h5py.File:
    with _hdf5_of(file):
        # Nobody writes to a published file, and some network folders cannot lock.
        return stack.enter_context(h5py.File(file, "r", locking=False))


def _hdf5(opened: h5py.File, file: Path, is_train: bool, classes: int) -> Iterator[_Part]:
    with _hdf5_of(file):
        examples = _member(opened, "examples", h5py.Group, str(file))
        names: dict[Any, str] = {}  # of each writer's group in the file
        images, most = 0, most_images([file])
        for name in sorted(map(os.fsdecode, examples)):  # h5py gives bytes where UTF-8 fails
            where = _named(file, name)
            writer = _member(examples, name, h5py.Group, where)
            _check_single(writer, names, where)
            pixels = _member(writer, "pixels", h5py.Dataset, where)
            labels = _member(writer, "label", h5py.Dataset, where)
            _check_single(pixels, names, where)
            n = len(labels) if labels.shape else 0
            for key, values, kinds, kind, shape in (
                ("label", labels, "iu", "int32", (n,)),
                ("pixels", pixels, "f", "float32", (n, 28, 28)),
            ):
                if values.dtype.kind not in kinds or values.shape != shape:
                    raise UserError(
                        f"{where}: {key} is {values.dtype} {values.shape}; expected {kind} "
                        f"{shape}, one entry an image; {AGAIN}"
                    )
                _check_size(values, f"{where}: {key}")
            images += n
            if images > most:
                raise UserError(
                    f"{where}: {images:,} images and more; expected at most {most:,} in a file of "
                    f"its size; {AGAIN}"
                )
            yield _part(where, name, is_train, pixels[:], labels[:], classes)


def _member(parent: h5py.Group, key: str, kind: type[h5py.HLObject], where: str) -> Any:
    """Return what stands in `parent` under `key`; a link that leads elsewhere is not followed."""
    link = parent.get(key, getlink=True)
    if link is None:
        raise UserError(f"{where}: no {key}; expected examples/WRITER/{{pixels,label}}; {AGAIN}")
    if not isinstance(link, h5py.HardLink):
        raise UserError(
            f"{where}: {key} is a link to {link.path!a}; expected the data themselves, in "
            f"this file; {AGAIN}"
        )
    member = parent[key]
    if not isinstance(member, kind):
        raise UserError(
            f"{where}: {key} is a {type(member).__name__}; expected a {kind.__name__}; {AGAIN}"
        )
    return member


def _check_single(member: h5py.HLObject, names: dict[Any, str], where: str) -> None:
    """Refuse what stands in the file once and is linked to under two names."""
    address = h5py.h5o.get_info(member.id).addr
    if (other := names.setdefault(address, where)) != where:
        raise UserError(
            f"{where}: {printable(member.name)} is the same data as of {other}; expected data of "
            f"its own for every writer; {AGAIN}"
        )


def _check_size(values: h5py.Dataset, where: str) -> None:
    """Refuse what is not in the file, or more than a file of this size can hold."""
    images = max(len(values), values.chunks[0] if values.chunks else 0)
    if images > MOST_IMAGES or math.prod(values.chunks or ()) > MOST_IMAGES * PIXELS:
        raise UserError(
            f"{where} is declared with {images:,} images; expected at most {MOST_IMAGES:,} of one "
            f"writer; {AGAIN}"
        )
    if values.external or values.is_virtual:
        raise UserError(
            f"{where} lies in other files; expected the data themselves, in this file; {AGAIN}"
        )
    if len(values) and not values.id.get_storage_size():
        raise UserError(f"{where} was never written; expected {len(values)} entries; {AGAIN}")


@contextmanager
def _sqlite_of(file: Path) -> Iterator[None]:
    """Tell what SQLite finds wrong with `file` in one line."""
    try:
        yield
    except (sqlite3.Error, UnicodeError) as error:  # the latter of names in what SQLite says
        raise UserError(
            f"{file}: not TFF's SQLite database, or broken: {_line(error)}; expected the tables "
            f"{TABLES}; {AGAIN}"
        ) from error


def _database(database: Path, file: Path, stack: ExitStack) -> sqlite3.Connection:
    try:
        database.open("rb").close()  # SQLite would not say why it cannot
    except OSError as error:
        raise unreadable(file, error) from error
    with _sqlite_of(file):
        # Immutable: nothing is locked, and nothing is written beside the file.
        address = f"file:{quote(os.fsencode(database))}?mode=ro&immutable=1"
        connection = stack.enter_context(closing(sqlite3.connect(address, uri=True)))
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BLOB)
        left = (FREE_INSTRUCTIONS + database.stat().st_size) // STEP

        def is_too_much() -> bool:
            nonlocal left
            left -= 1
            return left < 0

        connection.set_progress_handler(is_too_much, STEP)
        for table in ("client_metadata", "examples"):
            _check_table(connection, file, table)
        return connection


def _check_table(connection: sqlite3.Connection, file: Path, table: str) -> None:
    """Refuse what is computed rather than stored: a view may have rows without end."""
    kinds = connection.execute(
        "SELECT type, rootpage FROM sqlite_master WHERE name = ?", (table,)
    ).fetchall()
    for kind, page in kinds:
        computed = connection.execute(
            "SELECT count(*) FROM pragma_table_xinfo(?) WHERE hidden != 0", (table,)
        ).fetchone()[0]
        if kind != "table" or not page or computed:
            raise UserError(
                f"{file}: {table} is computed, not stored; expected the tables {TABLES}; {AGAIN}"
            )


def _counts(connection: sqlite3.Connection, file: Path, split: str) -> dict[str, int]:
    """Return how many images client_metadata says that each writer of `split` has."""
    counts: dict[str, int] = {}
    with _sqlite_of(file):
        for name, count in connection.execute(
            "SELECT client_id, num_examples FROM client_metadata WHERE split_name = ?", (split,)
        ):
            valid = isinstance(name, str) and isinstance(count, int) and 0 <= count <= MOST_IMAGES
            if not valid or name in counts:
                shown = f"has {count!a:.80} num_examples"
                problem = "stands there twice" if valid else shown
                raise UserError(
                    f"{file}: client_metadata, split {split}: client "
                    f"{name!a:.80} {problem}; expected "
                    f"every client once, by a name, with a number up to {MOST_IMAGES:,}; {AGAIN}"
                )
            counts[name] = count
    return counts


def _sqlite(
    connection: sqlite3.Connection, file: Path, split: str, counts: dict[str, int], classes: int
) -> Iterator[_Part]:
    rest = dict(counts)
    with _sqlite_of(file):
        # TFF's index is in this order; without one, SQLite sorts in a temporary file.
        rows = connection.execute(
            "SELECT client_id, serialized_example_proto FROM examples WHERE split_name = ? "
            "ORDER BY client_id, rowid",
            (split,),
        )
        for name, group in groupby(rows, key=itemgetter(0)):
            where = _named(file, str(name)) + f", split {split}"
            count = rest.pop(name, 0)
            images = [
                _example(text, where, at) for at, (_, text) in enumerate(islice(group, count + 1))
            ]
            if count != len(images):
                held = "more" if len(images) > count else len(images)
                raise UserError(
                    f"{where}: client_metadata says {count} num_examples but examples holds "
                    f"{held}; expected the same number; {AGAIN}"
                )
            pixels = np.frombuffer(b"".join(image for image, _ in images), "<f4")
            labels = np.array([label for _, label in images])
            is_train = split.endswith("train")
            yield _part(where, name, is_train, pixels.reshape(-1, 28, 28), labels, classes)
    for name, count in rest.items():
        if count:
            raise UserError(
                f"{_named(file, name)}, split {split}: client_metadata says {count} num_examples "
                f"but examples holds none; expected the same number; {AGAIN}"
            )


def _example(text: Any, where: str, at: int) -> tuple[bytes, int]:
    """Return an image's 784 floats, little-endian, and its label."""
    try:
        example = Example.FromString(text)
    except (DecodeError, TypeError) as error:
        raise UserError(
            f"{where}: image {at} is no tf.train.Example; expected one with pixels and label; "
            f"{AGAIN}"
        ) from error
    features = {entry.key: entry.value for entry in example.features.feature}
    for key in ("pixels", "label"):
        if key not in features:
            raise UserError(
                f"{where}: image {at} has no {key}, only {list(features)!a:.200}; expected the "
                f"features pixels and label; {AGAIN}"
            )
    pixels, label = features["pixels"].float_list.value, features["label"].int64_list.value
    if len(pixels) != 4 * PIXELS or len(label) != 1:
        raise UserError(
            f"{where}: image {at} has {len(pixels) / 4:g} floats in pixels and {len(label)} "
            f"integers in label; expected {PIXELS} (28 x 28) and 1; {AGAIN}"
        )
    return pixels, label[0]


def _message() -> Any:
    """Return the class of tf.train.Example, as far as TFF's EMNIST uses it.

    It is `tensorflow/core/example/{example,feature}.proto` (https://github.com/tensorflow), but for
    packed floats declared as the bytes that they are on the wire: NumPy takes all 784 at once.
    """
    kinds = descriptor_pb2.FieldDescriptorProto
    proto = descriptor_pb2.FileDescriptorProto(name="example.proto", syntax="proto3")
    # Message -> its fields: name, number, type, whether repeated.
    messages: dict[str, list[tuple[str, int, Any, bool]]] = {
        "FloatList": [("value", 1, kinds.TYPE_BYTES, False)],
        "Int64List": [("value", 1, kinds.TYPE_INT64, True)],
        "Feature": [("float_list", 2, "FloatList", False), ("int64_list", 3, "Int64List", False)],
        "Entry": [("key", 1, kinds.TYPE_STRING, False), ("value", 2, "Feature", False)],
        "Features": [("feature", 1, "Entry", True)],
        "Example": [("features", 1, "Features", False)],
    }
    for message, fields in messages.items():
        declared = proto.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            declared.field.add(
                name=name,
                number=number,
                label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL,
                type=kinds.TYPE_MESSAGE if isinstance(kind, str) else kind,
                type_name=kind if isinstance(kind, str) else None,
            )
    # A pool of its own: TensorFlow has its own tf.train.Example in the default one.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))


Example = _message()


def _unpack(packed: Path, database: Path) -> None:
    """Write what the LZMA file `packed` holds to the file `database`, piece by piece."""
    repair = f"{AGAIN}, or unpack it yourself (xz -d {packed.name})"
    most = min(MOST_UNPACKED, FREE_UNPACKED + MOST_RATIO * packed.stat().st_size)
    decompressor, size = lzma.LZMADecompressor(memlimit=MOST_MEMORY), 0
    try:
        source = packed.open("rb")
    except OSError as error:
        raise unreadable(packed, error) from error
    try:
        with source, database.open("wb") as target:
            while not decompressor.eof:
                text = source.read(CHUNK) if decompressor.needs_input else b""
                if decompressor.needs_input and not text:
                    raise UserError(
                        f"{packed}: the LZMA data are cut off after {source.tell():,} bytes; "
                        f"expected a whole file; {repair}"
                    )
                piece = decompressor.decompress(text, CHUNK)
                size += len(piece)
                if size > most:
                    raise UserError(
                        f"{packed} unpacks to more than {most:,} bytes; expected "
                        f"emnist_all.sqlite with about 4,700,000,000; {repair}"
                    )
                target.write(piece)
    except lzma.LZMAError as error:
        raise UserError(
            f"{packed}: not LZMA, or broken: {error}; expected emnist_all.sqlite.lzma as TFF "
            f"publishes it; {repair}"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot unpack {packed} to {database.parent.parent}: {error.strerror or error}; "
            "expected room for its 4.7 GB for a while; give another folder with cache=DIR, or "
            f"unpack it yourself (xz -d {packed.name})"
        ) from error

"""FEMNIST of Hugging Face, `flwrlabs/femnist`: Parquet files of one row an image.

Flower Labs, https://huggingface.co/datasets/flwrlabs/femnist, after Caldas et al., "LEAF: A
Benchmark for Federated Settings", 2018, https://arxiv.org/abs/1812.01097. `data/train-*.parquet` is
all there is, no test split. Files made elsewhere may have one: where the names of files, or of the
folders they lie in, say `train` and `test` (or `validation`), that split is kept. Read are the
columns

    image      struct with `bytes`: a PNG of 28 x 28 pixels
    writer_id  string, such as "f0000_14"
    character  integer: 0-9 digits, 10-35 A-Z, 36-61 a-z

and, where the schema's metadata has them under `huggingface`, the names of the characters. Nothing
is promised about the order of the rows; here the writers are sorted by `writer_id`.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from femfed import UserError, one_line, printable
from femfed.data.source import (
    Dataset,
    Published,
    files_in,
    folder_that_fits,
    inside,
    located,
    most_images,
    refuse_other_layout,
    stored_files,
    unreadable,
)
from femfed.data.store import CHARACTERS, CLASSES, Bytes, Handwriting, OnWriter, WriterStore, stored

REPOSITORY = "flwrlabs/femnist"
FILES = "data/*.parquet"
ENDS = (".parquet",)
TRAIN, TEST, VALIDATION = "train", "test", "validation"
SPLITS = {  # a word of a file's or a folder's name -> split
    "train": TRAIN,
    "test": TEST,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "dev": VALIDATION,
    "eval": VALIDATION,
}
TIMEOUT = 10  # seconds until an answer
AGAIN = f"download the file again from https://huggingface.co/datasets/{REPOSITORY}"
MOST_LINE_CHARACTERS = 300  # of what a library says
BATCH = 1024  # rows that are decoded at once
BATCH_BYTES = 1 << 28  # of them, unpacked
BUFFER = 1 << 20  # bytes of a column that are read at once, however large its row groups are
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
SIZE = (28).to_bytes(4, "big") * 2  # width and height follow at once
MOST_PNG_BYTES = 1 << 16  # of an image, where the hub's have some hundreds
FREE_BYTES = 1 << 26  # that a column of a file of any size may unpack to
MOST_UNPACKED = 64  # bytes for every byte of the file, beyond those

Halves = list[list[Path]]  # the files, or those of the train split and those held out
Batches = Iterator[tuple[Bytes, Bytes]]


@dataclass(frozen=True)
class Femnist(Dataset):
    """FEMNIST as Flower publishes it on Hugging Face, downloaded or in files the user has.

    Attributes:
        path: a folder of Parquet files, one above it, or one file; null takes them from the cache
            of the hub's library or downloads them (200 MB), once.
    """

    path: str | None

    name = "femnist"
    variant = f"Hugging Face {REPOSITORY}"
    published = Published(writers=3_597, images=814_277)

    def convert(self, cache: Path, writers: int, on_writer: OnWriter | None = None) -> WriterStore:
        """Return the store of all rows; all their writers are in it, however many are wanted.

        Raises:
            UserError: a library is missing, the download fails, or a file is not what it should be.
        """
        source: dict[str, Any]
        if self.path is None:
            source = {"dataset": self.name, "repository": REPOSITORY}
            return stored(cache, source, lambda: _writers(_published(), cache), on_writer)
        root = located(self.path, self.name, "the folder that holds the dataset's *.parquet files")
        halves = _find(root)
        files = [file for half in halves for file in half]
        source = {"dataset": self.name}
        return stored_files(cache, source, root, files, lambda: _writers(halves, cache), on_writer)


def _find(root: Path) -> Halves:
    """Return the Parquet files at `root`, in it or below it, by their splits, sorted by name."""
    if not root.is_dir():
        refuse_other_layout(root, ENDS)
        return [[root]]
    try:
        folder = _snapshot(root) or root
        found = folder_that_fits(
            folder / "data" if _parquets(folder / "data") else folder,
            lambda at: bool(_parquets(at)),
        )
    except OSError as error:
        raise unreadable(root, error) from error
    if found is None:
        raise UserError(
            f"no Parquet files in {root}; expected files such as train-00000-of-00001.parquet; "
            f"give dataset.path=DIR the folder that holds {FILES} of {REPOSITORY}"
            f"{inside(root, ENDS)}"
        )
    return _halves(found, _parquets(found))


def _snapshot(root: Path) -> Path | None:
    """Return the newest folder with all files, where `root` is a repository in the hub's cache."""
    if not (root / "snapshots").is_dir():
        return None
    folders = [folder for folder in (root / "snapshots").iterdir() if _is_complete(folder)]
    try:
        main = (root / "refs" / "main").read_text().strip()
    except (OSError, UnicodeError):
        main = ""  # fetched by its revision
    return max(
        folders, key=lambda folder: (folder.name == main, folder.stat().st_mtime), default=None
    )


def _is_complete(folder: Path) -> bool:
    """Whether there are files, and those that their names `-00000-of-00002` promise."""
    names = {file.name for file in _parquets(folder / "data")}
    parts = (re.fullmatch(r"(.*?)[0-9]{5}-of-([0-9]{5})\.parquet", name) for name in names)
    expected = (
        f"{part[1]}{number:05}-of-{part[2]}.parquet"
        for part in parts
        if part
        for number in range(int(part[2]))
    )
    return bool(names) and all(name in names for name in expected)


def _parquets(folder: Path) -> list[Path]:
    """Return the Parquet files in `folder`, or else in its folders of splits."""
    if not folder.is_dir():
        return []
    if files := files_in(folder, ENDS):
        return files
    parts = sorted(part for part in folder.iterdir() if part.name.lower() in SPLITS)
    return [file for part in parts if part.is_dir() for file in files_in(part, ENDS)]


def _split_of(name: str) -> str | None:
    """Return the split that a path says it is of; None if it says none or two."""
    found = {SPLITS[word] for word in re.findall(r"[a-z]+", name.lower()) if word in SPLITS}
    return found.pop() if len(found) == 1 else None


def _halves(folder: Path, files: list[Path]) -> Halves:
    """Return the files of the train split and the files held out; all of them if there is no split.

    Raises:
        UserError: files are of more than two splits, or some are of none.
    """
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(str(file.relative_to(folder))), []).append(file)
    if len(splits) == 1 or splits.keys() == {TRAIN, None}:
        return [files]
    if len(splits) == 2 and splits.keys() >= {TRAIN} and None not in splits:
        return [splits.pop(TRAIN), *splits.values()]
    shown = ", ".join(
        f"{printable(part[0].relative_to(folder))} ({split or 'no split by its name'})"
        for split, part in splits.items()
    )
    raise UserError(
        f"{folder} holds files of several splits: {shown}; expected files of train and of one "
        "held-out split, so that no held-out image is trained on; take the others away"
    )


def _published() -> Halves:
    """Return the published files, from the library's cache of the hub or from the hub."""
    for needed in ("pyarrow.parquet", "PIL.Image"):
        _library(needed)  # a missing one is told before 200 MB have come
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    hub = _library("huggingface_hub")
    try:
        return _find(_cached(hub) or _downloaded(hub))
    except UserError:
        raise
    except Exception as error:  # of the library, its HTTP client or the disk: no common class
        raise UserError(
            f"cannot download {REPOSITORY} from Hugging Face: {type(error).__name__}: "
            f"{_line(error)}; expected a connection to https://huggingface.co; connect and run "
            f"again, or fetch {FILES} of that repository elsewhere and give dataset.path=DIR"
        ) from error


def _cached(hub: Any) -> Path | None:
    """Return the folder in the library's cache, if all published files are in it."""
    try:
        root = Path(import_module(f"{hub.__name__}.constants").HF_HUB_CACHE)
    except (ImportError, AttributeError):  # of another version
        return None
    return _snapshot(root / f"datasets--{REPOSITORY.replace('/', '--')}")


def _downloaded(hub: Any) -> Path:
    """Return the folder that the published files were downloaded to."""
    # Asked first, because the library itself would wait for a silent network forever. The dataset
    # is public, so that the user's token stays at home.
    found = hub.HfApi(token=False).dataset_info(REPOSITORY, timeout=TIMEOUT)
    # Parquet and nothing else: no code of the repository is fetched or run.
    return Path(
        hub.snapshot_download(
            REPOSITORY,
            repo_type="dataset",
            revision=found.sha,
            allow_patterns=FILES,
            token=False,
        )
    )


def _library(name: str) -> Any:
    """Return the module `name` of a library that is not installed unless asked for."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"dataset=femnist cannot import {name} ({_line(error)}); expected the libraries of "
            'femfed[hub]; run pip install -e ".[hub]", or use data that needs none: '
            "dataset=leaf dataset.path=DIR"
        ) from error


def _line(error: Exception) -> str:
    """Return the first line of what `error` says."""
    line = next(iter(str(error).strip().splitlines()), "no reason given").rstrip(".;")
    return one_line(line[:MOST_LINE_CHARACTERS])


def _writers(halves: Halves, cache: Path) -> Iterator[Handwriting]:
    files = [file for half in halves for file in half]
    names, owners, train_rows = _owners(files, len(halves[0]))
    counts = np.bincount(owners)
    train = np.bincount(owners[:train_rows], minlength=len(names))
    batches = _batches(files)
    if (owners[1:] >= owners[:-1]).all():
        writers = _in_order(batches, counts)
    else:
        writers = _regrouped(batches, owners, counts, cache)
    for place, (name, (images, labels)) in enumerate(zip(names, writers, strict=True)):
        number, subject_number = divmod(place, 100)
        train_examples = int(train[place]) if len(halves) == 2 else None
        # A stable sort by writer leaves the rows of the train split in front.
        yield Handwriting(name, number, subject_number, images, labels, train_examples)


def _owners(files: list[Path], train_files: int) -> tuple[list[str], NDArray[np.int32], int]:
    """Return the writers' names, sorted, each row's place among them, and how many rows train."""
    codes: dict[str, int] = {}
    rows, train_rows = list[NDArray[np.int32]](), 0
    for place, file in enumerate(files):
        for row, table in _tables(file, ["writer_id"]):
            column = _whole(table.column(0), f"{file}: row", row, "writer_id").dictionary_encode()
            known = [codes.setdefault(name, len(codes)) for name in column.dictionary.to_pylist()]
            rows.append(np.array(known, np.int32)[column.indices.to_numpy()])
            train_rows += len(rows[-1]) if place < train_files else 0
    if not rows:
        raise UserError(f"{files[0]}: no rows; expected one an image; {AGAIN}")
    names = sorted(codes)
    places = np.empty(len(names), np.int32)
    places[[codes[name] for name in names]] = np.arange(len(names))
    return names, places[np.concatenate(rows)], train_rows


def _in_order(batches: Batches, counts: NDArray[np.int64]) -> Iterator[tuple[Bytes, Bytes]]:
    """Yield every writer's images and labels from rows that are sorted by writer."""
    images, labels = np.empty((0, 28, 28), np.uint8), np.empty(0, np.uint8)
    for count in counts:
        parts, held = [(images, labels)], len(labels)
        while held < count:
            parts.append(next(batches))
            held += len(parts[-1][1])
        images = np.concatenate([part for part, _ in parts])
        labels = np.concatenate([part for _, part in parts])
        yield images[:count], labels[:count]
        images, labels = images[count:], labels[count:]


def _regrouped(
    batches: Batches, owners: NDArray[np.int32], counts: NDArray[np.int64], cache: Path
) -> Iterator[tuple[Bytes, Bytes]]:
    """Yield every writer's images and labels from rows in any order, by way of a scratch file."""
    labels = np.empty(len(owners), np.uint8)
    order = np.argsort(owners, kind="stable")
    done = 0
    try:
        # The file has no name: it is gone when it is closed, even if the process is killed.
        with tempfile.TemporaryFile(dir=cache) as scratch:
            for images, part in batches:
                scratch.write(images.data)
                labels[done : done + len(part)] = part
                done += len(part)
            scratch.flush()
            for rows in np.split(order, np.cumsum(counts)[:-1]):
                # Mapped anew for every writer, so that pages do not pile up in this process.
                mapped = np.memmap(scratch, np.uint8, "r", shape=(done, 28, 28))
                yield mapped[rows], labels[rows]
    except OSError as error:
        raise UserError(
            f"cannot keep {784 * len(owners) / 1e6:.0f} MB of images in the dataset cache {cache} "
            f"while they are sorted by writer: {error.strerror}; expected space for twice that; "
            "make room or give another folder with cache=DIR"
        ) from error


def _batches(files: list[Path]) -> Batches:
    """Yield the images, on white paper, and labels of all rows in their order."""
    inverted: bool | None = None
    for file in files:
        for row, table in _tables(file, ["image.bytes", "character"]):
            where = f"{file}: row"
            labels = _whole(table.column("character"), where, row, "character").to_numpy()
            outside = np.flatnonzero((labels < 0) | (labels >= CLASSES))
            if outside.size:
                at = int(outside[0])
                raise UserError(
                    f"{where} {row + at}: character {labels[at]}; expected 0..{CLASSES - 1} "
                    f"(0-9, A-Z, a-z); {AGAIN}"
                )
            # Flattening a struct gives what is in it, null where the struct itself is.
            (pictures,) = table.column("image").flatten()
            pictures = _whole(pictures, where, row, "image.bytes")
            _check_lengths(pictures, where, row)
            images = _decoded(pictures.to_pylist(), where, row)
            if inverted is None:
                # The publisher does not say which it is; there is always far more paper than ink.
                inverted = bool(images.mean() < 127.5)
            yield (255 - images if inverted else images), labels.astype(np.uint8)


def _check_lengths(pictures: Any, where: str, row: int) -> None:
    """Refuse an image that is far too long, before a copy of it is made for every row."""
    lengths = _library("pyarrow.compute").binary_length(pictures).to_numpy()
    long = np.flatnonzero(lengths > MOST_PNG_BYTES)
    if long.size:
        raise UserError(
            f"{where} {row + int(long[0])}: the image has more than {MOST_PNG_BYTES:,} bytes; "
            f"expected a grey PNG of 28 x 28; {AGAIN}"
        )


def _whole(column: Any, where: str, row: int, name: str) -> Any:
    """Return `column`, which begins at `row`, if no value of it is missing."""
    if column.null_count:
        at = row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise UserError(f"{where} {at}: no {name} (null); expected a value in every row; {AGAIN}")
    return column


def _tables(file: Path, columns: list[str]) -> Iterator[tuple[int, Any]]:
    """Yield the first row and the record batch of every `BATCH` rows of a file."""
    pyarrow, parquet = _library("pyarrow"), _library("pyarrow.parquet")
    row = 0
    try:
        with parquet.ParquetFile(file) as opened:
            _check_schema(file, opened.schema_arrow)
            largest = _check_size(file, opened.metadata)
        # Buffered ahead, all that was read would be kept to the end. As a dictionary, a name that
        # repeats is not unpacked for every row.
        with parquet.ParquetFile(
            file,
            buffer_size=BUFFER,
            pre_buffer=False,
            read_dictionary=["writer_id"],
        ) as opened:
            rows = min(BATCH, max(1, BATCH_BYTES // largest))
            for batch in opened.iter_batches(rows, columns=columns):
                batch.validate(full=True)  # else text that is not UTF-8 would come through
                yield row, batch
                row += len(batch)
        if row != opened.metadata.num_rows:
            raise UserError(
                f"{file}: {row} rows of {', '.join(columns)}, where the file says "
                f"{opened.metadata.num_rows}; expected as many; {AGAIN}"
            )
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{file}: cannot be read as Parquet: {_line(error)}; expected a whole Parquet file; "
            f"{AGAIN}"
        ) from error


def _check_size(file: Path, about: Any) -> int:
    """Refuse what unpacks to far more than handwriting does; return what one image may take.

    Values that repeat stand once, in a column's dictionary, and unpack to as many copies as there
    are rows: of the images, nothing but the dictionary's size is known before.
    """
    largest = 1
    if about.num_rows > (most := most_images([file])):
        raise UserError(
            f"{file}: {about.num_rows:,} rows; expected at most {most:,} in a file of its size; "
            f"{AGAIN}"
        )
    most = FREE_BYTES + MOST_UNPACKED * file.stat().st_size
    for group in range(about.num_row_groups):
        for place in range(about.num_columns):
            column = about.row_group(group).column(place)
            if column.total_uncompressed_size > most:
                raise UserError(
                    f"{file}: column {printable(column.path_in_schema)} unpacks to "
                    f"{column.total_uncompressed_size:,} bytes; expected at most {most:,} in a "
                    f"file of its size; {AGAIN}"
                )
            if column.path_in_schema == "image.bytes" and column.has_dictionary_page:
                largest = max(largest, _page_bytes(file, column.dictionary_page_offset))
    return largest


def _page_bytes(file: Path, offset: int) -> int:
    """Return the unpacked size of the page that begins at `offset`, as its header says.

    It is the second field of a header in Thrift's compact protocol, a zigzag varint.
    https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
    """
    with file.open("rb") as stream:
        stream.seek(offset)
        head = stream.read(16)
    numbers, at = list[int](), 0
    while len(numbers) < 2 and head[at : at + 1] == b"\x15":  # a 32-bit integer follows
        value, shift = 0, 0
        for byte in head[at + 1 :]:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        numbers.append(value >> 1)
        at += 1 + shift // 7
    if len(numbers) < 2:
        raise UserError(
            f"{file}: no page begins at byte {offset}; expected a whole Parquet file; {AGAIN}"
        )
    return max(1, numbers[1])


def _check_schema(file: Path, schema: Any) -> None:
    types = _library("pyarrow.types")

    def valued(kind: Any) -> Any:
        return kind.value_type if types.is_dictionary(kind) else kind

    for name, fits, expected in (
        (
            "writer_id",
            lambda kind: types.is_string(valued(kind)) or types.is_large_string(valued(kind)),
            "a string",
        ),
        ("character", types.is_integer, "an integer"),
        (
            "image",
            lambda kind: (
                types.is_struct(kind)
                and kind.get_field_index("bytes") >= 0
                and (
                    types.is_binary(kind.field("bytes").type)
                    or types.is_large_binary(kind.field("bytes").type)
                )
            ),
            "a struct whose `bytes` are a PNG",
        ),
    ):
        if schema.get_field_index(name) < 0:
            held = printable(", ".join(schema.names), MOST_LINE_CHARACTERS) or "none"
            raise UserError(
                f"{file}: no column {name} among its columns ({held}); expected image, writer_id "
                f"and character, once each; {AGAIN}"
            )
        kind = schema.field(name).type
        if not fits(kind):
            raise UserError(
                f"{file}: column {name} is {one_line(str(kind)[:MOST_LINE_CHARACTERS])}; expected "
                f"{expected}; {AGAIN}"
            )
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        characters = features["character"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return  # written without the library that names them
    if characters != list(CHARACTERS):
        raise UserError(
            f"{file}: the characters are named {str(characters)[:60]}...; expected 0-9, A-Z, a-z "
            f"in this order; {AGAIN}"
        )


def _decoded(pictures: list[bytes], where: str, row: int) -> Bytes:
    """Return the PNG `pictures` as `[n, 28, 28]` uint8 grey values; the first stands at `row`."""
    image = _library("PIL.Image")
    pixels = []
    for at, picture in enumerate(pictures, row):
        problem = None
        # Looked at before Pillow does, so that nothing large is ever unpacked.
        if not picture.startswith(PNG):
            problem = f"begins with {picture[:8]!r} and is not a PNG"
        elif picture[16:24] != SIZE:
            width, height = (int.from_bytes(picture[side : side + 4]) for side in (16, 20))
            problem = f"has {width} x {height} pixels"
        else:
            try:
                with image.open(BytesIO(picture), formats=["PNG"]) as opened:
                    if opened.size != (28, 28):  # a PNG may contradict its own header
                        problem = f"has {opened.size[0]} x {opened.size[1]} pixels"
                    elif opened.mode not in ("L", "1", "RGB"):
                        problem = f"is of Pillow's mode {opened.mode}, not 8-bit grey"
                    else:
                        grey = opened if opened.mode == "L" else opened.convert("L")
                        pixels.append(grey.tobytes())
            except Exception as error:  # Pillow's readers raise whatever their parts raise
                problem = f"is a broken PNG: {_line(error)}"
        if problem:
            raise UserError(
                f"{where} {at}: the image {problem}; expected a grey PNG of 28 x 28; {AGAIN}"
            )
    return np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, 28, 28)

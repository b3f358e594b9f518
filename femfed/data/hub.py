"""FEMNIST of Hugging Face, `flwrlabs/femnist`: Parquet files of one row an image.

Flower Labs, https://huggingface.co/datasets/flwrlabs/femnist, after Caldas et al., "LEAF: A
Benchmark for Federated Settings", 2018, https://arxiv.org/abs/1812.01097. `data/train-*.parquet` is
all there is, no test split. Read of it are the columns

    image      struct with `bytes`: a PNG of 28 x 28 pixels
    writer_id  string, such as "f0000_14"
    character  integer: 0-9 digits, 10-35 A-Z, 36-61 a-z

and, where the schema's metadata has them under `huggingface`, the names of the characters. Nothing
is promised about the order of the rows; here the writers are sorted by `writer_id`.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.data.source import Dataset, Published, fingerprint, located, unreadable
from femfed.data.store import CHARACTERS, CLASSES, Bytes, Handwriting, OnWriter, WriterStore, stored

REPOSITORY = "flwrlabs/femnist"
FILES = "data/*.parquet"
TIMEOUT = 10  # seconds until an answer
AGAIN = f"download the file again from https://huggingface.co/datasets/{REPOSITORY}"
BATCH = 1024  # rows that are decoded at once
BUFFER = 1 << 20  # bytes of a column that are read at once, however large its row groups are
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
SIZE = (28).to_bytes(4, "big") * 2  # width and height follow at once

Batches = Iterator[tuple[Bytes, Bytes]]


@dataclass(frozen=True)
class Femnist(Dataset):
    """FEMNIST as Flower publishes it on Hugging Face, downloaded or in files the user has.

    Attributes:
        path: a folder of Parquet files, one that has them in `data/`, or one file; null downloads
            them (200 MB), once.
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
            return stored(cache, source, lambda: _writers(_downloaded(), cache), on_writer)
        root = located(self.path, self.name, "the folder that holds the dataset's *.parquet files")
        files = _find(root)
        source = {
            "dataset": self.name,
            "path": str(root),
            "files": fingerprint(root, files),
        }
        return stored(cache, source, lambda: _writers(files, cache), on_writer)


def _find(root: Path) -> list[Path]:
    """Return the Parquet files at `root`, in it, or in its folder `data`, sorted by name."""
    if root.is_file():
        return [root]
    try:
        for folder in (root, root / "data"):
            found = folder.iterdir() if folder.is_dir() else ()
            # macOS leaves a hidden "._NAME.parquet" beside every NAME.parquet it packs or copies.
            files = [
                file
                for file in found
                if file.suffix == ".parquet" and file.is_file() and not file.name.startswith(".")
            ]
            if files:
                return sorted(files)
    except OSError as error:
        raise unreadable(root, error) from error
    raise UserError(
        f"no Parquet files in {root}; expected files such as train-00000-of-00001.parquet; give "
        f"dataset.path=DIR the folder that holds {FILES} of {REPOSITORY}"
    )


def _downloaded() -> list[Path]:
    """Return the published files, from the hub or from the library's cache of it."""
    for needed in ("pyarrow.parquet", "PIL.Image"):
        _library(needed)  # a missing one is told before 200 MB have come
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    hub = _library("huggingface_hub")
    try:
        # Asked first, because the library itself would wait for a silent network forever. The
        # dataset is public, so that the user's token stays at home.
        found = hub.HfApi(token=False).dataset_info(REPOSITORY, timeout=TIMEOUT)
        # Parquet and nothing else: no code of the repository is fetched or run.
        folder = hub.snapshot_download(
            REPOSITORY,
            repo_type="dataset",
            revision=found.sha,
            allow_patterns=FILES,
            token=False,
        )
    except Exception as error:  # of the library, its HTTP client or the disk: no common class
        raise UserError(
            f"cannot download {REPOSITORY} from Hugging Face: {type(error).__name__}: "
            f"{_line(error)}; expected a connection to https://huggingface.co; connect and run "
            f"again, or fetch {FILES} of that repository elsewhere and give dataset.path=DIR"
        ) from error
    return _find(Path(folder))


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
    return next(iter(str(error).strip().splitlines()), "no reason given").rstrip(".;")


def _writers(files: list[Path], cache: Path) -> Iterator[Handwriting]:
    names, owners = _owners(files)
    counts = np.bincount(owners)
    batches = _batches(files)
    if (owners[1:] >= owners[:-1]).all():
        writers = _in_order(batches, counts)
    else:
        writers = _regrouped(batches, owners, counts, cache)
    for place, (name, (images, labels)) in enumerate(zip(names, writers, strict=True)):
        number, subject_number = divmod(place, 100)
        yield Handwriting(name, number, subject_number, images, labels)


def _owners(files: list[Path]) -> tuple[list[str], NDArray[np.int32]]:
    """Return the writers' names, sorted, and each row's place among them."""
    codes: dict[str, int] = {}
    rows = []
    for file in files:
        for row, table in _tables(file, ["writer_id"]):
            column = _whole(table.column(0), f"{file}: row", row, "writer_id").dictionary_encode()
            known = [codes.setdefault(name, len(codes)) for name in column.dictionary.to_pylist()]
            rows.append(np.array(known, np.int32)[column.indices.to_numpy()])
    if not rows:
        raise UserError(f"{files[0]}: no rows; expected one an image; {AGAIN}")
    names = sorted(codes)
    places = np.empty(len(names), np.int32)
    places[[codes[name] for name in names]] = np.arange(len(names))
    return names, places[np.concatenate(rows)]


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
            images = _decoded(_whole(pictures, where, row, "image.bytes").to_pylist(), where, row)
            if inverted is None:
                # The publisher does not say which it is; there is always far more paper than ink.
                inverted = bool(images.mean() < 127.5)
            yield (255 - images if inverted else images), labels.astype(np.uint8)


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
        # Buffered ahead, all that was read would be kept to the end.
        with parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False) as opened:
            _check_schema(file, opened.schema_arrow)
            for batch in opened.iter_batches(BATCH, columns=columns):
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


def _check_schema(file: Path, schema: Any) -> None:
    types = _library("pyarrow.types")
    for name, fits, expected in (
        (
            "writer_id",
            lambda kind: types.is_string(kind) or types.is_large_string(kind),
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
            held = ", ".join(schema.names) or "none"
            raise UserError(
                f"{file}: no column {name} among its columns ({held}); expected image, writer_id "
                f"and character, once each; {AGAIN}"
            )
        kind = schema.field(name).type
        if not fits(kind):
            raise UserError(f"{file}: column {name} is {kind}; expected {expected}; {AGAIN}")
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

"""FedScale's FEMNIST: PNG files, and csv tables that say whose they are.

Lai et al., "FedScale: Benchmarking Model and System Performance of Federated Learning at Scale",
ICML 2022, https://arxiv.org/abs/2105.11367, downloaded by https://github.com/SymbioticLab/FedScale
(`benchmark/dataset/download.sh download femnist`) and read by its `dataloaders/femnist.py`. The
folder holds `client_data_mapping/{train,val,test}.csv` of

    client_id,sample_path,label_name,label_id
    0,data/raw_data/by_write/hsf_0/f0388_26/u0388_26/u0388_26_00004.png,...,6

where `sample_path` starts at the folder, and whose clients differ: those of `train.csv` train. The
paper is white, the ink dark. Images of 28 x 28 are kept as they are; NIST's originals of 128 x 128
are scaled as FedScale's loader does (`Resize((28, 28))`, bilinear). `label_name` is not read.
"""

import csv
import hashlib
import io
import os
import stat
import warnings
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from femfed import UserError
from femfed.data.source import (
    Dataset,
    Published,
    folder_that_fits,
    inside,
    located,
    other_layout,
    stored_files,
    unreadable,
)
from femfed.data.store import CLASSES, Bytes, Handwriting, OnWriter, WriterStore

HELD_OUT = ("test", "val")
COLUMNS = ("client_id", "sample_path", "label_id")
LABELS = {str(label): label for label in range(CLASSES)}
SIZES = ((28, 28), (128, 128))
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
LONGEST_LINE = 65_536  # bytes; a broken csv may be one line of any length
LARGEST_FILE = 1 << 20  # bytes; a PNG of 128 x 128 pixels has below 70,000
UNPACK_AGAIN = "unpack FedScale's femnist.tar.gz again"


@dataclass(frozen=True)
class FedScale(Dataset):
    """FEMNIST as FedScale publishes it, in a folder the user has.

    Attributes:
        path: the folder that holds `client_data_mapping/` and the images.
        held_out: whose clients never train: those of `test` or of `val`; none where there is no
            such csv.
    """

    path: str | None
    held_out: str

    name = "fedscale"
    variant = "FedScale FEMNIST"
    published = Published(writers=2_800, images=637_877)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out not in HELD_OUT:
            raise UserError(
                f"dataset.held_out={self.held_out}; expected {' or '.join(HELD_OUT)}, whose "
                "clients never train"
            )

    def convert(self, cache: Path, writers: int, on_writer: OnWriter | None = None) -> WriterStore:
        """Return the store of the train and held-out clients, however many writers are wanted.

        They are read only if no store was made of them yet, or if a csv's size or time has changed
        since; the images themselves, more than half a million, are not looked at again.

        Raises:
            UserError: the path, a csv or an image is not what FedScale publishes.
        """
        root = located(
            self.path, self.name, "the folder that holds FedScale's client_data_mapping/"
        )
        try:
            if root.is_dir():
                root = folder_that_fits(root, _fits) or root
        except OSError as error:
            raise unreadable(root, error) from error
        tables = _find(root, self.held_out)
        files = list(tables.values())
        source = {"dataset": self.name, "held_out": self.held_out}
        return stored_files(cache, source, root, files, lambda: _writers(root, tables), on_writer)


def _fits(root: Path) -> bool:
    return (root / "client_data_mapping" / "train.csv").is_file()


@dataclass(frozen=True)
class _Header:
    """Where a csv has the cells that are read."""

    file: Path
    cells: int
    columns: tuple[int, ...]

    def row(self, number: int, line: bytes) -> tuple[str, str, int] | None:
        """Return client, path and label of a line; None of an empty one."""
        cells = _cells(self.file, number, line)
        if not cells:
            return None
        if len(cells) != self.cells:
            raise UserError(
                f"{self.file}: line {number} has {len(cells)} cells; expected {self.cells}, as in "
                f"the header; {UNPACK_AGAIN}"
            )
        client, path, label = (cells[column].strip() for column in self.columns)
        for name, cell in (("client_id", client), ("sample_path", path)):
            if not cell or not cell.isprintable():
                raise UserError(
                    f"{self.file}: line {number}: {name} is {_short(cell)}; expected a name of "
                    f"letters and digits; {UNPACK_AGAIN}"
                )
        label = label.removesuffix(".0")  # some write 3.0
        if label not in LABELS:
            raise UserError(
                f"{self.file}: line {number}, client {client:.60}: label_id is {_short(label)}; "
                f"expected 0..{CLASSES - 1} (0-9, A-Z, a-z); {UNPACK_AGAIN}"
            )
        return client, path, LABELS[label]


def _find(root: Path, held_out: str) -> dict[str, Path]:
    """Return the csv of each split below `root`, the train clients' first."""
    tables = {}
    for split in ("train", held_out):
        file = root / "client_data_mapping" / f"{split}.csv"
        try:
            mode = file.stat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            if split != "train":
                continue
            other = inside(root, ()) if root.is_dir() else ""
            if not root.is_dir() and (said := other_layout(root, ())):
                other = f"; it is {said}"
            raise UserError(
                f"{root} holds no client_data_mapping/train.csv; expected the folder that FedScale "
                f"downloads, femnist/; correct dataset.path=PATH{other}"
            ) from error
        except OSError as error:
            raise unreadable(file, error) from error
        if not stat.S_ISREG(mode):
            raise UserError(f"{file} is not a file; expected a csv table; {UNPACK_AGAIN}")
        tables[split] = file
    return tables


def _writers(root: Path, tables: dict[str, Path]) -> Iterator[Handwriting]:
    place = 0
    trained = np.empty(0, np.uint64)
    for split, file in tables.items():
        try:
            with file.open("rb") as stream:
                header = _header(file, stream)
                clients, paths = _clients(header, stream)
                if split == "train":
                    trained = paths
                elif (both := np.isin(paths, trained)).any():
                    raise UserError(
                        f"{file}: {int(both.sum()):,} of its {len(paths):,} images stand in "
                        f"{tables['train'].name} too; expected images of their own, so that no "
                        f"image is trained on and held out; {UNPACK_AGAIN}, or take {file.name} "
                        "away"
                    )
                for client, rows in clients.items():
                    images, labels = _samples(root, header, stream, client, rows)
                    number, subject_number = divmod(place, 100)
                    yield Handwriting(
                        name=f"{split}_{client}",
                        number=number,
                        subject_number=subject_number,
                        images=images,
                        labels=labels,
                        apart=split != "train",
                    )
                    place += 1
        except OSError as error:
            raise unreadable(file, error) from error


def _header(file: Path, stream: BinaryIO) -> _Header:
    names = [cell.strip() for cell in _cells(file, 1, _line(stream))]
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise UserError(
            f"{file}: line 1 has no column {', '.join(missing)}: {_short(','.join(names))}; "
            f"expected the header client_id,sample_path,label_name,label_id; {UNPACK_AGAIN}"
        )
    return _Header(file, len(names), tuple(names.index(name) for name in COLUMNS))


def _clients(
    header: _Header, stream: BinaryIO
) -> tuple[dict[str, "array[int]"], NDArray[np.uint64]]:
    """Return offset and number of every line of each client, and a hash of every line's path.

    The clients keep their order. A client's rows need not stand together, and half a million paths
    would fill the memory.
    """
    clients: dict[str, array[int]] = {}
    paths = bytearray()
    number, offset = 1, stream.tell()
    while line := _line(stream):
        number += 1
        row = header.row(number, line)
        if row:
            clients.setdefault(row[0], array("q")).extend((offset, number))
            path = os.path.normpath(row[1]).encode(errors="surrogateescape")
            paths += hashlib.blake2b(path, digest_size=8).digest()
        offset += len(line)
    if not clients:
        raise UserError(
            f"{header.file} has a header and no rows; expected a row for every image; "
            f"{UNPACK_AGAIN}"
        )
    return clients, np.frombuffer(paths, np.uint64)


def _line(stream: BinaryIO) -> bytes:
    return stream.readline(LONGEST_LINE + 1)


def _cells(file: Path, number: int, line: bytes) -> list[str]:
    if len(line) > LONGEST_LINE:
        raise UserError(
            f"{file}: line {number} is longer than {LONGEST_LINE:,} bytes; expected a csv table "
            f"with a line for every image; {UNPACK_AGAIN}"
        )
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        return next(csv.reader((text,), strict=True), [])
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: line {number} is not UTF-8 at byte {error.start}: {error.reason}; expected a "
            f"csv table in UTF-8; {UNPACK_AGAIN}"
        ) from error
    except csv.Error as error:
        raise UserError(
            f"{file}: line {number} is not csv: {error}; expected cells with commas between them; "
            f"{UNPACK_AGAIN}"
        ) from error


def _samples(
    root: Path, header: _Header, stream: BinaryIO, client: str, rows: "array[int]"
) -> tuple[Bytes, Bytes]:
    """Return the images `[n, 28, 28]` and labels `[n]` of a client, in the order of its rows."""
    pixels: list[bytes] = []
    labels = bytearray()
    folders: dict[Path, bool] = {}  # whether they lie below root: resolving takes long
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what Pillow warns of is no image of FedScale's
        for offset, number in zip(rows[::2], rows[1::2], strict=True):
            stream.seek(offset)
            row = header.row(number, _line(stream))
            where = f"{header.file}: line {number}, client {client:.60}"
            if not row or row[0] != client:
                raise UserError(
                    f"{where}: the line has changed while it was read; expected files that stay as "
                    "they are; start again"
                )
            pixels.append(_pixels(_read(root, row[1], where, folders), row[1], where))
            labels.append(row[2])
    images = np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, 28, 28)
    return images, np.frombuffer(labels, np.uint8)


def _read(root: Path, path: str, where: str, folders: dict[Path, bool]) -> bytes:
    """Return the bytes of the file at `path`, which must lie below `root`."""
    file = root / path
    folder = file.parent
    try:
        if folder not in folders:
            folders[folder] = folder.resolve().is_relative_to(root)
        inside, status = folders[folder], file.lstat()
        if inside and stat.S_ISLNK(status.st_mode):
            inside, status = file.resolve().is_relative_to(root), file.stat()
        if not inside:
            how = "copy what it links to (cp -rL)" if file.is_symlink() else UNPACK_AGAIN
            raise UserError(
                f"{where}: sample_path {_short(path)} leads out of {root}; expected a file below "
                f"it; {how}"
            )
        # Before it is opened: a pipe would be waited for without end.
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
            raise UserError(
                f"{where}: {_short(path)} is not a file of at most {LARGEST_FILE:,} bytes; "
                f"expected a PNG image; {UNPACK_AGAIN}"
            )
        with file.open("rb", buffering=0) as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{where}: {_short(path)} does not exist in {root}; expected a PNG image for every "
            f"row; {UNPACK_AGAIN}"
        ) from error
    except (OSError, RuntimeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"{where}: cannot read {_short(path)}: {reason}; expected a readable PNG image; "
            f"{UNPACK_AGAIN}"
        ) from error


def _pixels(data: bytes, path: str, where: str) -> bytes:
    """Return the 784 grey pixels of a PNG file."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.size in SIZES and image.mode in MODES:
            return _grey(image)
        problem = f"is {image.size[0]} x {image.size[1]} pixels of mode {image.mode}"
    except UnidentifiedImageError:
        problem = f"is not a PNG image: it starts with {data[:8]!r}"
    except Exception as error:  # broken files make Pillow raise whatever its parts happen to
        problem = f"is not a whole PNG image: {_short(str(error))}"
    raise UserError(
        f"{where}: {_short(path)} {problem}; expected a PNG image of 28 x 28 or 128 x 128 pixels "
        f"in 8-bit grey or colour; {UNPACK_AGAIN}"
    )


def _grey(image: Image.Image) -> bytes:
    image.load()
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    if image.mode != "L":
        image = image.convert("L")
    if image.size != (28, 28):
        image = image.resize((28, 28), Image.Resampling.BILINEAR)
    return image.tobytes()


def _short(text: str) -> str:
    """Return `text` in quotes, on one line and not too long for a message."""
    return repr(text if len(text) <= 120 else f"{text[:117]}...")

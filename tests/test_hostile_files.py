"""Small files that claim to hold far too much: one line, soon, in little memory."""

import gzip
import json
import lzma
import re
import resource
import sqlite3
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from femfed import UserError
from femfed.data.hub import Femnist
from femfed.data.leaf import Leaf
from femfed.data.qmnist import Qmnist
from femfed.data.source import Dataset
from femfed.data.tff import Tff
from tests.handwriting import whole

MOST_BYTES = 1 << 30  # of memory for what a case reads, beyond what the libraries map


def endless_views(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "emnist_all.sqlite")) as database, database:
        database.execute(
            "CREATE VIEW client_metadata AS WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL "
            "SELECT i + 1 FROM n) SELECT 'w' || i AS client_id, 'all_train' AS split_name, "
            "1 AS num_examples FROM n"
        )
        database.execute("CREATE VIEW examples AS SELECT *, x'00' AS serialized_example_proto FROM "
                         "client_metadata")  # fmt: skip


def computed_columns(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "emnist_all.sqlite")) as database, database:
        database.execute("CREATE TABLE client_metadata (client_id, split_name, num_examples)")
        database.execute(
            "CREATE TABLE examples (split_name, client_id, serialized_example_proto "
            "AS (zeroblob(1000000)))"
        )


def packed_zeros(folder: Path) -> None:
    pieces = lzma.LZMACompressor(preset=0)
    with (folder / "emnist_all.sqlite.lzma").open("wb") as file:
        for _ in range(120):
            file.write(pieces.compress(bytes(1 << 20)))
        file.write(pieces.flush())


def linked_writers(folder: Path) -> None:
    with h5py.File(folder / "fed_emnist.h5", "w") as file:
        first = file.create_group("examples/w0")
        first["pixels"] = np.ones((1000, 28, 28), "f4")
        first["label"] = np.zeros(1000, "i4")
        for place in range(1, 1000):
            file[f"examples/w{place}"] = first


def linked_images(folder: Path) -> None:
    with h5py.File(folder / "fed_emnist.h5", "w") as file:
        pixels = file.create_dataset("pixels", data=np.ones((10, 28, 28), "f4"))
        for place in range(3):
            file[f"examples/w{place}/pixels"] = pixels
            file[f"examples/w{place}/label"] = np.zeros(10, "i4")


def packed_images(folder: Path) -> None:
    with h5py.File(folder / "fed_emnist.h5", "w") as file:
        for place in range(5):
            writer = file.create_group(f"examples/w{place}")
            writer.create_dataset("label", (30_000,), "i4", compression="gzip", fillvalue=0)[:1] = 1
            pixels = writer.create_dataset(
                "pixels", (30_000, 28, 28), "f4", chunks=True, compression="gzip", fillvalue=1.0
            )
            pixels[:1] = 1.0


def parquet(
    folder: Path,
    rows: int,
    image: bytes | None = None,
    writer: str = "f0000_00",
) -> None:
    """Write `rows` equal rows, whose values stand in the file once."""
    arrow = pytest.importorskip("pyarrow")
    tables = pytest.importorskip("pyarrow.parquet")
    pillow = pytest.importorskip("PIL.Image")
    png = BytesIO()
    pillow.new("L", (28, 28), 255).save(png, "PNG")
    same = arrow.array(bytearray(rows), arrow.uint8())
    images = arrow.array([image or png.getvalue()], arrow.binary()).dictionary_encode().take(same)
    table = arrow.table(
        {
            "image": arrow.StructArray.from_arrays([images], ["bytes"]),
            "writer_id": arrow.array([writer]).dictionary_encode().take(same),
            "character": same.cast(arrow.int64()),
        }
    )
    tables.write_table(
        table, folder / "train-00000-of-00001.parquet", compression="zstd", store_schema=False
    )


def long_users(folder: Path) -> None:
    names = [f"w{place}" for place in range(60_000)]
    empty = {"x": [], "y": []}
    shard = {
        "users": names,
        "num_samples": [0] * len(names),
        "user_data": dict.fromkeys(names, empty),
    }
    (folder / "all_data_0.json").write_text(json.dumps(shard))


def deep_json(folder: Path) -> None:
    (folder / "all_data_0.json").write_text('{"users": ' + "[" * 1_000_000)


def sparse_json(folder: Path) -> None:
    with (folder / "all_data_0.json").open("wb") as file:
        file.truncate(1 << 40)


def packed_digits(folder: Path) -> None:
    images, labels = b"\0\0\x08\3", b"\0\0\x0c\2"
    count = (402_953).to_bytes(4, "big")
    side = (28).to_bytes(4, "big")
    with gzip.open(folder / "qmnist-train-images-idx3-ubyte.gz", "wb", 1) as file:
        file.write(images + count + side + side)
        for _ in range(403):
            file.write(bytes(784_000))
    with gzip.open(folder / "qmnist-train-labels-idx2-int.gz", "wb", 1) as file:
        file.write(labels + count + (8).to_bytes(4, "big") + bytes(32 * 402_953))


CASES: dict[str, tuple[type[Dataset], Callable[[Path], object], str]] = {
    "SQLite of endless views": (Tff, endless_views, "client_metadata is computed, not stored"),
    "SQLite of computed columns": (Tff, computed_columns, "examples is computed, not stored"),
    "LZMA of zeros": (Tff, packed_zeros, "unpacks to more than"),
    "HDF5 of linked writers": (Tff, linked_writers, "is the same data as of"),
    "HDF5 of linked images": (Tff, linked_images, "is the same data as of"),
    "HDF5 of packed zeros": (Tff, packed_images, "images and more; expected at most"),
    "Parquet of 3,000,000 rows": (
        Femnist,
        lambda folder: parquet(folder, 3_000_000),
        "3,000,000 rows; expected at most",
    ),
    "Parquet of long images": (
        Femnist,
        lambda folder: parquet(folder, 1000, b"\x89PNG" + bytes(4_000_000)),
        "the image has more than 65,536 bytes",
    ),
    "Parquet of huge images": (
        Femnist,
        lambda folder: parquet(folder, 1000, bytes(100_000_000)),
        "column image.bytes unpacks to",
    ),
    "Parquet of long names": (
        Femnist,
        lambda folder: parquet(folder, 1000, writer="w" * 4_000_000),
        "a name of 4,000,000 characters",
    ),
    "JSON of many users": (Leaf, long_users, r"has no images \(60000 writers"),
    "deep JSON": (Leaf, deep_json, "not LEAF's schema"),
    "JSON of a hole": (Leaf, sparse_json, "GB are free|does not fit in this machine's memory"),
    "gzip of zeros": (Qmnist, packed_digits, "the header says 402953"),
}


@pytest.mark.parametrize("case", CASES)
def test_small_file_that_claims_too_much_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    kind, write, said = CASES[case]
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    fields: dict[str, Any] = {"path": str(folder)}

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_BYTES, hard))
    try:
        with pytest.raises(UserError) as refused:
            whole(kind, **fields).convert(tmp_path / "cache", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    assert re.search(said, str(refused.value))
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 1000
    assert not list((tmp_path / "cache").glob("*"))

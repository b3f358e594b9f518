"""Hugging Face's Parquet files: read as published, or refused with the file and the row."""

import json
import sys
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import femfed.data.hub as hub
from femfed import UserError
from femfed.data.hub import Femnist
from femfed.data.store import CHARACTERS, WriterStore
from tests.handwriting import Person, needs_real_data, qmnist_writers, whole

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
except ImportError:
    pa = None

needs_parquet = pytest.mark.skipif(
    pa is None,
    reason='Parquet needs the optional libraries of femfed[hub]: pip install -e ".[hub]"',
)
FILE = "train-00000-of-00001.parquet"
OWNERS = ["f0001_41", "f0001_41", "f0003_14", "f0003_14", "f0003_14", "f0010_07"]

Columns = dict[str, Any]


def picture(row: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return white paper with a line, whose place and shades tell the row."""
    image = np.full((28, 28), 255, np.uint8)
    image[row % 28, :] = np.arange(28) + row // 28
    return image


def png(image: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    stream = BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def columns(owners: Sequence[str] = OWNERS, first: int = 0) -> Columns:
    """Return the published columns: row r has picture and character first + r."""
    rows = range(first, first + len(owners))
    images = [{"bytes": png(picture(row)), "path": f"{row}.png"} for row in rows]
    return {
        "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "writer_id": pa.array(owners, pa.string()),
        "hsf_id": pa.array([0] * len(owners), pa.int64()),
        "character": pa.array([row % 62 for row in rows], pa.int64()),
    }


def write(
    file: Path, held: Columns, characters: Sequence[str] = tuple(CHARACTERS), per_group: int = 2
) -> None:
    """Write columns with the metadata that Hugging Face's library adds."""
    features = {"character": {"names": list(characters), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    file.parent.mkdir(exist_ok=True)
    table = pa.table(held).replace_schema_metadata(metadata)
    pq.write_table(table, file, row_group_size=per_group)


def store(path: Path | None, cache: Path) -> WriterStore:
    return whole(Femnist, path=None if path is None else str(path)).convert(cache, 2)


def holds(made: WriterStore, rows: Sequence[int]) -> None:
    """Assert that the images of `made` are those of `rows`, in this order."""
    np.testing.assert_array_equal(made.images, np.stack([picture(row) for row in rows]))
    assert made.labels.tolist() == [row % 62 for row in rows]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of six images by three writers, two rows a group."""
    write(tmp_path / "femnist" / FILE, columns())
    return tmp_path / "femnist"


@needs_parquet
def test_every_image_and_label_comes_to_its_writer(folder: Path, cache: Path) -> None:
    made = store(folder, cache)

    holds(made, range(6))
    assert made.names == ("f0001_41", "f0003_14", "f0010_07")
    assert made.examples.tolist() == [2, 3, 1]
    assert made.train_examples.tolist() == [-1] * 3
    assert made.numbers.tolist() == [0] * 3
    assert made.subject_numbers.tolist() == [0, 1, 2]
    assert not made.apart.any()


@needs_parquet
@pytest.mark.parametrize("batch", [1, 2, 4, 1024])
def test_rows_in_any_order_are_sorted_by_writer(
    batch: int, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BATCH", batch)
    write(tmp_path / "femnist" / "a.parquet", columns(["c", "a", "b", "a"]))
    write(tmp_path / "femnist" / "b.parquet", columns(["a", "d", "b"], first=4))

    made = store(tmp_path / "femnist", cache)

    assert made.names == ("a", "b", "c", "d")
    holds(made, [1, 3, 4, 2, 6, 0, 5])
    assert list(cache.iterdir()) == [made.folder]


@needs_parquet
@pytest.mark.parametrize("batch", [1, 2, 4, 1024])
def test_writers_may_span_batches_and_files(
    batch: int, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BATCH", batch)
    write(tmp_path / "femnist" / "a.parquet", columns(["a", "a", "b"]))
    write(tmp_path / "femnist" / "b.parquet", columns(["b", "b", "b", "c"], first=3))

    made = store(tmp_path / "femnist", cache)

    assert made.examples.tolist() == [2, 4, 1]
    holds(made, range(7))


@needs_parquet
def test_one_file_or_the_repository_s_folder_is_a_dataset(tmp_path: Path, cache: Path) -> None:
    data = tmp_path / "data"
    write(data / "a.parquet", columns(["a"]))
    write(data / "b.parquet", columns(["b"], first=1))
    (data / "._a.parquet").write_bytes(b"left by macOS")

    assert store(data / "b.parquet", cache).names == ("b",)
    assert store(tmp_path, cache).names == ("a", "b")


@needs_parquet
def test_files_without_metadata_and_with_other_widths(tmp_path: Path, cache: Path) -> None:
    held = columns()
    kinds = {"writer_id": pa.large_string(), "character": pa.uint8()}
    held.update({name: held[name].cast(kind) for name, kind in kinds.items()})
    (tmp_path / "femnist").mkdir()
    pq.write_table(pa.table(held), tmp_path / "femnist" / FILE)

    holds(store(tmp_path / "femnist", cache), range(6))


@needs_parquet
def test_white_ink_on_black_paper_is_inverted(tmp_path: Path, cache: Path) -> None:
    held = columns()
    black = [{"bytes": png(255 - picture(row))} for row in range(6)]
    held["image"] = pa.array(black, pa.struct([("bytes", pa.binary())]))
    write(tmp_path / "femnist" / FILE, held)

    holds(store(tmp_path / "femnist", cache), range(6))


@needs_parquet
def test_grey_in_three_colours_is_grey(tmp_path: Path, cache: Path) -> None:
    held = columns()
    images = [{"bytes": png(np.repeat(picture(row)[..., None], 3, 2))} for row in range(6)]
    held["image"] = pa.array(images, pa.struct([("bytes", pa.binary())]))
    write(tmp_path / "femnist" / FILE, held)

    holds(store(tmp_path / "femnist", cache), range(6))


@needs_parquet
def test_hundred_writers_are_a_shard(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "femnist" / FILE, columns([f"f{writer:04}_00" for writer in range(101)]))

    made = store(tmp_path / "femnist", cache)

    assert made.numbers.tolist() == [0] * 100 + [1]
    assert made.subject_numbers.tolist() == [*range(100), 0]


@needs_parquet
def test_second_opening_reads_no_file(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store(folder, cache)
    monkeypatch.setattr(hub, "_tables", None)

    assert store(folder, cache).folder == first.folder


@needs_parquet
def test_changed_source_is_stored_anew(folder: Path, cache: Path) -> None:
    first = store(folder, cache)
    write(folder / FILE, columns(first=6))

    second = store(folder, cache)

    assert second.folder != first.folder
    holds(second, range(6, 12))


Spoil = Callable[[Path], object]


def image(row: int, held: Callable[[], Any]) -> Spoil:
    """Write the file with other bytes for one image."""

    def change(folder: Path) -> None:
        table = columns()
        images = table["image"].to_pylist()
        images[row] = held()
        table["image"] = pa.array(images, table["image"].type)
        write(folder / FILE, table)

    return change


def column(name: str, make: Callable[[], Any]) -> Spoil:
    return lambda folder: write(folder / FILE, {**columns(), name: make()})


def without(name: str) -> Spoil:
    return lambda folder: write(
        folder / FILE, {key: held for key, held in columns().items() if key != name}
    )


def rewrite(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))


def characters(*values: Any, kind: str = "int64") -> Spoil:
    return column("character", lambda: pa.array(values, pa.type_for_alias(kind)))


def contradiction() -> bytes:
    """Return a PNG with a second header, of 60,000 x 60,000 pixels, behind the first."""
    small, huge = png(picture(0)), png(np.zeros((1, 1), np.uint8))
    header = bytearray(huge[8:33])
    header[8:16] = (60_000).to_bytes(4, "big") * 2
    header[21:] = zlib.crc32(header[4:21]).to_bytes(4, "big")
    return small[:33] + bytes(header) + small[33:]


ROW_3 = f"{FILE}: row 3: "
BROKEN: dict[str, tuple[Spoil, list[str]]] = {
    "no file": (lambda f: (f / FILE).unlink(), ["no Parquet files in", "data/*.parquet"]),
    "a folder for the file": (
        lambda f: ((f / FILE).unlink(), (f / FILE).mkdir()),
        ["no Parquet files in"],
    ),
    "cut off": (rewrite(lambda old: old[:-100]), [f"{FILE}: cannot be read as Parquet: "]),
    "empty file": (rewrite(lambda _: b""), [f"{FILE}: cannot be read as Parquet: "]),
    "not Parquet": (rewrite(lambda _: b"PK\3\4" * 99), [f"{FILE}: cannot be read as Parquet: "]),
    "data overwritten": (
        rewrite(lambda old: old[:4] + b"\xff" * (len(old) // 3) + old[4 + len(old) // 3 :]),
        [FILE],
    ),
    "no rows": (
        lambda f: write(f / FILE, {key: held[:0] for key, held in columns().items()}),
        [f"{FILE}: no rows"],
    ),
    "no writers": (without("writer_id"), ["no column writer_id among", "(image, hsf_id, "]),
    "no characters": (without("character"), [f"{FILE}: no column character among"]),
    "no images": (without("image"), [f"{FILE}: no column image among"]),
    "image is a string": (
        column("image", lambda: pa.array(["a.png"] * 6)),
        [f"{FILE}: column image is string; expected a struct whose `bytes` are"],
    ),
    "image is a path": (
        column("image", lambda: pa.array([{"path": "a.png"}] * 6)),
        [f"{FILE}: column image is struct<path: string>; expected"],
    ),
    "writer is a number": (
        column("writer_id", lambda: pa.array(range(6))),
        [f"{FILE}: column writer_id is int64; expected a string"],
    ),
    "writer is not UTF-8": (
        column(
            "writer_id",
            lambda: pa.array([b"a", b"\xff\xfe"] * 3, pa.binary()).view(pa.string()),
        ),
        [f"{FILE}: cannot be read as Parquet: ", "UTF8"],
    ),
    "character is a float": (
        characters(*[1.0] * 6, kind="double"),
        [f"{FILE}: column character is double; expected an integer"],
    ),
    "character is a string": (
        characters(*"abcdef", kind="string"),
        [f"{FILE}: column character is string; expected an integer"],
    ),
    "writer is null": (
        column("writer_id", lambda: pa.array([*OWNERS[:3], None, *OWNERS[4:]])),
        [f"{FILE}: row 3: no writer_id (null); expected a value"],
    ),
    "character is null": (
        characters(0, 1, 2, None, 4, None),
        [f"{FILE}: row 3: no character (null)"],
    ),
    "image is null": (image(3, lambda: None), [f"{FILE}: row 3: no image.bytes (null)"]),
    "bytes are null": (
        image(3, lambda: {"bytes": None, "path": "3.png"}),
        [f"{FILE}: row 3: no image.bytes (null)"],
    ),
    "character 62": (
        characters(0, 1, 2, 62, 4, 99),
        [f"{ROW_3}character 62; expected 0..61 (0-9, A-Z, a-z)"],
    ),
    "character -1": (characters(0, 1, 2, -1, 4, 5), [f"{ROW_3}character -1; expected"]),
    "other order of characters": (
        lambda f: write(f / FILE, columns(), CHARACTERS[::-1]),
        [f"{FILE}: the characters are named ['z', 'y',", "expected 0-9, A-Z, a-z"],
    ),
    "PNG cut off": (
        image(3, lambda: {"bytes": png(picture(3))[:-30]}),
        [f"{ROW_3}the image is a broken PNG: "],
    ),
    "PNG spoilt": (
        image(3, lambda: {"bytes": png(picture(3))[:50] + b"\0" * 40}),
        [f"{ROW_3}the image is a broken PNG: "],
    ),
    "JPEG": (
        image(3, lambda: {"bytes": png(picture(3), "JPEG")}),
        [f"{ROW_3}the image begins with ", "and is not a PNG; expected a grey PNG of 28 x 28"],
    ),
    "no bytes": (image(3, lambda: {"bytes": b""}), [f"{ROW_3}the image begins with b''"]),
    "27 x 28": (
        image(3, lambda: {"bytes": png(picture(3)[:, 1:])}),
        [f"{ROW_3}the image has 27 x 28 pixels"],
    ),
    "bomb": (
        image(3, lambda: {"bytes": contradiction()[:8] + contradiction()[33:]}),
        [f"{ROW_3}the image has 60000 x 60000 pixels"],
    ),
    "bomb behind a small header": (
        image(3, lambda: {"bytes": contradiction()}),
        [ROW_3, "the image "],
    ),
    "transparent": (
        image(3, lambda: {"bytes": png(np.full((28, 28, 4), 9, np.uint8))}),
        [f"{ROW_3}the image is of Pillow's mode RGBA, not 8-bit grey"],
    ),
    "16 bits": (
        image(3, lambda: {"bytes": png(np.full((28, 28), 999, np.uint16))}),
        [f"{ROW_3}the image is of Pillow's mode I;16"],
    ),
    "second file of another schema": (
        lambda f: write(f / "z.parquet", {**columns(), "character": pa.array(list("abcdef"))}),
        ["z.parquet: column character is string"],
    ),
}


@needs_parquet
@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_one_clear_line_and_no_store(case: str, folder: Path, cache: Path) -> None:
    change, said = BROKEN[case]
    change(folder)

    refuses(folder, cache, said)


@needs_parquet
@pytest.mark.parametrize("case", ["character 62", "image is null", "PNG cut off"])
def test_scratch_file_of_a_broken_source_is_gone(case: str, folder: Path, cache: Path) -> None:
    change, said = BROKEN[case]
    change(folder)
    write(folder / "a.parquet", columns(["z", "y"]))  # out of order

    refuses(folder, cache, said)


@needs_parquet
def test_column_s_name_that_is_not_utf_8(folder: Path, cache: Path) -> None:
    held = columns()
    held["hsf_\N{LATIN SMALL LETTER E WITH ACUTE}"] = held.pop("hsf_id")
    write(folder / FILE, held)
    (folder / FILE).write_bytes((folder / FILE).read_bytes().replace(b"\xc3\xa9", b"\xff\xff"))

    refuses(folder, cache, [f"{FILE}: cannot be read as Parquet: "])


@needs_parquet
def test_full_disk_is_one_clear_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path / "femnist" / FILE, columns(["b", "a"]))
    monkeypatch.setattr(hub.tempfile, "TemporaryFile", full)

    refuses(tmp_path / "femnist", cache, ["cannot keep", "No space left on device", "cache=DIR"])


WAYS_ON = ['pip install -e ".[hub]"', "dataset=leaf dataset.path=DIR"]


def test_missing_path_is_named_in_full(tmp_path: Path, cache: Path) -> None:
    refuses(tmp_path / "nowhere", cache, ["nowhere does not exist", "*.parquet files"])


@pytest.mark.parametrize("missing", ["pyarrow", "PIL", "huggingface_hub"])
def test_missing_library_is_told_before_anything_is_downloaded(
    missing: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str) -> SimpleNamespace:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return SimpleNamespace()  # whatever is installed here, nothing is asked of it

    monkeypatch.setattr(hub, "import_module", without)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")  # and undone after the test

    refuses(None, cache, [f"No module named '{missing}", *WAYS_ON])


@pytest.mark.parametrize("reason", ["No module named 'pyarrow'", "numpy is\ntoo old"])
def test_missing_library_is_one_clear_line_for_a_file_too(
    reason: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str) -> None:
        raise ImportError(reason)

    monkeypatch.setattr(hub, "import_module", without)
    (tmp_path / FILE).write_bytes(b"PAR1")

    refuses(tmp_path / FILE, cache, [reason.splitlines()[0], *WAYS_ON])


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put a library in the place of huggingface_hub that notes what it is asked for."""
    library = SimpleNamespace(asked=[], answer=None)

    def dataset_info(*names: str, **how: Any) -> SimpleNamespace:
        library.asked.append((names, how))
        if isinstance(library.answer, Exception):
            raise library.answer
        return SimpleNamespace(sha="5c61774")

    def snapshot_download(*names: str, **how: Any) -> str:
        library.asked.append((names, how))
        return str(library.answer)

    library.HfApi = lambda token: SimpleNamespace(dataset_info=dataset_info)
    library.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")  # and undone after the test
    return library


@needs_parquet
def test_no_path_downloads_once_and_only_parquet(
    folder: Path, cache: Path, downloads: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / FILE).rename(folder / "moved")
    (folder / "data").mkdir()
    (folder / "moved").rename(folder / "data" / FILE)
    downloads.answer = folder

    holds(store(None, cache), range(6))
    holds(store(None, cache), range(6))

    (asked, limits), (names, how) = downloads.asked
    assert asked == names == ("flwrlabs/femnist",)
    assert limits["timeout"] == 10
    assert how["revision"] == "5c61774"
    assert how["allow_patterns"] == "data/*.parquet"
    assert how["token"] is False
    assert hub.os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


@needs_parquet
def test_failed_download_is_one_clear_line(cache: Path, downloads: SimpleNamespace) -> None:
    downloads.answer = ConnectionError("Name or service not known.\nTry again\nand again")

    refuses(
        None,
        cache,
        [
            "cannot download flwrlabs/femnist from Hugging Face: ConnectionError: Name or service "
            "not known; expected a connection",
            "fetch data/*.parquet of that repository elsewhere and give dataset.path=DIR",
        ],
    )


@needs_parquet
def test_download_without_parquet_is_refused(
    tmp_path: Path, cache: Path, downloads: SimpleNamespace
) -> None:
    downloads.answer = tmp_path

    refuses(None, cache, ["no Parquet files in"])


def refuses(path: Path | None, cache: Path, said: list[str]) -> None:
    """Assert that `path` gives one line that says all of `said`, and leaves no file behind."""
    with pytest.raises(UserError) as caught:
        store(path, cache)
    message = str(caught.value)
    assert [part for part in said if part not in message] == [], message
    assert "\n" not in message
    assert not cache.exists() or not list(cache.iterdir())


@needs_parquet
@needs_real_data
@pytest.mark.parametrize("mixed", [False, True], ids=["sorted", "mixed"])
def test_real_writers_survive_the_published_layout(
    mixed: bool, tmp_path: Path, cache: Path
) -> None:
    writers: list[Person] = [p for _, p in zip(range(8), qmnist_writers(), strict=False)]
    owners = [name for name, images, _ in writers for _ in images]
    pictures = np.concatenate([images for _, images, _ in writers])
    labels = np.concatenate([labels for _, _, labels in writers])
    order = np.arange(len(owners))
    if mixed:
        order = np.random.default_rng(0).permutation(order)
    images = [{"bytes": png(pictures[row])} for row in order]
    held = {
        "image": pa.array(images, pa.struct([("bytes", pa.binary())])),
        "writer_id": pa.array([owners[row] for row in order]),
        "character": pa.array(labels[order].astype(np.int64)),
    }
    write(tmp_path / "femnist" / FILE, held, per_group=100)

    made = store(tmp_path / "femnist", cache)

    assert made.names == tuple(name for name, _, _ in writers)
    # Within a writer the rows keep the file's order.
    kept = order[np.argsort(np.array(owners)[order], kind="stable")]
    np.testing.assert_array_equal(made.images, pictures[kept])
    np.testing.assert_array_equal(made.labels, labels[kept])
    assert np.median(made.images) == 255  # white paper

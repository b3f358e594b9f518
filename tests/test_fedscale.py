"""FedScale's csv tables and PNG files: read as published, or refused with the line and the file."""

import csv
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import femfed.data.fedscale as fedscale
from femfed import UserError
from femfed.data.fedscale import FedScale
from femfed.data.store import WriterStore
from tests.handwriting import needs_real_data, qmnist_writers, whole

HEADER = ["client_id", "sample_path", "label_name", "label_id"]
# A row of a csv and the image at its path.
Sample = tuple[str, str, int, np.ndarray]


def letter(seed: int) -> np.ndarray:
    """Return an image of all 256 grey values on white paper."""
    image = np.full((28, 28), 255, np.uint8)
    image[4:20, 4:20] = np.arange(256, dtype=np.uint8).reshape(16, 16) + seed % 256
    return image


def samples(client: str, *labels: int) -> list[Sample]:
    folder = f"data/raw_data/by_write/hsf_0/f{client:0>4}_00"
    return [
        (client, f"{folder}/u{client}_{place:05}.png", label, letter(7 * place + int(client)))
        for place, label in enumerate(labels)
    ]


def write(root: Path, split: str, rows: Iterable[Sample]) -> Path:
    """Write a csv and its images below `root` as FedScale publishes them."""
    table = root / "client_data_mapping" / f"{split}.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as stream:
        lines = csv.writer(stream, lineterminator="\n")
        lines.writerow(HEADER)
        for client, path, label, image in rows:
            lines.writerow([client, path, label, label])
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    return table


def store(path: Path, cache: Path, held_out: str = "test") -> WriterStore:
    return whole(FedScale, path=str(path), held_out=held_out).convert(cache, 2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two train clients of 3 and 2 images, one each to test (2) and to validate (1)."""
    write(tmp_path / "femnist", "train", samples("5", 0, 10, 61) + samples("3", 36, 9))
    write(tmp_path / "femnist", "test", samples("105", 1, 2))
    write(tmp_path / "femnist", "val", samples("205", 3))
    return tmp_path / "femnist"


def test_every_image_and_label_is_kept_and_test_clients_are_apart(root: Path, cache: Path) -> None:
    made = store(root, cache)

    assert made.names == ("train_5", "train_3", "test_105")  # in the order of the csv
    assert made.apart.tolist() == [False, False, True]
    assert made.examples.tolist() == [3, 2, 2]
    assert made.labels.tolist() == [0, 10, 61, 36, 9, 1, 2]
    assert made.train_examples.tolist() == [-1, -1, -1]
    expected = [*samples("5", 0, 0, 0), *samples("3", 0, 0), *samples("105", 0, 0)]
    np.testing.assert_array_equal(made.images, [image for *_, image in expected])


def test_number_is_the_place_in_hundreds(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, "train", [row for client in range(101) for row in samples(str(client), 1)])
    write(tmp_path, "test", [("0", *sample) for _, *sample in samples("200", 1)])

    made = store(tmp_path, cache)

    assert made.numbers.tolist() == [0] * 100 + [1, 1]
    assert made.subject_numbers.tolist() == [*range(100), 0, 1]
    assert (made.names[0], made.names[101]) == ("train_0", "test_0")  # ids may repeat


def test_held_out_names_the_csv(root: Path, cache: Path) -> None:
    assert store(root, cache, "val").names == ("train_5", "train_3", "val_205")
    assert store(root, cache, "test").names == ("train_5", "train_3", "test_105")
    with pytest.raises(UserError, match=r"dataset\.held_out=train; expected test or val"):
        store(root, cache, "train")


def test_without_a_held_out_csv_nobody_is_apart(root: Path, cache: Path) -> None:
    (root / "client_data_mapping" / "test.csv").unlink()

    assert store(root, cache).apart.tolist() == [False, False]


def test_rows_of_a_client_need_not_stand_together(tmp_path: Path, cache: Path) -> None:
    a, b = samples("1", 1, 2, 3), samples("2", 4, 5)
    write(tmp_path, "train", [a[0], b[0], a[1], b[1], a[2]])

    made = store(tmp_path, cache)

    assert made.names == ("train_1", "train_2")
    assert made.labels.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(made.images, [row[3] for row in a + b])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n5,", "\n\n5,") + "\n\n",
        lambda text: text.replace("\n5,", '\n"5",').replace("label_name", '"label_name"'),
        lambda text: text.replace("\n", ",more\n"),  # a column too many
        lambda text: text.rstrip("\n"),
    ],
    ids=["byte order mark", "CRLF", "empty lines", "quotes", "extra column", "no last newline"],
)
def test_csv_of_another_writing_is_the_same(
    change: Callable[[str], str], root: Path, cache: Path
) -> None:
    first = store(root, cache)
    table = root / "client_data_mapping" / "train.csv"
    table.write_bytes(change(table.read_text()).encode())

    second = store(root, cache)

    assert (second.names, second.labels.tolist()) == (first.names, first.labels.tolist())


def test_columns_are_found_by_name(root: Path, cache: Path) -> None:
    table = root / "client_data_mapping" / "train.csv"
    rows = [line.split(",") for line in table.read_text().splitlines()]
    table.write_text("".join(f"{d},{b},{a}\n" for a, b, _, d in rows))

    assert store(root, cache).labels.tolist() == [0, 10, 61, 36, 9, 1, 2]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_modes_become_grey(mode: str, root: Path, cache: Path) -> None:
    black_and_white = np.where(letter(0) < 128, 0, 255).astype(np.uint8)
    image = black_and_white if mode == "1" else letter(0)
    Image.fromarray(image).convert(mode).save(root / samples("3", 0, 0)[1][1])

    np.testing.assert_array_equal(store(root, cache).images[4], image)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_paper_is_white(mode: str, root: Path, cache: Path) -> None:
    ink = np.zeros((28, 28, 4), np.uint8)
    ink[9:19, 9:19, 3] = 255
    image, options = Image.fromarray(ink), {}
    if mode == "P":
        image, options = Image.fromarray(ink[:, :, 3]).convert("P"), {"transparency": 0}
        image.putpalette([0] * 768)
    image.convert(mode).save(root / samples("3", 0, 0)[1][1], **options)

    np.testing.assert_array_equal(store(root, cache).images[4], 255 - ink[:, :, 3])


def test_original_of_128_pixels_is_scaled_as_fedscale_does(root: Path, cache: Path) -> None:
    large = np.full((128, 128), 255, np.uint8)
    large[40:90, 60:66] = 0
    Image.fromarray(large).convert("RGB").save(root / samples("3", 0, 0)[1][1])

    image = store(root, cache).images[4]

    # torchvision's Resize((28, 28)) of a Pillow image is Pillow's own, bilinear.
    scaled = Image.fromarray(large).convert("RGB").resize((28, 28), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(image, np.asarray(scaled)[:, :, 0])
    assert (image[14, 13], image[14, 0]) == (50, 255)


def test_second_opening_reads_nothing(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store(root, cache)

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(fedscale, "_writers", refuse)

    assert store(root, cache).folder == first.folder


def test_changed_csv_is_stored_anew(root: Path, cache: Path) -> None:
    first = store(root, cache)
    table = root / "client_data_mapping" / "test.csv"
    table.write_text(table.read_text().replace(",1,1", ",7,7"))
    stat = table.stat()
    os.utime(table, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))

    second = store(root, cache)

    assert (first.labels[5], second.labels[5]) == (1, 7)


def png(width: int, height: int, data: bytes, kind: int = 0, depth: int = 8) -> bytes:
    """Return a PNG file that says it is of this size, whatever `data` holds."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def saved(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


WHOLE = saved(letter(0))
BROKEN_IMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a PNG image: it starts with b''"),
    "cut off in the header": (WHOLE[:20], "is not a"),
    "cut off in the pixels": (WHOLE[: len(WHOLE) // 2], "is not a whole PNG image"),
    "no pixels": (png(28, 28, b""), "is not a whole PNG image"),
    "broken header": (WHOLE.replace(b"IHDR", b"IHDX"), "is not a"),
    "JPEG": (saved(letter(0), "JPEG"), r"is not a PNG image: it starts with b'\xff\xd8"),
    "GIF": (saved(letter(0), "GIF"), "is not a PNG image: it starts with b'GIF8"),
    "text": (b"<html>not found</html>", "is not a PNG image: it starts with b'<html>"),
    "32 x 32": (saved(np.full((32, 32), 255, np.uint8)), "is 32 x 32 pixels of mode L"),
    "28 x 128": (saved(np.full((128, 28), 255, np.uint8)), "is 28 x 128 pixels"),
    "no palette": (png(28, 28, b"\0" * 29 * 28, kind=3), "is not a whole PNG image"),
    "16 bits": (png(28, 28, b"\0" * 57 * 28, depth=16), "28 x 28 pixels of mode I;16"),
    "bomb": (png(50_000, 50_000, b""), "is not a whole PNG image: 'Image size (2500000000"),
    "small bomb": (png(10_000, 10_000, b""), "is not a whole PNG image: 'Image size (100000000"),
    "no size": (png(0, 28, b""), "is not a"),
    "large file": (b"\x89PNG\r\n\x1a\n" + b"\0" * 2**20, "not a file of at most 1,048,576 bytes"),
}


@pytest.mark.parametrize("case", BROKEN_IMAGES)
def test_broken_image_is_one_clear_line_and_no_store(case: str, root: Path, cache: Path) -> None:
    data, said = BROKEN_IMAGES[case]
    path = samples("3", 0, 0)[1][1]
    (root / path).write_bytes(data)

    refuses(root, cache, ["train.csv: line 6, client 3: ", path, said, "expected a PNG image"])


def test_no_flipped_byte_is_anything_but_an_image_or_one_clear_line() -> None:
    random, said = np.random.default_rng(0), list[str]()
    for _ in range(300):
        data = bytearray(WHOLE)
        for place in random.integers(0, len(data), 2):
            data[place] = random.integers(256)
        try:
            assert len(fedscale._pixels(bytes(data), "a.png", "train.csv: line 2")) == 784
        except UserError as error:
            said.append(str(error))
    assert len(said) > 100
    assert not [message for message in said if "\n" in message]


def line_2(*cells: str) -> Callable[[str], str]:
    """Replace the first row."""
    return lambda text: "\n".join(
        ",".join(cells) if place == 1 else line for place, line in enumerate(text.split("\n"))
    )


HERE = samples("5", 0)[0][1]
Change = Callable[[str], Any]
BROKEN_TABLES: dict[str, tuple[Change, list[str]]] = {
    "empty": (lambda text: "", ["line 1 has no column client_id, sample_path, label_id: ''"]),
    "no rows": (lambda text: text.split("\n")[0], ["has a header and no rows; expected a row"]),
    "no header": (
        lambda text: text.split("\n", 1)[1],
        ["line 1 has no column client_id", "'5,data/raw_data", "expected the header client_id,"],
    ),
    "column missing": (
        lambda text: text.replace("label_id", "label"),
        ["line 1 has no column label_id", "'client_id,sample_path,label_name,label'"],
    ),
    "Latin-1": (
        lambda text: text.replace("f0005_00/u5_00001", "\xe9").encode("latin-1"),
        ["line 3 is not UTF-8 at byte ", "expected a csv table in UTF-8"],
    ),
    "UTF-16": (lambda text: text.encode("utf-16"), ["line 1 is not UTF-8 at byte 0"]),
    "zip": (lambda text: b"PK\3\4\x14\0\0\0", ["train.csv: line 1 has no column"]),
    "cell missing": (line_2("5", HERE, "0"), ["line 2 has 3 cells; expected 4, as in the header"]),
    "comma in the path": (line_2("5", "a,b.png", "0", "0"), ["line 2 has 5 cells; expected 4"]),
    "quote left open": (line_2("5", f'"{HERE}', "0", "0"), ["line 2 is not csv: ", "commas"]),
    "client_id empty": (line_2("", HERE, "0", "0"), ["line 2: client_id is ''; expected a name"]),
    "client_id blank": (line_2("  ", HERE, "0", "0"), ["line 2: client_id is ''"]),
    "client_id unprintable": (line_2("\x1b[2J", HERE, "0", "0"), [r"client_id is '\x1b[2J'"]),
    "sample_path empty": (line_2("5", "", "0", "0"), ["line 2: sample_path is ''"]),
    "sample_path with NUL": (line_2("5", "a\0b.png", "0", "0"), [r"sample_path is 'a\x00b.png'"]),
    "label a word": (
        line_2("5", HERE, "0", "six"),
        ["line 2, client 5: label_id is 'six'; expected 0..61 (0-9, A-Z, a-z)"],
    ),
    "label 62": (line_2("5", HERE, "0", "62"), ["line 2, client 5: label_id is '62'"]),
    "label negative": (line_2("5", HERE, "0", "-1"), ["label_id is '-1'; expected 0..61"]),
    "label empty": (line_2("5", HERE, "0", ""), ["label_id is ''; expected 0..61"]),
    "label 3.5": (line_2("5", HERE, "0", "3.5"), ["label_id is '3.5'; expected 0..61"]),
    "huge cell": (
        line_2("5", "a" * 200_000, "0", "0"),
        ["line 2 is longer than 65,536 bytes; expected a csv table"],
    ),
    "long path": (line_2("5", "a" * 5_000, "0", "0"), ["line 2, client 5: cannot read 'aaaa"]),
    "no such file": (
        line_2("5", "data/none.png", "0", "0"),
        ["line 2, client 5: 'data/none.png' does not exist in ", "expected a PNG image for every"],
    ),
    "below a file": (line_2("5", f"{HERE}/a.png", "0", "0"), ["does not exist in "]),
    "folder": (line_2("5", "data", "0", "0"), ["line 2, client 5: 'data' is not a file of"]),
    "dots": (line_2("5", "../secret.png", "0", "0"), ["'../secret.png' leads out of "]),
    "dots within": (line_2("5", "data/../../secret.png", "0", "0"), ["leads out of "]),
    "absolute": (line_2("5", "/etc/hostname", "0", "0"), ["'/etc/hostname' leads out of "]),
}


@pytest.mark.parametrize("case", BROKEN_TABLES)
def test_broken_table_is_one_clear_line_and_no_store(case: str, root: Path, cache: Path) -> None:
    change, said = BROKEN_TABLES[case]
    table = root / "client_data_mapping" / "train.csv"
    (root.parent / "secret.png").write_bytes(WHOLE)
    text = change(table.read_text())
    table.write_bytes(text if isinstance(text, bytes) else text.encode())

    refuses(root, cache, [str(table), *said])


def test_dots_that_stay_inside_are_followed(root: Path, cache: Path) -> None:
    table = root / "client_data_mapping" / "train.csv"
    table.write_text(line_2("5", f"data/../{HERE}", "0", "0")(table.read_text()))

    assert store(root, cache).labels[0] == 0


@pytest.mark.parametrize("what", ["file", "folder"])
def test_link_is_followed_inside_only(what: str, root: Path, cache: Path) -> None:
    link = root / HERE if what == "file" else (root / HERE).parent
    link.rename(root / "moved")
    link.symlink_to(root / "moved")
    assert len(store(root, cache)) == 3

    (root / "moved").rename(root.parent / "outside")
    link.unlink()
    link.symlink_to(root.parent / "outside")
    table = root / "client_data_mapping" / "train.csv"
    os.utime(table, ns=(0, 0))
    before = stores(cache)
    with pytest.raises(UserError, match=r"line 2, client 5: sample_path .* leads out of "):
        store(root, cache)
    assert stores(cache) == before


def test_pipe_is_not_waited_for(root: Path, cache: Path) -> None:
    (root / HERE).unlink()
    os.mkfifo(root / HERE)

    refuses(root, cache, ["line 2, client 5: ", "is not a file of at most"])


def test_light_ink_on_dark_paper_is_refused(root: Path, cache: Path) -> None:
    for client, path, _, image in samples("105", 0, 0):
        assert client == "105"
        Image.fromarray(255 - image).save(root / path)

    refuses(root, cache, ["writer test_105 has light ink on dark paper", "invert"])


def test_folder_without_train_csv_is_refused(root: Path, cache: Path) -> None:
    (root / "client_data_mapping" / "train.csv").unlink()
    refuses(root, cache, ["holds no client_data_mapping/train.csv", "correct dataset.path=PATH"])
    refuses(root / HERE, cache, ["holds no client_data_mapping/train.csv"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_for_a_csv_is_refused(split: str, root: Path, cache: Path) -> None:
    table = root / "client_data_mapping" / f"{split}.csv"
    table.unlink()
    table.mkdir()

    refuses(root, cache, [f"{table} is not a file; expected a csv table"])


@pytest.mark.parametrize("path", [None, "", "  "])
def test_no_path_says_which_key_to_set(path: str | None, cache: Path) -> None:
    with pytest.raises(UserError, match=r"dataset=fedscale needs dataset\.path=PATH"):
        whole(FedScale, path=path, held_out="test").convert(cache, 2)


@pytest.mark.parametrize("method", ["open", "stat"])
def test_unreadable_csv_is_named(
    method: str, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(Path, method)

    def deny(path: Path, *args: Any, **more: Any) -> Any:  # chmod would not stop root
        if path.name == "test.csv":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(Path, method, deny)
    refuses(root, cache, [f"cannot read {root}/client_data_mapping/test.csv: Permission denied"])


def test_unreadable_image_is_named(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.lstat

    def deny(path: Any, *args: Any, **more: Any) -> Any:
        if str(path).endswith("u3_00001.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(Path, "lstat", deny)
    refuses(root, cache, ["line 6, client 3: cannot read ", "u3_00001.png': Permission denied"])


def stores(cache: Path) -> list[Path]:
    return list(cache.iterdir()) if cache.exists() else []


def refuses(path: Path, cache: Path, said: list[str]) -> None:
    """Assert that `path` gives one line that says all of `said`, and leaves no file behind."""
    with pytest.raises(UserError) as caught:
        store(path, cache)
    message = str(caught.value)
    assert [part for part in said if part not in message] == [], message
    assert "\n" not in message
    assert len(message) < 800
    assert not stores(cache)


@needs_real_data
def test_real_writers_survive_the_published_layout(tmp_path: Path, cache: Path) -> None:
    writers = [writer for _, writer in zip(range(4), qmnist_writers(), strict=False)]

    def rows(people: list[Any]) -> list[Sample]:
        return [
            (name, f"data/{name}/{place}.png", int(label), image)
            for name, images, labels in people
            for place, (image, label) in enumerate(zip(images, labels, strict=True))
        ]

    write(tmp_path / "femnist", "train", rows(writers[:3]))
    write(tmp_path / "femnist", "test", rows(writers[3:]))

    made = store(tmp_path / "femnist", cache)

    names = [name for name, _, _ in writers]
    assert made.names == (*(f"train_{name}" for name in names[:3]), f"test_{names[3]}")
    assert made.apart.tolist() == [False, False, False, True]
    np.testing.assert_array_equal(made.images, np.concatenate([writer[1] for writer in writers]))
    np.testing.assert_array_equal(made.labels, np.concatenate([writer[2] for writer in writers]))
    assert np.median(made.images) == 255

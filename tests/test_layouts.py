"""Data as people have them: moved, linked, packed, one folder up, split by others, named oddly."""

import fcntl
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from femfed import UserError
from femfed.data import hub
from femfed.data.fedscale import FedScale
from femfed.data.glyphs import Glyphs
from femfed.data.hub import Femnist
from femfed.data.leaf import Leaf
from femfed.data.qmnist import Qmnist
from femfed.data.source import Dataset
from femfed.data.store import WriterStore, stored, stored_by_content
from femfed.data.tff import Tff
from femfed.engine.federation import draw_federation, open_federation
from tests import test_fedscale, test_qmnist, test_tff
from tests.handwriting import Person, whole, write_leaf_shards
from tests.test_hub import needs_parquet


def people(*names: str) -> list[Person]:
    """Return writers with a dark dot on white paper, at another place in each of five images."""
    found = []
    for place, name in enumerate(names):
        images = np.full((5, 28, 28), 255, np.uint8)
        for image in range(5):
            images[image, 8 + place, 8 + image] = 0
        found.append((name, images, np.arange(5) * 12))
    return found


TRAINED, HELD_OUT = people("f0000_00", "f0001_00", "f0002_00"), people("f0003_01", "f0004_01")


def leaf(folder: Path, train: list[Person], test: list[Person]) -> None:
    for half, part in (("train", train), ("test", test)):
        (file,) = write_leaf_shards(folder / half, part, split=False)
        file.rename(folder / half / f"all_data_0_niid_0_keep_0_{half}_9.json")


def hdf5(folder: Path, train: list[Person], test: list[Person]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    test_tff.write_hdf5(folder / test_tff.TRAIN, train)
    test_tff.write_hdf5(folder / test_tff.TEST, test)


def parquet(folder: Path, train: list[Person], test: list[Person]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", train), ("test", test)):
        write_parquet(folder / f"{split}-00000-of-00001.parquet", part)


def write_parquet(file: Path, part: list[Person]) -> None:
    import pyarrow as arrow
    import pyarrow.parquet

    rows = [
        {"image": {"bytes": png(image)}, "writer_id": name, "character": int(label)}
        for name, images, labels in part
        for image, label in zip(images, labels, strict=True)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), file)


def png(image: np.ndarray) -> bytes:
    from io import BytesIO

    file = BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def fedscale(folder: Path, train: list[Person], test: list[Person]) -> None:
    for split, part in (("train", train), ("test", test)):
        rows = [
            (name, f"data/{name}_{at}.png", int(label), image)
            for name, images, labels in part
            for at, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
        test_fedscale.write(folder, split, rows)


Write = Callable[[Path, list[Person], list[Person]], None]
SOURCES: dict[str, Any] = {
    "leaf": pytest.param(Leaf, leaf, {}, id="leaf"),
    "tff": pytest.param(Tff, hdf5, {}, id="tff"),
    "femnist": pytest.param(Femnist, parquet, {}, id="femnist", marks=needs_parquet),
    "fedscale": pytest.param(FedScale, fedscale, {"held_out": "test"}, id="fedscale"),
}
every_source = pytest.mark.parametrize(("kind", "write", "fields"), SOURCES.values())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(kind: type[Dataset], path: Path, cache: Path, **fields: Any) -> WriterStore:
    return whole(kind, path=str(path), **fields).convert(cache, 2)


@every_source
def test_writers_of_the_test_half_only_are_kept_apart(
    kind: type[Dataset], write: Write, fields: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    write(tmp_path / "data", TRAINED, HELD_OUT)

    store = opened(kind, tmp_path / "data", cache, **fields)

    assert store.apart.tolist() == [False] * 3 + [True] * 2
    said: list[str] = []
    _, federation = open_federation(
        whole(kind, path=str(tmp_path / "data"), **fields),
        cache,
        clients=3,
        seed=0,
        unseen_fraction=0.1,
        test_fraction=0.1,
        on_status=lambda line: None,
        on_message=said.append,
    )
    assert store.apart[federation.unseen].tolist() == [True]
    assert any(
        line.startswith("2 writers are kept apart by the source; 1 of them") for line in said
    )


def test_unseen_writers_are_those_apart_first() -> None:
    trainable, apart = np.arange(20), np.arange(20, 23)

    few = draw_federation(0, trainable, apart, 10, 0.1).unseen
    many = draw_federation(0, trainable, apart, 10, 0.25).unseen

    assert (len(few), set(few.tolist()) < {20, 21, 22}) == (2, True)
    assert (len(many), set(many.tolist()) > {20, 21, 22}) == (5, True)
    assert not draw_federation(0, trainable, apart, 10, 0.0).unseen.size


@needs_parquet
@pytest.mark.parametrize("names", [("train-0", "test-0"), ("train/0", "validation/0")], ids=str)
def test_published_parquet_split_is_kept(
    names: tuple[str, str], tmp_path: Path, cache: Path
) -> None:
    for name, held_out in zip(names, (False, True), strict=True):
        part = [
            (writer, 255 - 2 * held_out - images * 0, labels) for writer, images, labels in TRAINED
        ]
        write_parquet(tmp_path / "data" / f"{name}.parquet", part)

    store = opened(Femnist, tmp_path / "data", cache)

    for index in range(3):
        writer = store.writer(index, 0.5, seed=0)
        assert writer.images[writer.train, 0, 0].tolist() == [255] * 5
        assert writer.images[writer.test, 0, 0].tolist() == [253] * 5


@needs_parquet
def test_parquet_files_of_unclear_splits_are_refused(tmp_path: Path, cache: Path) -> None:
    write_parquet(tmp_path / "train.parquet", TRAINED)
    write_parquet(tmp_path / "test.parquet", TRAINED)
    write_parquet(tmp_path / "validation.parquet", TRAINED)
    with pytest.raises(UserError, match="holds files of several splits"):
        opened(Femnist, tmp_path, cache)
    (tmp_path / "validation.parquet").rename(tmp_path / "more.parquet")
    with pytest.raises(UserError, match=r"more\.parquet \(no split by its name\)"):
        opened(Femnist, tmp_path, cache)


def test_image_of_both_fedscale_tables_is_refused(tmp_path: Path, cache: Path) -> None:
    fedscale(tmp_path / "data", TRAINED, TRAINED[:1])

    with pytest.raises(UserError, match=r"test\.csv: 5 of its 5 images stand in train\.csv too"):
        opened(FedScale, tmp_path / "data", cache, held_out="test")


@every_source
def test_black_paper_is_refused_or_inverted(
    kind: type[Dataset], write: Write, fields: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    black = [(name, 255 - images, labels) for name, images, labels in TRAINED]
    write(tmp_path / "data", [*TRAINED[:2], black[2]], HELD_OUT)

    with pytest.raises(UserError, match=r"f0002_00 has light ink on dark paper.*invert the images"):
        opened(kind, tmp_path / "data", cache, **fields)


def edited(tmp_path: Path, labels: str) -> Path:
    """Return a shard whose labels are written as `labels`."""
    (file,) = write_leaf_shards(tmp_path / "shard", TRAINED, split=False)
    file.write_text(file.read_text().replace("[0, 12, 24, 36, 48]", labels))
    return file


def test_labels_may_be_floats_without_a_fraction(tmp_path: Path, cache: Path) -> None:
    assert opened(Leaf, edited(tmp_path, "[0.0, 1.0, 2, 3, 9.0]"), cache).labels[:5].tolist() == [
        0, 1, 2, 3, 9
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"label 3\.5 at image 1; expected 0\.\.61"):
        opened(Leaf, edited(tmp_path, "[0.0, 3.5, 2, 3, 9]"), cache)


def test_ten_labels_are_said_to_be_digits_unless_they_are_named(
    tmp_path: Path, cache: Path
) -> None:
    file = edited(tmp_path, "[0, 1, 2, 3, 9]")
    (line, *_) = whole(Leaf, path=str(file)).remarks(opened(Leaf, file, cache))
    assert line.startswith("10 classes, labels 0..9: they are taken for 0-9")
    assert "dataset.labels=a-j" in line

    named = opened(Leaf, file, cache, labels="a-j")
    assert named.labels[:5].tolist() == [36, 37, 38, 39, 45]
    assert not any("classes" in line for line in whole(Leaf, path="").remarks(named))
    with pytest.raises(UserError, match=r"label 3 at image 3; expected 0\.\.2"):
        opened(Leaf, file, cache, labels=["A", "B", "x"])
    with pytest.raises(UserError, match=r"dataset\.labels=j-a"):
        whole(Leaf, path=str(file), labels="j-a")


OTHERS = {
    "data.zip": (Leaf, "is an archive; unpack it .unzip data.zip. and give its folder"),
    "femnist.tar.gz": (FedScale, "is an archive; unpack it .tar xzf femnist.tar.gz."),
    "fed_emnist.tar.bz2": (Tff, "is an archive; unpack it .tar xjf fed_emnist.tar.bz2."),
    "shard.json.gz": (Leaf, "is packed; unpack it .gunzip shard.json.gz."),
    "0.npz": (Leaf, "is NumPy arrays, perhaps PFLlib's"),
    "emnist-byclass.mat": (Leaf, "is a Matlab file, perhaps EMNIST's"),
    "femnist.pt": (Femnist, "is pickled"),
    "data-00000-of-00001.arrow": (Femnist, "is an Arrow cache .* save it as Parquet"),
    "train.h5": (Leaf, "is HDF5; .* dataset=tff"),
    "all.parquet": (Tff, "is Parquet; .* dataset=femnist"),
    "all_data_0.json": (Qmnist, "is JSON; .* dataset=leaf"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layout_is_named_with_what_to_do(name: str, tmp_path: Path, cache: Path) -> None:
    kind, said = OTHERS[name]
    fields = {"held_out": "test"} if kind is FedScale else {}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(b"PK\3\4" if name == "data.zip" else b"\0" * 16)

    for path in (tmp_path / "data", tmp_path / "data" / name):
        with pytest.raises(UserError, match=said) as refused:
            opened(kind, path, cache, **fields)
        assert name in str(refused.value)


@every_source
def test_the_one_folder_below_that_fits_is_taken(
    kind: type[Dataset], write: Write, fields: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    write(tmp_path / "one" / "up" / "data", TRAINED, HELD_OUT)
    (tmp_path / "one" / "empty").mkdir()

    assert len(opened(kind, tmp_path / "one", cache, **fields)) == 5

    write(tmp_path / "one" / "other" / "data", TRAINED, HELD_OUT)
    with pytest.raises(UserError, match="holds 2 folders with data: other/data, up/data"):
        opened(kind, tmp_path / "one", cache, **fields)


def test_qmnist_is_found_one_folder_down(tmp_path: Path, cache: Path) -> None:
    raw = tmp_path / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    table = np.zeros((5, 8), np.int32)
    table[:, 2] = [7, 7, 8, 8, 8]
    (raw / "qmnist-train-labels-idx2-int").write_bytes(test_qmnist.idx(table))
    images = 255 - TRAINED[0][1]
    (raw / "qmnist-train-images-idx3-ubyte").write_bytes(test_qmnist.idx(images))

    assert opened(Qmnist, tmp_path, cache).names == ("f0007", "f0008")
    (raw / "qmnist-train-images-idx3-ubyte").write_bytes(test_qmnist.idx(255 - images))
    with pytest.raises(UserError, match="f0007 has light ink on dark paper"):
        opened(Qmnist, tmp_path, cache)


@every_source
def test_pipe_and_device_are_not_opened(
    kind: type[Dataset], write: Write, fields: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    os.mkfifo(tmp_path / "data.json")
    for path in (tmp_path / "data.json", Path("/dev/zero")):
        with pytest.raises(UserError, match="is neither a folder nor a file"):
            opened(kind, path, cache, **fields)


def test_linked_files_keep_their_own_names(tmp_path: Path, cache: Path) -> None:
    data, objects = tmp_path / "data", tmp_path / "objects"
    objects.mkdir()
    (file,) = write_leaf_shards(data, TRAINED, split=False)
    test_tff.write_hdf5(data / "fed_emnist_train.h5", TRAINED)
    for place, name in enumerate((file.name, "fed_emnist_train.h5")):
        (data / name).rename(objects / f"{place + 71}ab")
        (data / name).symlink_to(objects / f"{place + 71}ab")

    assert opened(Leaf, data / file.name, cache).numbers.tolist() == [0] * 3
    assert len(opened(Tff, data / "fed_emnist_train.h5", cache)) == 3


@needs_parquet
def test_files_in_the_hubs_cache_are_used_without_a_network(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    library = pytest.importorskip("huggingface_hub")
    repository = tmp_path / "hub" / "datasets--flwrlabs--femnist"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("aaaa")
    shard = repository / "snapshots" / "aaaa" / "data" / "train-00000-of-00002.parquet"
    write_parquet(shard, TRAINED)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def no_network(**about: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(library, "HfApi", no_network)
    with pytest.raises(UserError, match="no network"):  # a half of the files does not do
        whole(Femnist, path=None).convert(cache, 2)
    write_parquet(shard.with_name("train-00001-of-00002.parquet"), HELD_OUT)

    assert len(whole(Femnist, path=None).convert(cache, 2)) == 5
    assert len(opened(Femnist, repository, cache)) == 5
    assert hub.REPOSITORY == "flwrlabs/femnist"


def test_variant_states_what_is_there(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf(tmp_path / "data", TRAINED, HELD_OUT)
    dataset = whole(Leaf, path=str(tmp_path / "data"))
    store = dataset.convert(cache, 2)

    assert dataset.variant_of(store) == "LEAF FEMNIST: 3 writers, 15 images"
    digits = whole(Leaf, path=str(tmp_path / "data"), classes="digits").select(store)
    assert dataset.variant_of(digits) == "LEAF FEMNIST: 3 writers, 15 images"
    published = namedtuple("Published", "writers images")(3, 15)
    monkeypatch.setattr(Leaf, "published", published)
    assert dataset.variant_of(store) == Leaf.variant


def moved(folder: Path) -> Path:
    return folder.rename(folder.with_name("moved"))


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name("copied")))


def linked(folder: Path) -> Path:
    (folder.with_name("linked")).symlink_to(folder)
    return folder.with_name("linked")


def touched(folder: Path) -> Path:
    for file in folder.rglob("*.*"):
        os.utime(file, (1, 1))
    return folder


@pytest.mark.parametrize("change", [moved, copied, linked, touched])
@every_source
def test_store_is_known_by_its_content(
    kind: type[Dataset],
    write: Write,
    fields: dict[str, Any],
    change: Callable[[Path], Path],
    tmp_path: Path,
    cache: Path,
) -> None:
    write(tmp_path / "data", TRAINED, HELD_OUT)
    first = opened(kind, tmp_path / "data", cache, **fields)
    view = whole(kind, path="", classes="digits", **fields).select(first)

    path = change(tmp_path / "data")
    again = opened(kind, path, cache, **fields)

    assert again.folder == first.folder
    assert whole(kind, path="", classes="digits", **fields).select(again).folder == view.folder
    write(path, TRAINED[:2], HELD_OUT)
    assert opened(kind, path, cache, **fields).folder != first.folder


def test_store_of_an_earlier_version_is_known_by_its_name(tmp_path: Path, cache: Path) -> None:
    leaf(tmp_path / "data", TRAINED, HELD_OUT)
    store = opened(Leaf, tmp_path / "data", cache)
    (former,) = json.loads((store.folder / "sources.json").read_text())["sources"]
    store.folder.rename(cache / former)  # as it was named by its source's place
    (cache / former / "sources.json").unlink()

    store = opened(Leaf, tmp_path / "data", cache)
    assert store.known_as == {store.folder.name, former}
    assert opened(Leaf, tmp_path / "data", cache).known_as == store.known_as
    view = whole(Leaf, path="", classes="digits").select(store)
    assert len(view.known_as) == 2


def test_half_stores_of_killed_conversions_are_removed(cache: Path) -> None:
    cache.mkdir()
    names = [".leaf-0123456789abcdef-ab_d1234", ".tff-abcd1234", ".leaf-0123456789abcdef-alive123"]
    for name in [*names, ".mine-abcd1234", "leaf"]:
        (cache / name).mkdir()
        (cache / name / "images.u8").write_bytes(bytes(10))
    alive = os.open(cache / names[2], os.O_RDONLY)
    try:
        fcntl.flock(alive, fcntl.LOCK_EX)
        glyphs = whole(Glyphs, writers=2).convert(cache, 2)
    finally:
        os.close(alive)

    left = {path.name for path in cache.iterdir()}
    assert left == {names[2], ".mine-abcd1234", "leaf", glyphs.folder.name}
    whole(Glyphs, writers=2).convert(cache, 2)
    assert not (cache / names[2]).exists()


def test_a_conversion_goes_on_while_another_process_looks(tmp_path: Path, cache: Path) -> None:
    def during(people: list[Person]) -> Any:
        for place, (name, images, labels) in enumerate(people):
            whole(Glyphs, writers=1, seed=place).convert(cache, 1)  # removes what is abandoned
            from femfed.data.store import Handwriting

            yield Handwriting(name, 0, place, images, labels)

    store = stored_by_content(cache, {"dataset": "test"}, lambda: during(TRAINED))

    assert len(store) == 3
    assert stored(cache, {"dataset": "other"}, lambda: during(TRAINED)).names == store.names


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"writers": 2_000_000}, r"dataset\.writers=2000000: 2,000,000 writers; expected at most"),
        ({"writers": None}, r"evaluate\.unseen_fraction ask for 60,000,000 writers; expected"),
    ],
)
def test_too_many_writers_are_not_drawn(overrides: dict[str, Any], said: str, cache: Path) -> None:
    with pytest.raises(UserError, match=said):
        whole(Glyphs, **overrides).convert(cache, 60_000_000)


def test_room_on_the_disk_is_looked_at_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf(tmp_path / "data", TRAINED, HELD_OUT)
    usage = namedtuple("usage", "total used free")(100, 100, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    for convert in (
        lambda: opened(Leaf, tmp_path / "data", cache),
        lambda: whole(Glyphs, writers=1000).convert(cache, 1),
    ):
        with pytest.raises(UserError, match=r"GB or more in the cache .* 0\.0 GB are free; make"):
            convert()
    assert not list(cache.iterdir())


def test_more_shards_than_images_are_refused(cache: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.shards=100000000: 4 clients .* a client; lower"):
        open_federation(
            whole(Glyphs, writers=4, partition="shards", shards=100_000_000),
            cache,
            clients=4,
            seed=0,
            unseen_fraction=0.0,
            test_fraction=0.1,
            on_status=lambda line: None,
            on_message=lambda line: None,
        )


ODD = ["w\nerror: x", "w\x1b[31m", "[red]w", "w\0", "w\ttab", "w😀", "w\u202e", "w" * 500]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_odd_names_are_one_harmless_line(name: str, tmp_path: Path, cache: Path) -> None:
    person = (name, *TRAINED[0][1:])
    (file,) = write_leaf_shards(tmp_path / "data", [person], split=False)
    assert opened(Leaf, file, cache).names == (name,)

    file.write_text(file.read_text().replace("[0, 12, 24, 36, 48]", "[0, 12, 24, 36, 99]"))
    with pytest.raises(UserError, match="label 99 at image 4") as refused:
        opened(Leaf, file, cache)
    line = str(refused.value)
    assert line.isprintable()
    assert "[red]" not in line
    assert len(line) < 500

"""LEAF's shards: read as published, or refused with the file, the writer and the place."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import femfed.data.leaf as leaf
from femfed import UserError
from femfed.data.leaf import Leaf
from femfed.data.store import WriterStore
from tests.handwriting import (
    REAL_DATA,
    Person,
    needs_real_data,
    qmnist_writers,
    whole,
    write_leaf_shards,
)

TRAIN_0 = "train/all_data_0_niid_0_keep_0_train_9.json"
TEST_0 = "test/all_data_0_niid_0_keep_0_test_9.json"


def person(name: str, examples: int) -> Person:
    """Return a writer whose image i is all i, but for one row of all 256 values in a circle."""
    images = np.repeat(np.arange(examples, dtype=np.uint8), 784).reshape(-1, 28, 28)
    images.reshape(examples, 784)[:, :256] += np.arange(256, dtype=np.uint8)
    return name, images, np.arange(examples) % 62


def people(*examples: int) -> list[Person]:
    return [person(f"f{place:04}_00", n) for place, n in enumerate(examples)]


def store(path: Path, cache: Path) -> WriterStore:
    return whole(Leaf, path=str(path)).convert(cache, 2)


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    shard = json.loads(file.read_text())
    change(shard)
    file.write_text(json.dumps(shard))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Two shards of two and one writers, 10, 20 and 5 images, a tenth held out."""
    write_leaf_shards(tmp_path / "leaf", people(10, 20, 5), per_shard=2)
    return tmp_path / "leaf"


def test_split_layout_keeps_every_image_label_and_the_published_split(
    split: Path, cache: Path
) -> None:
    made = store(split, cache)

    # 10 - round(1.0), 20 - round(2.0), 5 - round(0.5): Python rounds a half to even, here to 0.
    assert made.train_examples.tolist() == [9, 18, 5]
    assert made.examples.tolist() == [10, 20, 5]
    assert made.numbers.tolist() == [0, 0, 1]
    assert made.subject_numbers.tolist() == [0, 1, 0]
    assert made.skipped_writers == 0
    for index, (name, images, labels) in enumerate(people(10, 20, 5)):
        writer = made.writer(index, test_fraction=0.5, seed=1)
        assert writer.name == name
        np.testing.assert_array_equal(writer.images, images)
        np.testing.assert_array_equal(writer.labels, labels)
    assert made.writer(0, 0.5, 1).test.tolist() == [9]


def test_all_256_grey_values_come_back(tmp_path: Path, cache: Path) -> None:
    write_leaf_shards(tmp_path / "leaf", people(1), split=False)

    made = store(tmp_path / "leaf", cache)

    assert made.images[0].ravel()[:256].tolist() == list(range(256))


def test_layout_without_split_publishes_none(tmp_path: Path, cache: Path) -> None:
    write_leaf_shards(tmp_path / "leaf", people(3, 4, 5), per_shard=1, split=False)

    made = store(tmp_path / "leaf", cache)

    assert made.train_examples.tolist() == [-1, -1, -1]
    assert made.numbers.tolist() == [0, 1, 2]
    assert made.examples.tolist() == [3, 4, 5]


def test_one_file_is_a_dataset(tmp_path: Path, cache: Path) -> None:
    write_leaf_shards(tmp_path / "leaf", people(3, 4), per_shard=1, split=False)

    made = store(tmp_path / "leaf" / "all_data_1.json", cache)

    assert (made.names, made.numbers.tolist()) == (("f0001_00",), [1])


def test_shards_are_in_numeric_order(tmp_path: Path, cache: Path) -> None:
    write_leaf_shards(tmp_path / "leaf", people(*[1] * 11), per_shard=1)

    made = store(tmp_path / "leaf", cache)

    assert made.numbers.tolist() == list(range(11))  # by the alphabet, 10 would follow 1
    assert list(made.names) == [f"f{place:04}_00" for place in range(11)]


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["7_test.json", "12_test.json"], [7, 12]),
        (["all_data_3_keep_0.json", "part9_all_data_4.json"], [3, 4]),
        (["keep_9_a.json", "keep_9_b.json"], [0, 1]),  # both would be 9
        (["a.json", "b5.json"], [0, 1]),  # a has no number, and 0 for it might be a later b0
    ],
)
def test_number_is_the_name_s_or_the_place(
    names: list[str], numbers: list[int], tmp_path: Path, cache: Path
) -> None:
    for name, writer in zip(names, people(1, 1), strict=True):
        (file,) = write_leaf_shards(tmp_path / name, [writer], split=False)
        (tmp_path / "leaf").mkdir(exist_ok=True)
        file.rename(tmp_path / "leaf" / name)

    made = store(tmp_path / "leaf", cache)

    assert (made.names, made.numbers.tolist()) == (("f0000_00", "f0001_00"), numbers)


def test_other_file_names_pair_by_their_number(split: Path, cache: Path) -> None:
    for half in ("train", "test"):
        for k in (0, 1):
            (file,) = (split / half).glob(f"all_data_{k}_*")
            file.rename(split / half / f"shard{k + 5}-{half}.json")
        (split / half / "._shard5.json").write_bytes(b"\0\5\x16\7")  # left by macOS

    assert store(split, cache).numbers.tolist() == [5, 5, 6]


def test_writers_of_one_half_only_follow_the_train_shard_s(split: Path, cache: Path) -> None:
    def drop(name: str) -> Callable[[dict[str, Any]], object]:
        def change(shard: dict[str, Any]) -> None:
            del shard["num_samples"][shard["users"].index(name)]
            shard["users"].remove(name)
            del shard["user_data"][name]

        return change

    edit(split / TRAIN_0, drop("f0000_00"))
    edit(split / TEST_0, drop("f0001_00"))

    made = store(split, cache)

    assert made.names == ("f0001_00", "f0000_00", "f0002_00")
    assert made.subject_numbers.tolist() == [0, 1, 0]
    assert made.examples.tolist() == [18, 1, 5]
    assert made.train_examples.tolist() == [18, 0, 5]


def test_writers_without_images_are_counted_and_keep_their_place(
    tmp_path: Path, cache: Path
) -> None:
    write_leaf_shards(tmp_path / "leaf", people(2, 0, 3))

    made = store(tmp_path / "leaf", cache)

    assert made.skipped_writers == 1
    assert made.subject_numbers.tolist() == [0, 2]


def test_second_opening_reads_no_shard(
    split: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store(split, cache)

    def refuse(*_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(leaf, "_read", refuse)
    monkeypatch.setattr(leaf, "_decode", refuse)

    assert store(split, cache).folder == first.folder


def test_changed_source_is_stored_anew(split: Path, cache: Path) -> None:
    first = store(split, cache)
    stat = (split / TEST_0).stat()
    edit(split / TEST_0, lambda shard: shard["user_data"]["f0000_00"].update(y=[7]))
    os.utime(split / TEST_0, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert (split / TEST_0).stat().st_size == stat.st_size

    second = store(split, cache)

    assert first.labels[9] == 9
    assert second.labels[9] == 7
    assert second.folder != first.folder


Change = Callable[[dict[str, Any]], object]


def in_writer(change: Change) -> Change:
    """Change what the second writer of the first test shard has: 2 images, labels 18 and 19."""
    return lambda shard: change(shard["user_data"]["f0001_00"])


WRITER = "all_data_0_niid_0_keep_0_test_9.json: writer f0001_00: "
BROKEN_SHARDS: dict[str, tuple[Change, list[str]]] = {
    "no users": (lambda s: s.pop("users"), ["missing required field `users`", "num_samples"]),
    "users are numbers": (
        lambda s: s.update(users=[1, 2]),
        ["`str`, got `int` - at `$.users[0]`"],
    ),
    "no y": (in_writer(lambda w: w.pop("y")), [WRITER, "missing required field `y`"]),
    "783 values": (
        in_writer(lambda w: w["x"][1].pop()),
        [WRITER, "image 1 has 783 values; expected 784"],
    ),
    "28 rows": (
        in_writer(lambda w: w["x"].__setitem__(1, [[0.0] * 28] * 28)),
        [WRITER, "got `array` - at `$.x[1][0]`"],
    ),
    "pixel above 1": (
        in_writer(lambda w: w["x"][1].__setitem__(783, 1.5)),
        [WRITER, "pixel 783 of image 1 is 1.5; expected 0..1"],
    ),
    "pixel below 0": (
        in_writer(lambda w: w["x"][0].__setitem__(0, -0.25)),
        [WRITER, "pixel 0 of image 0 is -0.25", "divide values of 0..255 by 255"],
    ),
    "pixel NaN": (
        in_writer(lambda w: w["x"][1].__setitem__(5, float("nan"))),
        ["test_9.json: ", "not finite, 'NaN", "at byte ", "writer f0001_00, image 1, pixel 5"],
    ),
    "pixel infinite": (
        in_writer(lambda w: w["x"][0].__setitem__(0, -float("inf"))),
        ["not finite, '-Infinity", "writer f0001_00, image 0, pixel 0"],
    ),
    "pixel is a word": (
        in_writer(lambda w: w["x"][1].__setitem__(3, "white")),
        [WRITER, "got `str` - at `$.x[1][3]`"],
    ),
    "label 62": (
        in_writer(lambda w: w.update(y=[18, 62])),
        [WRITER, "label 62 at image 1; expected 0..61"],
    ),
    "label -1": (in_writer(lambda w: w.update(y=[-1, 19])), [WRITER, "label -1 at image 0"]),
    "label beyond int64": (
        in_writer(lambda w: w.update(y=[2**70, 19])),
        [WRITER, f"label {2**70} at image 0"],
    ),
    "label is a letter": (
        in_writer(lambda w: w.update(y=[18, "a"])),
        [WRITER, "Expected `int | float`, got `str` - at `$.y[1]`"],
    ),
    "one label too few": (
        in_writer(lambda w: w.update(y=[18])),
        [WRITER, "2 images in x but 1 labels in y"],
    ),
    "user without data": (
        lambda s: s["user_data"].pop("f0001_00"),
        ["test_9.json: writer f0001_00, place 1 of users, is missing in user_data"],
    ),
    "data without user": (
        lambda s: s["user_data"].update(f9999_00={"x": [], "y": []}),
        ["test_9.json: writer f9999_00 stands in user_data but not in users"],
    ),
    "user listed twice": (
        lambda s: s.update(users=["f0000_00"] * 2),
        ["writer f0000_00 stands in users twice, again at place 1"],
    ),
    "num_samples wrong": (
        lambda s: s.update(num_samples=[1, 3]),
        [WRITER, "num_samples says 3 but user_data holds 2 images"],
    ),
    "num_samples short": (
        lambda s: s.update(num_samples=[1]),
        ["test_9.json: 2 users but 1 num_samples"],
    ),
    "writer of another shard": (
        lambda s: (
            s["users"].append("f0002_00"),
            s["num_samples"].append(0),
            s["user_data"].update(f0002_00={"x": [], "y": []}),
        ),
        ["writer f0002_00 stands in ", "all_data_0", "all_data_1", "expected one shard a writer"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_broken_shard_is_one_clear_line_and_no_store(case: str, split: Path, cache: Path) -> None:
    change, said = BROKEN_SHARDS[case]
    edit(split / TEST_0, change)

    refuses(split, cache, said)


Spoil = Callable[[bytes], bytes]
WHOLE = b'{"users": ["a"], "num_samples": [1], "user_data": {"a": {"x": [[0.5, 1]], "y": [3]}}}'
BROKEN_TEXTS: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["cut off after 0 bytes"]),
    "cut off in an image": (WHOLE[:70], ["cut off after 70 bytes, in writer a, image 0, pixel 1"]),
    "cut off in the users": (WHOLE[:12], ["cut off after 12 bytes; "]),
    "comma missing": (
        WHOLE.replace(b"0.5, 1", b"0.5 1"),
        [f"at byte {WHOLE.index(b', 1]') + 1}, in writer a, image 0, pixel 0: '1]]"],
    ),
    "word for a label": (
        WHOLE.replace(b"[3]", b"[3, x]"),
        [f"at byte {WHOLE.index(b'3]') + 3}, in writer a, label 1: 'x]"],
    ),
    "cut off behind a writer": (WHOLE[:-2], [f"cut off after {len(WHOLE) - 2} bytes; "]),
    "more behind the end": (WHOLE + b" x", [f"trailing characters at byte {len(WHOLE) + 1}: 'x'"]),
    "a list": (b"[]", ["Expected `object`, got `array`", "users, num_samples, user_data"]),
    "Latin-1 name": (WHOLE.replace(b'["a"]', b'["\xe9a"]'), ["not UTF-8 at byte 12"]),
    "UTF-16": (WHOLE.decode().encode("utf-16"), ["at byte 0", "expected UTF-8"]),
    "zip": (b"PK\3\4\x14\0\0\0", ["at byte 0: 'PK"]),
    "nested without end": (b'{"more": ' + b"[" * 10**5, ["nested too deeply"]),
}


@pytest.mark.parametrize("case", BROKEN_TEXTS)
def test_broken_text_is_named_by_file_and_byte(case: str, tmp_path: Path, cache: Path) -> None:
    text, said = BROKEN_TEXTS[case]
    file = tmp_path / "all_data_0.json"
    file.write_bytes(text)

    refuses(file, cache, [f"{file}: ", *said])


@pytest.mark.parametrize("path", [None, "", "  "])
def test_no_path_says_which_key_to_set(path: str | None, cache: Path) -> None:
    with pytest.raises(UserError, match=r"dataset=leaf needs dataset\.path=PATH"):
        whole(Leaf, path=path).convert(cache, 2)


def test_missing_path_is_named_in_full(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(Path("nowhere"), cache, ["dataset.path=nowhere does not exist", f"{tmp_path}/nowhere"])


def test_tilde_is_the_home_folder(
    split: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(split.parent))

    assert len(whole(Leaf, path="~/leaf").convert(cache, 2)) == 3


def test_folder_without_shards_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "leaf").mkdir()
    (tmp_path / "leaf" / "README.txt").touch()

    refuses(tmp_path / "leaf", cache, ["no JSON files in", "leaf; expected LEAF shards"])


def test_half_of_a_split_is_refused(split: Path, cache: Path) -> None:
    (split / "test").rename(split / "tset")

    refuses(split, cache, ["has a folder train/ but no test/", f"dataset.path={split}/train"])


@pytest.mark.parametrize(("lost", "half"), [(TEST_0, "test"), (TRAIN_0, "train")])
def test_shard_without_partner_is_refused(lost: str, half: str, split: Path, cache: Path) -> None:
    (split / lost).unlink()

    refuses(split, cache, ["all_data_0_niid_0_keep_0_", f"{half}/ holds no file of shard 0"])


def test_two_files_of_one_number_do_not_pair(split: Path, cache: Path) -> None:
    (split / "train" / "all_data_0_copy.json").write_bytes((split / TRAIN_0).read_bytes())

    refuses(split, cache, ["all_data_0_copy.json and all_data_0_niid", "are both shard 0"])


def in_one_folder(split: Path) -> None:
    for half in ("train", "test"):
        for file in (split / half).iterdir():
            file.rename(split / file.name)
        (split / half).rmdir()


def test_train_and_test_in_one_folder_are_told_apart_by_their_names(
    split: Path, cache: Path
) -> None:
    apart = store(split, cache)
    in_one_folder(split)

    assert store(split, cache).train_examples.tolist() == apart.train_examples.tolist()

    (split / "all_data_2.json").write_bytes((split / Path(TRAIN_0).name).read_bytes())
    with pytest.raises(UserError, match=r"all_data_2\.json stands beside .* is of neither half"):
        store(split, cache)


@pytest.mark.parametrize("method", ["read_bytes", "iterdir"])
def test_unreadable_file_or_folder_is_named(
    method: str, split: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path) -> None:  # chmod would not stop tests that run as root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, method, deny)
    with pytest.raises(UserError, match=rf"cannot read {split}/train.*: Permission denied; "):
        store(split, cache)
    monkeypatch.undo()
    assert not stores(cache)


def stores(cache: Path) -> list[Path]:
    return list(cache.iterdir()) if cache.exists() else []


def refuses(path: Path, cache: Path, said: list[str]) -> None:
    """Assert that `path` gives one line that says all of `said`, and leaves no file behind."""
    with pytest.raises(UserError) as caught:
        store(path, cache)
    message = str(caught.value)
    assert [part for part in said if part not in message] == [], message
    assert "\n" not in message
    assert not stores(cache)


def test_generated_shards_are_what_json_dump_writes(tmp_path: Path) -> None:
    (file,) = write_leaf_shards(tmp_path, people(2, 3), split=False)

    shard = {
        "users": ["f0000_00", "f0001_00"],
        "num_samples": [2, 3],
        "user_data": {
            name: {"x": (images.reshape(-1, 784) / 255).tolist(), "y": labels.tolist()}
            for name, images, labels in people(2, 3)
        },
    }

    assert file.read_text() == json.dumps(shard)


@needs_real_data
def test_real_shards(cache: Path) -> None:
    made = store(REAL_DATA / "leaf", cache)

    assert (len(made), len(made.labels)) == (28, 1761)
    assert set(made.labels.tolist()) == set(range(62))
    assert made.names[0] == "f0027_29"
    assert made.numbers.tolist() == [0] * 6 + [1] * 5 + [2] * 5 + [3] * 6 + [4] * 6
    assert made.subject_numbers.tolist() == [*range(6), *range(5), *range(5), *range(6), *range(6)]
    assert set(made.train_examples.tolist()) == {-1}
    shard = json.loads((REAL_DATA / "leaf" / "2_test.json").read_text())
    for name, data in shard["user_data"].items():
        writer = made.writer(made.names.index(name), 0.1, 0)
        np.testing.assert_array_equal(writer.images.reshape(-1, 784) / 255, data["x"])
        assert writer.labels.tolist() == data["y"]


@needs_real_data
def test_real_fixture_of_two_writers(cache: Path) -> None:
    made = store(REAL_DATA / "leaf_two_writers" / "femnist_test_data.json", cache)

    assert made.names == ("f2351_74", "f2505_79")
    assert made.examples.tolist() == [5, 3]
    assert made.labels.tolist()[5:] == [38, 54, 56]
    assert made.images.max() == 255


@needs_real_data
def test_qmnist_writers_survive_the_published_layout(tmp_path: Path, cache: Path) -> None:
    writers = [writer for _, writer in zip(range(4), qmnist_writers(), strict=False)]
    write_leaf_shards(tmp_path / "leaf", writers, per_shard=3)

    made = store(tmp_path / "leaf", cache)

    assert made.names == tuple(name for name, _, _ in writers)
    assert made.numbers.tolist() == [0, 0, 0, 1]
    np.testing.assert_array_equal(made.images, np.concatenate([writer[1] for writer in writers]))
    np.testing.assert_array_equal(made.labels, np.concatenate([writer[2] for writer in writers]))
    assert np.median(made.images) == 255  # white paper

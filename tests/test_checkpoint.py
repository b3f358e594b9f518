"""Checkpoints: read back exactly, two are kept, whole or not there, damage is seen."""

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from femfed.checkpoint import (
    Checkpoint,
    DamagedError,
    load,
    path_of,
    remove_others,
    rounds,
    save,
    sha256,
)

A_FLOAT = np.float32(0.1)


def a_checkpoint(number: int) -> Checkpoint:
    weights = [np.full((2, 3), A_FLOAT), np.arange(4, dtype=np.float32)]
    return Checkpoint(number, weights, {"momentum": [-w for w in weights], "empty": []})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = a_checkpoint(7)
    saved.weights.append(np.float32([np.nan, np.inf, -0.0, 1e-45]))

    path = save(tmp_path / "made" / "here", saved)
    loaded = load(path)

    assert path == tmp_path / "made/here/round_000007.npz"
    assert loaded.round == 7
    assert list(loaded.state) == ["momentum", "empty"]
    for ours, theirs in [(saved.weights, loaded.weights), *zip(
        saved.state.values(), loaded.state.values(), strict=True
    )]:  # fmt: skip
        assert [(w.shape, w.dtype) for w in ours] == [(w.shape, w.dtype) for w in theirs]
        assert [w.tobytes() for w in ours] == [w.tobytes() for w in theirs]


def test_a_checkpoint_without_state(tmp_path: Path) -> None:
    assert load(save(tmp_path, Checkpoint(1, [np.zeros(1, np.float32)], {}))).state == {}


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for number in (8, 9, 10, 11):
        save(tmp_path, a_checkpoint(number))

    assert rounds(tmp_path) == [10, 11]
    assert len(list(tmp_path.iterdir())) == 3  # and one to overwrite
    remove_others(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round_000010.npz", "round_000011.npz"]
    remove_others(tmp_path)


def test_one_that_nobody_needs_is_overwritten(tmp_path: Path) -> None:
    short = Checkpoint(4, [np.float32([1, 2])], {})
    with save(tmp_path, a_checkpoint(1)).open("rb") as first:  # or a new file could get its number
        for number in (2, 3):
            save(tmp_path, a_checkpoint(number))

        path = save(tmp_path, short)

        assert path.stat().st_ino == os.fstat(first.fileno()).st_ino
    assert path.stat().st_size == save(tmp_path / "new", short).stat().st_size
    assert load(path).weights[0].tolist() == [1, 2]
    assert [load(path_of(tmp_path, number)).round for number in rounds(tmp_path)] == [3, 4]


def test_one_that_somebody_linked_to_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "kept").hardlink_to(save(tmp_path, a_checkpoint(1)))
    before = (tmp_path / "kept").read_bytes()

    for number in (2, 3, 4):
        save(tmp_path, a_checkpoint(number))

    assert (tmp_path / "kept").read_bytes() == before
    assert rounds(tmp_path) == [3, 4]


def test_one_that_is_not_to_be_written_to_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("femfed.checkpoint.os.access", lambda path, mode: mode != os.W_OK)
    with save(tmp_path, a_checkpoint(1)).open("rb") as first:
        before = first.read()
        for number in (2, 3, 4):
            save(tmp_path, a_checkpoint(number))
        first.seek(0)

        assert first.read() == before
    assert rounds(tmp_path) == [3, 4]


def test_what_a_killed_process_had_begun_is_removed(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path, a_checkpoint(number))
    (tmp_path / ".round_000004.npz.123").write_bytes(b"half")
    (tmp_path / ".theirs").touch()

    remove_others(tmp_path)

    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".theirs",
        "round_000002.npz",
        "round_000003.npz",
    ]


def test_a_failed_overwriting_leaves_the_newest_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3):
        save(tmp_path, a_checkpoint(number))

    monkeypatch.setattr("femfed.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="full"):
        save(tmp_path, a_checkpoint(4))

    assert sorted(p.name for p in tmp_path.iterdir()) == ["round_000002.npz", "round_000003.npz"]
    assert [load(path_of(tmp_path, number)).round for number in (2, 3)] == [2, 3]


def full(descriptor: int) -> None:
    raise OSError("full")


def test_what_was_just_saved_is_there(tmp_path: Path) -> None:
    save(tmp_path, a_checkpoint(10))
    save(tmp_path, a_checkpoint(20))

    assert save(tmp_path, a_checkpoint(5)).exists()  # an older round run again in the same folder


def test_saving_a_round_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, a_checkpoint(1))

    path = save(tmp_path, Checkpoint(1, [np.zeros(1, np.float32)], {}))

    assert load(path).weights[0].tolist() == [0]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(tmp_path, a_checkpoint(1))

    monkeypatch.setattr("femfed.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="full"):
        save(tmp_path, a_checkpoint(2))

    assert list(tmp_path.iterdir()) == [before]
    assert load(before).round == 1


def test_objects_are_not_pickled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        save(tmp_path, Checkpoint(1, [np.array([object()])], {}))

    assert list(tmp_path.iterdir()) == []


def test_a_damaged_number_is_recognised(tmp_path: Path) -> None:
    path = save(tmp_path, a_checkpoint(1))
    content = path.read_bytes()
    path.write_bytes(content.replace(A_FLOAT.tobytes(), np.float32(0.2).tobytes(), 1))

    with pytest.raises(DamagedError):
        load(path)


def test_half_a_file_is_recognised(tmp_path: Path) -> None:
    path = save(tmp_path, a_checkpoint(1))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])

    with pytest.raises(DamagedError):
        load(path)


@pytest.mark.parametrize("damage", ["empty", "first byte", "a name"])
def test_any_damage_is_the_documented_error(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, a_checkpoint(1))
    content = path.read_bytes()
    directory = content.rindex(b"about.npy")  # the second time it is named
    broken = {
        "empty": b"",
        "first byte": b"?" + content[1:],
        "a name": content[:directory] + b"?" + content[directory + 1 :],
    }
    path.write_bytes(broken[damage])

    with pytest.raises(DamagedError):
        load(path)


def test_no_damaged_byte_gives_other_numbers(tmp_path: Path) -> None:
    saved = a_checkpoint(1)
    path = save(tmp_path, saved)
    content = path.read_bytes()
    expected = [w.tobytes() for w in saved.weights + saved.state["momentum"]]

    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            loaded = load(path)
        except DamagedError:
            continue
        found = [w.tobytes() for w in loaded.weights + loaded.state["momentum"]]
        assert (loaded.round, found) == (1, expected), place


@pytest.mark.parametrize("order", ["<f4", ">f4"])
def test_sha256_is_over_little_endian_bytes(order: str) -> None:
    weights = [np.array([[1.0, 2.0], [0.1, -0.0]], order), np.array([3.0], order)]

    by_hand = struct.pack("<5f", 1.0, 2.0, 0.1, -0.0, 3.0)

    assert by_hand[:4] == b"\x00\x00\x80\x3f"  # 1.0, its lowest byte first
    assert sha256(weights) == hashlib.sha256(by_hand).hexdigest()


def test_sha256_is_over_rows_whatever_lies_in_memory() -> None:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)

    assert sha256([np.asfortranarray(weights)]) == sha256([weights]) != sha256([weights.T])

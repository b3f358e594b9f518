"""The wire: what may be built from a message, how cohorts are cut, by reference as by value."""

import errno
import fcntl
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from femfed import UserError
from femfed.engine.apps import cut
from femfed.engine.direct import buffer
from femfed.engine.wire import (
    Inbox,
    Outbox,
    construct,
    describe,
    mapped,
    row_bytes,
    shared_folder,
    to_json,
)
from femfed.local import DivergedError, Local
from femfed.models import CNN, Dense
from femfed.strategies.fedprox import FedProx
from tests.test_personal import past_the_cache

# Longer than the pieces that sums are taken in.
PARAMETERS = 65_536 + 3


# what may be built


@dataclass(frozen=True)
class Foreign:
    number: int


@pytest.mark.parametrize(
    "thing",
    [FedProx(0.1), CNN(True, 0.25, 0.5), Dense(False, (7, 8)), Local(1, 20, 0.1, 0.0, 0.0)],
    ids=lambda thing: type(thing).__name__,
)
def test_what_is_described_can_be_made_again(thing: object) -> None:
    line = to_json(thing=describe(thing))

    assert "\n" not in line
    assert construct(json.loads(line)["thing"]) == thing


def test_equal_parts_are_one_line() -> None:
    assert to_json(b=1, a={"d": 2, "c": 3}) == to_json(a={"c": 3, "d": 2}, b=1)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "collections.abc.Callable",
        "femfedx.Thing",
        "femfed.UserError",  # of the package, not of a module of it
        "femfed.engine.folders.OwnedFolder",  # a class, but no dataclass
        "femfed.engine.wire.describe",  # a function
        "femfed.engine.wire.shutil",  # a module
        "femfed.models.CLASSES",  # a number
        "",
    ],
)
def test_nothing_else_is_made(name: str) -> None:
    with pytest.raises(ValueError, match="will not construct"):
        construct({"type": name, "fields": {}})


def test_a_foreign_dataclass_is_not_made() -> None:
    with pytest.raises(ValueError, match="will not construct"):
        construct(describe(Foreign(1)))


def test_an_imported_dataclass_is_not_made() -> None:
    fields = {"run_id": 1, "node_id": 1, "node_config": {}, "state": None, "run_config": {}}

    with pytest.raises(ValueError, match="will not construct"):
        construct({"type": "femfed.engine.apps.Context", "fields": fields})


@pytest.mark.parametrize("name", ["femfed.models.Missing", "femfed.missing.Thing"])
def test_what_is_not_there_is_not_made(name: str) -> None:
    with pytest.raises(ValueError, match="cannot construct"):
        construct({"type": name, "fields": {}})


def test_only_dataclasses_are_described() -> None:
    with pytest.raises(TypeError):
        describe(object())


# how a cohort is cut


@pytest.mark.parametrize("bundle", [None, 1, 3, 1000])
@pytest.mark.parametrize("workers", [1, 2, 3, 16])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 10, 100, 3597])
def test_a_cut_covers_every_item_once_largest_first(
    n: int, workers: int, bundle: int | None
) -> None:
    sizes = np.random.default_rng(n).integers(1, 300, n)

    bundles = cut(sizes, workers, bundle)

    places = list(chain.from_iterable(bundles))
    assert sorted(places) == list(range(n))
    assert (np.diff(sizes[places]) <= 0).all()
    assert all(bundles)
    if bundle is not None:
        assert [len(each) for each in bundles[:-1]] == [bundle] * (len(bundles) - 1)
        assert len(bundles) == -(-n // bundle)
    else:
        lengths = [len(each) for each in bundles]
        assert lengths == sorted(lengths, reverse=True)
        assert len(bundles) >= min(n, workers)  # nobody is idle,
        assert len(bundles) <= (1 if workers == 1 else 2 * workers * 12)  # nor are messages many


def test_a_cut_by_hand() -> None:
    # Largest first, equal ones in their order. Two workers, half of a fair share of what is left:
    # ceil(6/4) = 2, ceil(4/4) = 1, and one after the other.
    sizes = np.array([5, 9, 5, 7, 1, 5])

    assert cut(sizes, 2, None) == [[1, 3], [0], [2], [5], [4]]
    assert cut(sizes, 1, None) == [[1, 3, 0, 2, 5, 4]]
    assert cut(sizes, 2, 4) == [[1, 3, 0, 2], [5, 4]]


def test_the_number_of_bundles_depends_on_no_size() -> None:
    sizes = np.random.default_rng(0).integers(1, 300, 100)

    assert [len(b) for b in cut(sizes, 4, None)] == [len(b) for b in cut(np.ones(100), 4, None)]


# turns


def test_no_two_workers_take_the_same_client(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, PARAMETERS)
    for _ in range(2):  # the turns of one phase after those of another
        content, turns = outbox.publish([np.zeros(PARAMETERS, np.float32)]), outbox.start_turns()
        inboxes = [Inbox(PARAMETERS) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            some = [pool.submit(list, each.places(content, turns, 500)) for each in inboxes]
            taken = [each.result() for each in some]
        assert sorted(chain.from_iterable(taken)) == list(range(500))
        assert all(list(np.sort(each)) == each for each in taken)
        assert outbox.turns_taken() == 508


def test_turns_end_when_one_says_so(tmp_path: Path) -> None:
    outbox, inbox = Outbox(tmp_path, PARAMETERS), Inbox(PARAMETERS)
    content, turns = outbox.publish([np.zeros(PARAMETERS, np.float32)]), outbox.start_turns()
    places = inbox.places(content, turns, 10)
    assert next(places) == 0
    outbox.end_turns()
    assert list(places) == []
    assert list(Inbox(PARAMETERS).places(content, turns, 10)) == []


def test_who_is_left_of_an_engine_takes_no_turn_of_the_next(tmp_path: Path) -> None:
    old, new = Outbox(tmp_path, PARAMETERS), Outbox(tmp_path, PARAMETERS)
    content = new.publish([np.zeros(PARAMETERS, np.float32)])
    before, after = old.start_turns(), new.start_turns()
    assert len(list(Inbox(PARAMETERS).places(content, before, 10))) == 10
    assert list(Inbox(PARAMETERS).places(content, after, 10)) == list(range(10))


def test_without_turns_all_of_a_message_is_the_workers_own() -> None:
    assert list(Inbox(PARAMETERS).places(RecordDict(), "", 3)) == [0, 1, 2]


# weights and updates, by reference and by value


@pytest.fixture(params=["by reference", "by value"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "by reference" else None


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(0).normal(size=PARAMETERS).astype(np.float32)


def sums(n: int) -> list[np.ndarray]:
    """Sums of weighted deltas as workers make them: multiples of 2**-30."""
    draw = np.random.default_rng(1)
    return [draw.integers(-(2**40), 2**40, PARAMETERS) * 2.0**-30 for _ in range(n)]


def test_weights_arrive(folder: Path | None, weights: np.ndarray) -> None:
    outbox, inbox = Outbox(folder, PARAMETERS), Inbox(PARAMETERS)

    for sent in (weights, -weights):  # the second time over what is there
        found = inbox.weights(outbox.publish([sent]))
        assert found.dtype == np.float32
        assert np.array_equal(found, sent)


def test_the_mean_of_several_workers(
    folder: Path | None, weights: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, replies, parts = Outbox(folder, PARAMETERS), [], sums(3)
    for pid, part in enumerate(parts, start=1):
        monkeypatch.setattr("femfed.engine.wire.os.getpid", lambda pid=pid: pid)
        content, inbox = outbox.publish([weights]), Inbox(PARAMETERS)
        total, lives_on = inbox.sum(content)
        assert (total.shape, total.dtype, lives_on) == (
            (PARAMETERS,),
            np.float64,
            folder is not None,
        )
        total[:] = part
        replies.append(RecordDict())
        inbox.put_sum(replies[-1], total, lives_on=lives_on)
    monkeypatch.undo()

    (mean,) = outbox.means(replies, 7)

    assert mean.dtype == np.float32
    assert np.array_equal(mean, ((parts[0] + parts[1] + parts[2]) / 7).astype(np.float32))
    assert np.array_equal(mean, outbox.means(replies[::-1], 7)[0])


def test_a_worker_that_replies_twice_is_counted_once(tmp_path: Path, weights: np.ndarray) -> None:
    """By reference a worker's sum lives on: two bundles are folded into one file."""
    outbox, inbox, replies = Outbox(tmp_path, PARAMETERS), Inbox(PARAMETERS), []
    first, second = sums(2)
    for part, begins in ((first, True), (second, False)):
        total, lives_on = inbox.sum(outbox.publish([weights]))
        total[:] = part if begins else total + part
        replies.append(RecordDict())
        inbox.put_sum(replies[-1], total, lives_on=lives_on)

    assert np.array_equal(outbox.means(replies, 2)[0], ((first + second) / 2).astype(np.float32))


WAYS = {"by value": 0, "by reference": 2, "past the cache": 1}  # and the memory there is, in rows


@pytest.mark.parametrize("way", WAYS)
def test_single_updates_arrive_in_their_rows(
    tmp_path: Path, weights: np.ndarray, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    available, writev = WAYS[way] * 5 * row_bytes(PARAMETERS), os.writev

    def slow(descriptor: int, parts: list[memoryview]) -> int:
        time.sleep(0.02)  # the next one is there by then
        return writev(descriptor, parts)

    monkeypatch.setattr("femfed.engine.wire.available_memory", lambda: available)
    monkeypatch.setattr(os, "writev", slow)
    outbox = Outbox(None if way == "by value" else tmp_path, PARAMETERS)
    outbox.reserve_updates(5)
    slots = [[3, 1], [0], [], [2, 4]]
    inboxes = [Inbox(PARAMETERS) for _ in slots]
    for round in (1, 2):  # and rows are read before they are overwritten
        rows = round + np.arange(5 * PARAMETERS, dtype=np.float32).reshape(5, PARAMETERS)
        replies = []
        for inbox, places in zip(inboxes, slots, strict=True):
            content, reply, made = outbox.publish([weights]), RecordDict(), []
            with inbox:
                for place in places:
                    with inbox.update(content, place) as update:
                        update[:] = rows[place]
                    made.append(update)
            inbox.put_updates(content, reply, made)
            replies.append(reply)

        updates = outbox.updates(replies, slots, 5)

        assert updates.dtype == np.float32
        assert np.array_equal(updates, rows)
        for number, row in enumerate(rows):
            reader, pages = outbox.reader(number), buffer(row_bytes(PARAMETERS))
            assert (reader is None) == (way != "past the cache")
            for begin in (0, 1024, 65_536) if reader else ():
                read = np.frombuffer(pages, np.float32)
                reader(begin, read)  # may hold more than there is
                assert np.array_equal(read[: PARAMETERS - begin], row[begin:])
                reader(begin, read[:1024])


def test_too_many_updates_are_written_past_the_cache_in_whole_blocks(
    tmp_path: Path, weights: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, found, real = past_the_cache(tmp_path), list[tuple[int, int]](), os.writev

    def noted(descriptor: int, parts: list[memoryview]) -> int:
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        found.append((fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct, place))
        return real(descriptor, parts)

    monkeypatch.setattr(os, "writev", noted)
    monkeypatch.setattr("femfed.engine.wire.available_memory", lambda: 2**18)
    with Outbox(tmp_path, PARAMETERS) as outbox, Inbox(PARAMETERS) as inbox:
        outbox.reserve_updates(3)
        content = outbox.publish([weights])
        for slot in (2, 0):
            with inbox.update(content, slot) as update:
                update[:] = weights

    assert found == [(direct, 2 * (262_144 + 4096)), (direct, 0)]


def test_an_update_past_the_cache_is_written_only_when_it_is_whole(
    tmp_path: Path, weights: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("femfed.engine.wire.available_memory", lambda: 0)
    outbox, inbox = Outbox(tmp_path, PARAMETERS), Inbox(PARAMETERS)
    outbox.reserve_updates(2)
    content = outbox.publish([weights])
    with pytest.raises(DivergedError), inbox, inbox.update(content, 1) as update:
        update[:] = np.nan
        raise DivergedError
    with inbox, inbox.update(content, 0) as update:
        update[:] = weights

    updates = outbox.updates([], [], 2)

    assert np.array_equal(updates[0], weights)
    assert not updates[1].any()


def test_an_update_that_could_not_be_written_is_told(
    tmp_path: Path, weights: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int, parts: list[memoryview]) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("femfed.engine.wire.available_memory", lambda: 0)
    outbox, inbox = Outbox(tmp_path, PARAMETERS), Inbox(PARAMETERS)
    outbox.reserve_updates(2)
    content = outbox.publish([weights])
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", broken)
        told = pytest.raises(OSError, match=r"Input/output error: .*updates")
        with told, inbox, inbox.update(content, 0):
            pass
        with inbox:
            with inbox.update(content, 0):
                pass
            with told, inbox.update(content, 1):
                pass

    with inbox, inbox.update(content, 1) as update:
        update[:] = weights
    assert np.array_equal(outbox.updates([], [], 2)[1], weights)


def test_updates_take_no_room_after_a_run_that_its_workers_outlive(
    tmp_path: Path, weights: np.ndarray
) -> None:
    with Outbox(tmp_path, PARAMETERS) as outbox:
        outbox.reserve_updates(50)
        idle = Inbox(PARAMETERS)
        with idle.update(outbox.publish([weights]), 1) as update:
            update[:] = 1
        assert (tmp_path / "updates").stat().st_blocks

    assert (tmp_path / "updates").stat().st_blocks <= 8  # the last page may be part of one
    assert not update.any()


def test_an_inbox_follows_the_run_to_its_folder(tmp_path: Path, weights: np.ndarray) -> None:
    inbox = Inbox(PARAMETERS)
    for sent, name in ((weights, "one"), (-weights, "two")):
        (tmp_path / name).mkdir()
        content = Outbox(tmp_path / name, PARAMETERS).publish([sent])

        assert np.array_equal(inbox.weights(content), sent)


def test_a_mapped_file_is_shared(tmp_path: Path) -> None:
    made = mapped(tmp_path / "numbers", 3, np.float64, create=True)
    found = mapped(tmp_path / "numbers", 3, np.float64)

    made[:] = (1, 2, 3)

    assert found.tolist() == [1, 2, 3]
    assert (tmp_path / "numbers").stat().st_size == 24


def test_a_full_memory_is_told_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("femfed.engine.wire.os.posix_fallocate", full)

    with pytest.raises(UserError, match=r"no room for 8 MiB in .*No space left.*engine.workers=N"):
        mapped(tmp_path / "numbers", 2**20, np.float64, create=True)


def test_weights_that_are_gone_are_an_error(tmp_path: Path, weights: np.ndarray) -> None:
    content = Outbox(tmp_path, PARAMETERS).publish([weights])
    (tmp_path / "weights").unlink()

    with pytest.raises(FileNotFoundError):
        Inbox(PARAMETERS).weights(content)


# the run's own folder


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /dev/shm."""
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr("femfed.engine.wire.SHARED_MEMORY", memory)
    monkeypatch.setattr("femfed.engine.wire.available_memory", lambda: 2**62)
    return memory


@pytest.fixture
def fallback(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_shared_folder_is_removed_afterwards(memory: Path, fallback: Path) -> None:
    with shared_folder(fallback, 100) as shared:
        assert shared.path.parent == memory
        assert shared.path.name.startswith("femfed-")
        assert shared.path.stat().st_mode & 0o077 == 0  # nobody else's
        (shared.path / "weights").write_bytes(b"1234")

    assert list(memory.iterdir()) == list(fallback.iterdir()) == []


def test_a_shared_folder_is_removed_whatever_happens(memory: Path, fallback: Path) -> None:
    with pytest.raises(KeyboardInterrupt), shared_folder(fallback, 100) as shared:
        (shared.path / "weights").write_bytes(b"1234")
        raise KeyboardInterrupt

    assert list(memory.iterdir()) == []


@pytest.mark.parametrize("reason", ["too small", "not there", "half of what there is"])
def test_without_shared_memory_the_run_folder_serves(
    memory: Path, fallback: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "not there":
        monkeypatch.setattr("femfed.engine.wire.SHARED_MEMORY", memory / "not there")
    if reason == "half of what there is":
        monkeypatch.setattr("femfed.engine.wire.available_memory", lambda: 2)

    with shared_folder(fallback, 2**60 if reason == "too small" else 1) as shared:
        assert shared.path.parent == fallback

    assert list(memory.iterdir()) == list(fallback.iterdir()) == []


def test_folders_that_nobody_locks_are_removed(memory: Path, fallback: Path) -> None:
    """A lock goes with its process, however that ends."""
    left, elsewhere = memory / "femfed-left", fallback / "femfed-left"
    for folder in (left, elsewhere, memory / "femfed-no-lock", memory / "other"):
        folder.mkdir()
        (folder / "weights").write_bytes(b"1234")
    for folder in (left, elsewhere):
        (folder / "lock").touch()

    with shared_folder(fallback, 100) as live, shared_folder(fallback, 100):
        assert live.path.is_dir()

    assert sorted(path.name for path in memory.iterdir()) == ["femfed-no-lock", "other"]
    assert list(fallback.iterdir()) == []

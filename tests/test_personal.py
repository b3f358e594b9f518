"""Clients that keep something: memory, personal heads and models, and the two baselines."""

import errno
import fcntl
import os
import re
from ctypes import c_int64
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from femfed import UserError
from femfed.client import LocalTraining
from femfed.data.store import Handwriting, Writer, WriterStore, stored
from femfed.engine.apps import Job, Run
from femfed.engine.direct import BLOCK, IOV_MAX
from femfed.engine.federation import Federation
from femfed.engine.inline import InlineEngine
from femfed.engine.memory import Memories, Uncached
from femfed.engine.rounds import Round, Schedule
from femfed.local import DivergedError, Local, flatten
from femfed.models import Dense
from femfed.strategies.base import Memory, Strategy, Weights
from femfed.strategies.centralised import Centralised
from femfed.strategies.ditto import Ditto
from femfed.strategies.fedavg import FedAvg
from femfed.strategies.fedper import FedPer
from femfed.strategies.fedrep import FedRep
from femfed.strategies.fine_tuning import FineTuning
from femfed.strategies.local_only import LocalOnly

SEED = 4
MODEL = Dense(invert=True, units=(8,))  # two kernels, two biases
LOCAL = Local(epochs=2, batch_size=5, learning_rate=0.05, momentum=0.0, weight_decay=0.0)
SCHEDULE = Schedule(
    seed=SEED, rounds=4, clients=6, clients_per_round=3, failure_rate=0.0, evaluate_every=4
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> WriterStore:
    """Eight writers of 10 to 17 images of noise and two labels each; the last two are unseen."""

    def hands() -> Any:
        for i in range(8):
            draw = np.random.default_rng(i)
            images = draw.integers(256, size=(10 + i, 28, 28), dtype=np.uint8)
            yield Handwriting(f"w{i}", 0, i, images, draw.integers(2, size=10 + i) + i)

    return stored(tmp_path_factory.mktemp("cache"), {"dataset": "noise"}, hands)


def finish(
    store: WriterStore, folder: Path, strategy: Strategy, **changes: Any
) -> tuple[Job, list[Round]]:
    """Run a job to its end."""
    folder.mkdir(exist_ok=True)
    rounds: list[Round] = []
    job = Job(
        model=MODEL,
        strategy=strategy,
        local=LOCAL,
        schedule=SCHEDULE,
        federation=Federation(np.arange(6), np.array([6, 7])),
        store=store,
        test_fraction=0.3,
        workers=2,
        bundle=None,
        by_value=False,
        memory=folder / "memory",
    )
    job = replace(job, **changes)
    weights = MODEL.build(SEED).get_weights()
    run = Run(job, weights, strategy.init(weights), rounds.append, lambda *_: None, print)
    with InlineEngine() as engine:
        engine.run(run, folder)
    return job, rounds


def own(job: Job, client: int, rounds: list[Round]) -> np.ndarray | None:
    """Return what a client remembers at the end."""
    took_part = [r.number for r in rounds if client in r.cohort]
    return Memories(job.memory).recall(client, max(took_part, default=0))


def trained(
    start: Weights, writer: Writer, round: int, client: int, strategy: Strategy | None = None
) -> LocalTraining:
    """Train one writer from `start` as FedAvg would, or as `strategy` would without memory."""
    training = LocalTraining(MODEL, strategy or FedAvg(), LOCAL, SEED)
    training.load(flatten(start))
    training.train(writer, round, client)
    return training


def weights_after(start: Weights, training: LocalTraining) -> np.ndarray:
    delta = np.empty(training.parameters, np.float32)
    training.delta(delta)
    return flatten(start) + delta


def same(ours: Weights, theirs: Weights) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


# memory


def test_memories_are_kept_by_client_and_round(tmp_path: Path) -> None:
    memories = Memories(tmp_path / "memory")
    assert memories.versions(3, 100).tolist() == [0, 0, 0]
    assert memories.recall(0, 0) is None
    for client, round in ((0, 1), (0, 3), (0, 7), (2, 5)):
        memories.keep(client, round, [np.float32([client, round])])

    assert memories.recall(0, 3).tolist() == [0, 3]
    assert memories.versions(3, 100).tolist() == [7, 0, 5]
    assert memories.versions(3, 6).tolist() == [3, 0, 5]
    assert memories.versions(3, 2).tolist() == [1, 0, 0]


def test_several_vectors_are_kept_as_one(tmp_path: Path) -> None:
    memories, long = Memories(tmp_path), np.arange(200_000, dtype=np.float32)
    memories.keep(4, 2, [long, np.float32([1, 2]), long[:0], np.float32([3])])

    assert np.array_equal(memories.recall(4, 2), np.float32([*long, 1, 2, 3]))


def test_more_vectors_than_the_system_writes_in_a_call_are_kept(tmp_path: Path) -> None:
    memories, numbers = Memories(tmp_path), np.arange(2 * IOV_MAX + 3, dtype=np.float32)
    memories.keep(4, 2, np.split(numbers, len(numbers)))

    assert np.array_equal(memories.recall(4, 2), numbers)


def test_a_write_that_ends_early_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memories, long = Memories(tmp_path), np.arange(20_000, dtype=np.float32)
    monkeypatch.setattr(os, "writev", lambda to, parts: os.write(to, b"".join(parts)[:9_001]))
    memories.keep(4, 2, [long, np.float32([1, 2]), long[:0], long])

    assert np.array_equal(memories.recall(4, 2), np.float32([*long, 1, 2, *long]))


def test_numbers_whose_squares_are_not_finite_are_kept(tmp_path: Path) -> None:
    memories, huge = Memories(tmp_path), np.float32([3e38, -3e38, 0])
    memories.keep(4, 2, [huge])

    assert np.array_equal(memories.recall(4, 2), huge)


def test_a_file_is_overwritten_without_being_read(tmp_path: Path) -> None:
    """The disk reads a block that is overwritten in part, where it is not in memory."""
    memories, long = on_a_disk(tmp_path), np.arange(2_000_000, dtype=np.float32)
    vectors = [long[:700], long, long[:30]]
    for round in (1, 2):
        memories.keep(0, round, vectors)
    read = []
    for round in (3, 4, 5):  # whatever else this process needs from the disk, it needs once
        memories.sync(after=0)
        leave_the_cache(memories.path(0, round - 2))
        memories.prune(round - 1)
        before = counted("read_bytes")
        memories.keep(0, round, vectors)
        read.append(counted("read_bytes") - before)

    assert min(read) == 0
    assert np.array_equal(memories.recall(0, 5), np.concatenate(vectors))


@pytest.mark.parametrize("can", [True, False])
def test_the_disk_begins_with_a_file_once_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    """`sync` waits for what is left; a C library that cannot begin leaves it all to that."""
    begun: list[tuple[int, int, int, int]] = []

    def begin(descriptor: int, start: c_int64, length: c_int64, flags: int) -> None:
        begun.append((os.fstat(descriptor).st_size, start.value, length.value, flags))

    library = SimpleNamespace(**({"sync_file_range": begin} if can else {}))
    monkeypatch.setattr("femfed.engine.memory.ctypes.CDLL", lambda name: library)
    memories = Memories(tmp_path)
    memories.keep(0, 1, [np.float32([1, 2])])

    assert begun == [(BLOCK + 8, 0, 0, 2)] * can
    assert memories.recall(0, 1).tolist() == [1, 2]


def on_a_disk(folder: Path) -> Memories:
    """Return the memories in a folder; skip where what is written stays in memory."""
    before = counted("write_bytes")
    (folder / "probe").write_bytes(bytes(2**20))
    (folder / "probe").unlink()
    if counted("write_bytes") == before:
        pytest.skip("the folder of the tests lies in memory, not on a disk")
    return Memories(folder)


def leave_the_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_file_of_an_earlier_femfed_is_read_and_overwritten(tmp_path: Path) -> None:
    memories = Memories(tmp_path)
    for round in (1, 2):
        np.save(tmp_path / f"client_000003_round_{round:06d}.npy", np.float32([1, 2, round]))
    assert memories.recall(3, 2).tolist() == [1, 2, 2]
    assert Uncached(memories).recall(3, 2).tolist() == [1, 2, 2]

    memories.prune(2)
    memories.keep(3, 3, [np.float32([4])])

    assert memories.recall(3, 2).tolist() == [1, 2, 2]
    assert memories.recall(3, 3).tolist() == [4]
    assert np.load(tmp_path / "client_000003_round_000003.npy").tolist() == [4]


def counted(name: str) -> int:
    """Return how many bytes this process had a disk read or write."""
    (line,) = re.findall(rf"^{name}: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(line)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_not_kept(tmp_path: Path, number: float) -> None:
    memories = Memories(tmp_path)
    memories.keep(4, 2, [np.float32([1])])

    with pytest.raises(DivergedError, match="what the client remembers holds NaN or infinity"):
        memories.keep(4, 3, [np.zeros(100_000, np.float32), np.float32([1, number])])

    assert memories.versions(5, 9).tolist() == [0, 0, 0, 0, 2]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    memories = Memories(tmp_path)
    memories.keep(4, 2, [np.arange(9, dtype=np.float32)])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for reader in (memories, Uncached(memories)):
        for other in (whole[:-1], whole[:-4], whole + b"\0", b"", b"PK\3\4", whole[:30]):
            path.write_bytes(other)
            with pytest.raises(ValueError, match=r"holds \d+ bytes|is damaged: EOF: reading"):
                reader.recall(4, 2)
        for array in (np.zeros((3, 3), np.float32), np.zeros(9)):
            np.save(path, array)
            with pytest.raises(ValueError, match=r"holds \d+ bytes"):
                reader.recall(4, 2)
        np.save(path, np.array([None]))
        with pytest.raises(ValueError, match=r"holds \d+ bytes of object"):
            reader.recall(4, 2)

        path.write_bytes(whole)
        assert reader.recall(4, 2).tolist() == list(range(9))


def test_pruning_leaves_what_a_resumed_run_needs(tmp_path: Path) -> None:
    memories = Memories(tmp_path)
    for client, round in ((0, 1), (0, 3), (0, 7), (2, 5)):
        memories.keep(client, round, [np.float32([0])])
    memories.prune(4)

    for finished in (4, 5, 6, 7):
        assert memories.versions(3, finished).tolist() == [
            3 if finished < 7 else 7,
            0,
            0 if finished < 5 else 5,
        ]
    memories.remove_spare()
    assert len(list(tmp_path.iterdir())) == 3


def test_what_nobody_needs_is_overwritten(tmp_path: Path) -> None:
    memories = Memories(tmp_path)
    for client, round in ((0, 1), (0, 2), (1, 1), (1, 2)):
        memories.keep(client, round, [np.float32([client, round, 0, 0])])
    first = {path.stat().st_ino for path in tmp_path.glob("*round_000001.npy")}
    memories.prune(2)
    memories.keep(2, 3, [np.float32([2])])  # shorter than what was there

    assert (tmp_path / "client_000002_round_000003.npy").stat().st_ino in first
    assert memories.recall(2, 3).tolist() == [2]
    assert memories.recall(0, 2).tolist() == [0, 2, 0, 0]
    assert memories.versions(3, 9).tolist() == [2, 2, 3]
    assert len(list((tmp_path / "spare").iterdir())) == 1

    memories.remove_spare()
    memories.keep(1, 3, [np.float32([1])])  # with nothing to overwrite

    assert memories.recall(1, 3).tolist() == [1]
    assert sorted(path.name[:13] for path in tmp_path.iterdir()) == [
        f"client_{client:06d}" for client in (0, 1, 1, 2)
    ]


def test_a_version_that_somebody_linked_to_stays_as_it_is(tmp_path: Path) -> None:
    memories = Memories(tmp_path / "memory")
    for round in (1, 2):
        memories.keep(0, round, [np.float32([round])])
    theirs = tmp_path / "theirs.npy"
    theirs.hardlink_to(tmp_path / "memory" / "client_000000_round_000001.npy")

    memories.prune(2)
    memories.keep(0, 3, [np.float32([3])])

    assert np.load(theirs).tolist() == [1]
    assert memories.recall(0, 3).tolist() == [3]


def test_past_the_cache_the_same_files_are_written_and_read(tmp_path: Path) -> None:
    memories, other = Memories(tmp_path / "one"), Memories(tmp_path / "other")
    long = np.arange(200_000, dtype=np.float32)
    kept = {1: [long, np.float32([1, 2]), long[:0]], 2: [long[:1024]], 3: [long[:5]]}
    with Uncached(other) as uncached:
        for round, vectors in kept.items():
            memories.keep(0, round, vectors)
            uncached.keep(0, round, vectors)

    names = [path.name for path in sorted((tmp_path / "one").iterdir())]
    assert [path.name for path in sorted((tmp_path / "other").iterdir())] == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    for round, vectors in kept.items():
        assert np.array_equal(uncached.recall(0, round), np.concatenate(vectors))
        assert np.array_equal(other.recall(0, round), np.concatenate(vectors))


def test_what_is_read_ahead_need_not_be_recalled(tmp_path: Path) -> None:
    memories = Memories(tmp_path)
    for client in range(6):
        memories.keep(client, 1, [np.full(5_000, client, np.float32)])
    with Uncached(memories) as uncached:
        for ahead, client in ((1, 1), (2, 3), (3, 4), (5, 5)):
            before = uncached.recall(0, 1)
            uncached.read_ahead(ahead, 1)
            assert np.all(uncached.recall(client, 1) == client)
            assert np.all(before == 0)  # TensorFlow worked there meanwhile
        uncached.read_ahead(2, 1)
        assert uncached.recall(3, 0) is None
        uncached.read_ahead(3, 0)
        assert np.all(uncached.recall(4, 1) == 4)
        uncached.read_ahead(9, 1)  # there is none
    assert np.all(uncached.recall(2, 1) == 2)
    with pytest.raises(FileNotFoundError):
        uncached.recall(9, 1)


def past_the_cache(folder: Path) -> int:
    """Return the flag of files that go past the cache; skip where there is no such thing."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        pytest.skip("this system cannot")
    with (folder / "probe").open("wb") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, direct)
        except OSError:
            pytest.skip("the file system of the tests cannot")
    return direct


def test_both_ways_go_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct, found = past_the_cache(tmp_path), list[tuple[str, int]]()

    def noting(call: str) -> Any:
        real = getattr(os, call)

        def noted(descriptor: int, parts: Any) -> int:
            found.append((call, fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct))
            return int(real(descriptor, parts))

        return noted

    for call in ("writev", "readv"):
        monkeypatch.setattr(os, call, noting(call))
    with Uncached(Memories(tmp_path)) as uncached:
        uncached.keep(0, 1, [np.arange(9_000, dtype=np.float32)])
    assert np.array_equal(uncached.recall(0, 1), np.arange(9_000))

    assert found == [("writev", direct), ("readv", direct)]


def test_a_file_that_ends_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another client's numbers, which are still there, would be taken for its own."""
    memories, real = Memories(tmp_path), os.readv
    for client in (0, 1):
        memories.keep(client, 1, [np.full(5_000, client, np.float32)])
    uncached = Uncached(memories)
    uncached.recall(0, 1)
    ends = iter((BLOCK, 0))
    monkeypatch.setattr(os, "readv", lambda file, parts: real(file, [parts[0][: next(ends)]]))

    with pytest.raises(OSError, match=r"ends after 4096 of 24096 bytes: .*client_000001_round"):
        uncached.recall(1, 1)


@pytest.mark.parametrize("call", ["fcntl", "writev", "readv"])
def test_a_file_system_that_knows_no_other_way_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Some refuse it at once, others for blocks that are too small for them."""
    place = fcntl if call == "fcntl" else os
    real, direct = getattr(place, call), getattr(os, "O_DIRECT", 0)

    def refusing(descriptor: int, *about: Any) -> Any:
        flags = about[-1] if call == "fcntl" else fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, *about)

    monkeypatch.setattr(place, call, refusing)
    with Uncached(Memories(tmp_path)) as uncached:
        for round in (1, 2):
            uncached.keep(0, round, [np.float32([1, 2, round])])

    assert [uncached.recall(0, round).tolist() for round in (1, 2)] == [[1, 2, 1], [1, 2, 2]]


def test_what_could_not_be_written_is_told_later_and_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, parts: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    memories = Memories(tmp_path)
    uncached = Uncached(memories)
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        with pytest.raises(OSError, match=r"No space left on device: .*client_000007_round_000002"):
            memories.keep(7, 2, [np.float32([1])])
        with uncached:
            uncached.keep(0, 1, [np.float32([1])])
            with pytest.raises(OSError, match=r"No space left.*client_000000_round_000001"):
                uncached.keep(1, 1, [np.float32([1])])
        with pytest.raises(OSError, match=r"No space left.*client_000002_round_000001"), uncached:
            uncached.keep(2, 1, [np.float32([1])])
    assert not list(tmp_path.iterdir())

    with uncached:
        uncached.keep(0, 1, [np.float32([1])])
    assert uncached.recall(0, 1).tolist() == [1]


@pytest.mark.parametrize("bundle", [None, 1, 2])
@pytest.mark.parametrize("short_of", [0, 2])
@pytest.mark.parametrize("strategy", [Ditto(0.5), LocalOnly()], ids=lambda s: type(s).__name__)
def test_where_memory_is_short_they_go_past_the_cache_to_the_same_bits(
    store: WriterStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: Strategy,
    short_of: int,
    bundle: int | None,
) -> None:
    """Two versions of six clients' weights and three to write may take half of the memory."""
    room, _ = finish(store, tmp_path / "with_room", strategy, bundle=bundle)
    available = 2 * (2 * 6 + 3) * 4 * MODEL.parameters - short_of
    kept, recalled, read_before = set(), set(), set()
    keep, recall = Uncached.keep, Uncached.recall

    def keeping(self: Uncached, client: int, round: int, vectors: Any) -> None:
        kept.add((client, round))
        keep(self, client, round, vectors)

    def recalling(self: Uncached, client: int, round: int) -> Any:
        recalled.add((client, round))
        read_before.update(self._reading.keys() & {(client, round)})
        return recall(self, client, round)

    monkeypatch.setattr("femfed.engine.apps.available_memory", lambda: available)
    monkeypatch.setattr(Uncached, "keep", keeping)
    monkeypatch.setattr(Uncached, "recall", recalling)
    job, rounds = finish(store, tmp_path / "short", strategy, bundle=bundle)

    newest: dict[int, int] = {}
    to_keep, to_recall = set(), set()
    for each in rounds if short_of else []:
        to_recall |= {(client, newest.get(client, 0)) for client in each.cohort}
        to_keep |= {(client, each.number) for client in each.cohort}
        newest |= dict.fromkeys(each.cohort, each.number)
    assert (kept, recalled) == (to_keep, to_recall)
    assert bool(read_before) == (bool(short_of) and bundle != 1)
    files = {path.name: path.read_bytes() for path in room.memory.glob("*.npy")}
    assert {path.name: path.read_bytes() for path in job.memory.glob("*.npy")} == files


def test_a_strategy_without_memory_leaves_no_folder(store: WriterStore, tmp_path: Path) -> None:
    job, _ = finish(store, tmp_path, FedAvg())
    assert not job.memory.exists()


@pytest.mark.parametrize(
    "strategy", [FedPer(2), FedRep(2, 0.5), Ditto(0.5), LocalOnly()], ids=lambda s: type(s).__name__
)
def test_memory_survives_any_cut_and_wire(
    store: WriterStore, tmp_path: Path, strategy: Strategy
) -> None:
    job, rounds = finish(store, tmp_path / "a", strategy)
    for name, changes in (("b", {"bundle": 1, "workers": 4}), ("c", {"by_value": True})):
        other, others = finish(store, tmp_path / name, strategy, **changes)
        assert same(others[-1].weights, rounds[-1].weights)
        assert others[-1].seen == rounds[-1].seen
        for client in range(6):
            ours, theirs = own(job, client, rounds), own(other, client, others)
            assert (ours is None) == (theirs is None)
            assert ours is None or np.array_equal(ours, theirs)


def test_memory_is_of_those_who_took_part(store: WriterStore, tmp_path: Path) -> None:
    job, rounds = finish(store, tmp_path, Ditto(0.5))

    took_part = {int(client) for r in rounds for client in r.cohort}
    kept = {int(path.stem.split("_")[1]) for path in job.memory.iterdir()}
    assert kept == took_part
    assert len(list(job.memory.iterdir())) == sum(len(r.cohort) for r in rounds)


# baselines


def test_local_only_trains_every_client_on_its_own(store: WriterStore, tmp_path: Path) -> None:
    job, rounds = finish(store, tmp_path, LocalOnly())
    initial = MODEL.build(SEED).get_weights()

    assert all(same(r.weights, initial) for r in rounds)
    for client in range(6):
        weights = initial
        for r in rounds:
            if client in r.cohort:
                training = trained(weights, store.writer(client, 0.3, SEED), r.number, client)
                weights = [w.numpy() for w in training._weights]
        found = own(job, client, rounds)
        if found is not None:
            np.testing.assert_allclose(found, flatten(weights), atol=1e-6)
        outcome = LocalTraining(MODEL, FedAvg(), LOCAL, SEED)
        outcome.load(flatten(weights))
        writer = store.writer(client, 0.3, SEED)
        expected = outcome.evaluate(writer, writer.test)
        assert rounds[-1].seen[client].loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)


def test_centralised_takes_a_cohorts_steps_on_everybodys_images(
    store: WriterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[Writer] = []
    train = LocalTraining.train

    def noted(self: LocalTraining, writer: Writer, *rest: Any) -> Any:
        writers.append(writer)
        return train(self, writer, *rest)

    monkeypatch.setattr(LocalTraining, "train", noted)
    job, rounds = finish(store, tmp_path, Centralised())

    own_images = [store.writer(client, 0.3, SEED) for client in range(6)]
    everything = np.concatenate([w.images[w.train] for w in own_images]).reshape(-1, 784)
    known = {image.tobytes() for image in everything}
    assert len(writers) == len(rounds) == 4
    for pooled, r in zip(writers, rounds, strict=True):
        drawn = [image.tobytes() for image in pooled.images]
        assert set(drawn) <= known
        assert len(r.cohort) == 0
        assert r.bytes_up == 0
        assert len(drawn) % LOCAL.batch_size == 0
        assert len(r.trained.outcomes) == 1
    # Round 1's cohort of three: batches of 5 from each one's images.
    from femfed.engine.rounds import draw_cohort

    cohort = draw_cohort(SEED, 1, 6, 3).tolist()
    steps = sum(-(-len(own_images[client].train) // 5) for client in cohort)
    assert len(writers[0].images) == 2 * 5 * steps  # two local epochs
    assert not same(rounds[0].weights, MODEL.build(SEED).get_weights())
    # Without replacement as long as the images last.
    counts = np.unique([image.tobytes() for image in writers[0].images], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    assert job.strategy.averages


# personal models


def test_dittos_shared_model_is_fedavgs(store: WriterStore, tmp_path: Path) -> None:
    _, ours = finish(store, tmp_path / "a", Ditto(0.7))
    _, theirs = finish(store, tmp_path / "b", FedAvg())

    assert all(same(a.weights, b.weights) for a, b in zip(ours, theirs, strict=True))
    assert ours[-1].unseen == theirs[-1].unseen
    assert ours[-1].seen != theirs[-1].seen


def test_ditto_without_pull_is_local_training(store: WriterStore, tmp_path: Path) -> None:
    job, rounds = finish(store, tmp_path / "a", Ditto(0.0))
    alone, others = finish(store, tmp_path / "b", LocalOnly())

    for client in range(6):
        ours, theirs = own(job, client, rounds), own(alone, client, others)
        assert (ours is None) == (theirs is None)
        assert ours is None or np.array_equal(ours, theirs)


def test_ditto_pulls_the_own_model_towards_the_shared_one(
    store: WriterStore, tmp_path: Path
) -> None:
    def distance(pull: float) -> float:
        job, rounds = finish(
            store, tmp_path / str(pull), Ditto(pull), local=replace(LOCAL, epochs=9)
        )
        last = rounds[-1]
        before = flatten(rounds[-2].weights)
        return float(np.mean([np.abs(own(job, c, rounds) - before).sum() for c in last.cohort]))

    assert distance(8.0) < distance(1.0) < distance(0.0)


def test_one_ditto_step_by_hand(store: WriterStore) -> None:
    """One step on one batch from own weights v, shared w: v - rate (g(v) + pull (v - w))."""
    local = Local(epochs=1, batch_size=100, learning_rate=0.05, momentum=0.0, weight_decay=0.0)
    writer = store.writer(0, 0.3, SEED)
    initial = MODEL.build(SEED).get_weights()
    v, w = flatten(initial) * np.float32(1.5), flatten(initial)

    def step(strategy: Strategy, start: np.ndarray) -> np.ndarray:
        training = LocalTraining(MODEL, strategy, local, SEED)
        training.load(start)
        training.train(writer, 1, 0)
        return start + _delta(training)

    training = LocalTraining(MODEL, Ditto(2.0), local, SEED)
    training.load(w)
    training.load_memory(v)
    training.train(writer, 1, 0)

    expected = step(FedAvg(), v) - np.float32(0.05 * 2.0) * (v - w)
    np.testing.assert_allclose(np.concatenate(training.memory()), expected, atol=1e-6)
    np.testing.assert_array_equal(w + _delta(training), step(FedAvg(), w))


def _delta(training: LocalTraining) -> np.ndarray:
    delta = np.empty(training.parameters, np.float32)
    training.delta(delta)
    return delta


# personal heads


@pytest.mark.parametrize("strategy", [FedPer(2), FedRep(2, 0.5)], ids=["fedper", "fedrep"])
def test_a_head_stays_with_its_client(
    store: WriterStore, tmp_path: Path, strategy: Strategy
) -> None:
    """A client that takes part twice goes on with the head it had, on the body of today."""
    job, rounds = finish(store, tmp_path, strategy)
    initial = MODEL.build(SEED).get_weights()
    client = next(c for c in range(6) if sum(c in r.cohort for r in rounds) > 1)
    writer = store.writer(client, 0.3, SEED)
    head, before = flatten(initial[-2:]), initial
    for r in rounds:
        if client in r.cohort:
            training = LocalTraining(MODEL, strategy, LOCAL, SEED)
            training.load(flatten(before))
            training.load_memory(head)
            training.train(writer, r.number, client)
            head = np.concatenate(training.memory())
        before = r.weights
    assert np.array_equal(head, own(job, client, rounds))

    # It is tested with the shared body and this head.
    body_and_head = np.concatenate([flatten(rounds[-1].weights[:-2]), head])
    judge = LocalTraining(MODEL, FedAvg(), LOCAL, SEED)
    judge.load(body_and_head)
    assert rounds[-1].seen[client] == judge.evaluate(writer, writer.test)


def test_fedper_from_the_first_head_is_fedavg(store: WriterStore, tmp_path: Path) -> None:
    """In round 1 all heads are the initial one, so all weights are FedAvg's."""
    schedule = replace(SCHEDULE, rounds=1)
    _, (ours,) = finish(store, tmp_path / "a", FedPer(2), schedule=schedule)
    _, (theirs,) = finish(store, tmp_path / "b", FedAvg(), schedule=schedule)

    assert same(ours.weights, theirs.weights)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fedrep_trains_the_head_and_then_the_body(store: WriterStore, momentum: float) -> None:
    local = replace(LOCAL, momentum=momentum)
    writer, initial = store.writer(7, 0.3, SEED), MODEL.build(SEED).get_weights()
    vector = flatten(initial)
    body = len(flatten(initial[:-2]))

    def delta_with(share: float) -> np.ndarray:
        training = LocalTraining(MODEL, FedRep(2, share), local, SEED)
        training.load(vector)
        training.load_memory(None)
        training.train(writer, 1, 7)
        return _delta(training)

    mostly_head, mostly_body = delta_with(0.99), delta_with(0.01)  # 3 steps an epoch, 2 epochs
    assert not mostly_head[:body].any()
    assert mostly_head[body:].any()
    assert mostly_body[:body].any()
    assert not mostly_body[body:].any()
    both = delta_with(0.5)
    assert both[:body].any()
    assert both[body:].any()
    # The head's half is what training the head alone for one epoch gives.
    alone = LocalTraining(MODEL, FedRep(2, 0.99), replace(local, epochs=1), SEED)
    alone.load(vector)
    alone.load_memory(None)
    alone.train(writer, 1, 7)
    np.testing.assert_array_equal(both[body:], _delta(alone)[body:])


def test_a_head_that_is_the_whole_model_is_refused() -> None:
    with pytest.raises(UserError, match="whole model"):
        LocalTraining(MODEL, FedPer(4), LOCAL, SEED)


# fine-tuning


def test_fine_tuning_trains_as_fedavg_and_adapts_before_the_test(
    store: WriterStore, tmp_path: Path
) -> None:
    _, ours = finish(store, tmp_path / "a", FineTuning(4))
    _, theirs = finish(store, tmp_path / "b", FedAvg())

    assert all(same(a.weights, b.weights) for a, b in zip(ours, theirs, strict=True))
    losses = [
        sum(o.loss_sum for o in rounds[-1].seen) / sum(o.examples for o in rounds[-1].seen)
        for rounds in (ours, theirs)
    ]
    assert losses[0] < losses[1]  # every writer has two labels only
    # Unseen writers adapt too, and are tested on what they did not adapt to.
    assert [o.examples for o in theirs[-1].unseen] == [16, 17]
    assert [o.examples for o in ours[-1].unseen] == [5, 5]


def test_no_steps_of_fine_tuning_are_fedavg(store: WriterStore, tmp_path: Path) -> None:
    _, ours = finish(store, tmp_path / "a", FineTuning(0))
    _, theirs = finish(store, tmp_path / "b", FedAvg())

    assert (ours[-1].seen, ours[-1].unseen) == (theirs[-1].seen, theirs[-1].unseen)


def test_fine_tuning_by_hand(store: WriterStore) -> None:
    """Two passes of one batch each are two steps of gradient descent on all training images."""
    local = Local(epochs=1, batch_size=7, learning_rate=0.05, momentum=0.0, weight_decay=0.0)
    writer = store.writer(0, 0.3, SEED)
    assert len(writer.train) == 7
    training = LocalTraining(MODEL, FineTuning(2), local, SEED)
    found = training.evaluate_personal(writer, 0)

    two = LocalTraining(MODEL, FedAvg(), replace(local, epochs=2), SEED)
    two.train(writer, 1, 0)
    judge = LocalTraining(MODEL, FedAvg(), local, SEED)
    judge.load(flatten(two.initial_weights) + _delta(two))
    assert found.loss_sum == pytest.approx(judge.evaluate(writer, writer.test).loss_sum, rel=1e-5)


# what the engine hands to the client's half


def test_the_hooks_are_given_what_they_ask_for(store: WriterStore, tmp_path: Path) -> None:
    """A strategy that only notes: its state, memory, loss, norm and gradient."""

    class Noting(Strategy):
        broadcasts = ("control",)
        sends_extra = True
        needs = frozenset({"loss", "norm", "gradient"})

        def new_memory(self, weights: Weights) -> Memory:
            return {"rounds": [np.zeros(1, np.float32)]}

        def init(self, weights: Weights) -> dict[str, Weights]:
            return {"control": [np.full_like(w, 0.25) for w in weights]}

        def finish(self, weights, global_weights, memory, state, path, gradient):  # type: ignore[no-untyped-def]
            extra = [
                c + path * g + 0 * w
                for c, g, w in zip(state["control"], gradient, weights, strict=True)
            ]
            return {"rounds": [memory["rounds"][0] + 1]}, extra

    local = Local(epochs=1, batch_size=100, learning_rate=0.05, momentum=0.0, weight_decay=0.0)
    strategy, writer = Noting(), store.writer(3, 0.3, SEED)
    training = LocalTraining(MODEL, strategy, local, SEED)
    initial = flatten(training.initial_weights)
    training.load(np.concatenate([initial, np.full_like(initial, 0.25)]))
    training.load_memory(np.float32([4]))

    outcome = training.train(writer, 1, 3)

    assert np.concatenate(training.memory()).tolist() == [5]
    before = training.evaluate(writer, writer.train)
    assert outcome.loss_before == pytest.approx(before.loss_sum / before.examples, rel=1e-6)
    training.train(writer, 1, 3)
    delta = _delta(training)
    assert outcome.squared_norm == pytest.approx(float((delta.astype(np.float64) ** 2).sum()))
    assert outcome.steps == 1.0
    # One step of all images, no dropout: the delta is minus the learning rate times the gradient.
    total = np.zeros(2 * training.parameters)
    training.fold(2.0, total, first=True)
    np.testing.assert_allclose(total[: delta.size], 2 * delta, atol=1e-8)
    np.testing.assert_allclose(total[delta.size :], 2 * (0.25 - delta), atol=1e-6)


def test_steps_with_momentum_are_the_norm_of_fednova() -> None:
    """Each gradient's share in the update, summed one by one."""
    local = Local(epochs=3, batch_size=10, learning_rate=0.1, momentum=0.9, weight_decay=0.0)
    steps = 3 * 3  # of 25 examples
    expected = sum(sum(0.9**k for k in range(steps - first)) for first in range(steps))

    assert local.steps(25) == pytest.approx(expected)
    assert replace(local, momentum=0.0).steps(25) == steps

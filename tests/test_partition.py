"""Partitions deal the clients' images out anew and change nothing else."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from femfed.data.glyphs import Glyphs
from femfed.data.partition import partition
from femfed.data.store import Handwriting, WriterStore, stored
from tests.handwriting import whole

CLIENTS, UNSEEN = np.array([7, 3, 5, 1, 8, 0, 9, 4]), np.array([2, 6])
RULES = ["iid", "dirichlet", "shards"]


@pytest.fixture
def store(tmp_path: Path) -> WriterStore:
    """Ten writers of 60 to 150 images of six labels; image k is known by its pixels."""
    random, hands, row = np.random.default_rng(0), [], 0
    for index in range(10):
        n = 60 + 10 * index
        images = np.zeros((n, 28, 28), np.uint8)
        images.reshape(n, -1)[:, :2] = np.stack(np.divmod(np.arange(row, row + n), 256), axis=1)
        hands.append(Handwriting(f"w{index}", 0, index, images, random.integers(6, size=n)))
        row += n
    return stored(tmp_path, {"dataset": "test"}, lambda: hands)


def deal(store: WriterStore, rule: str, seed: int = 0, **kept: float) -> WriterStore:
    dataset = whole(Glyphs, writers=None, partition=rule, **kept)
    return partition(dataset, store, CLIENTS, UNSEEN, 0.1, seed)


def held(store: WriterStore, clients: np.ndarray, part: str) -> list[list[int]]:
    """Return which images each client has, by the pixels that number them."""
    numbers = []
    for client in clients:
        writer = store.writer(int(client), 0.1, 0)
        pixels = writer.images[getattr(writer, part), 0, :2].astype(int)
        numbers.append((256 * pixels[:, 0] + pixels[:, 1]).tolist())
    return numbers


def labels(store: WriterStore, client: int) -> np.ndarray:
    writer = store.writer(client, 0.1, 0)
    return np.bincount(writer.labels[writer.train], minlength=6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("part", ["train", "test"])
def test_the_same_images_are_trained_on_and_held_out(
    store: WriterStore, rule: str, part: str
) -> None:
    dealt = deal(store, rule)
    natural, new = held(store, CLIENTS, part), held(dealt, np.arange(8), part)

    assert sorted(chain(*new)) == sorted(chain(*natural))
    assert new != natural
    if rule != "shards":  # their clients are of one size
        assert [len(own) for own in new] == [len(own) for own in natural]


@pytest.mark.parametrize("rule", RULES)
def test_unseen_writers_stay_who_they_are(store: WriterStore, rule: str) -> None:
    dealt = deal(store, rule)

    assert dealt.names[8:] == ("w2", "w6")
    assert dealt.apart.tolist() == [False] * 8 + [True] * 2
    for place, index in ((8, 2), (9, 6)):
        assert np.array_equal(dealt.images[dealt.rows_of(place)], store.writer(index, 0, 0).images)
    assert dealt.names[0] == f"{rule}_0000"


@pytest.mark.parametrize("rule", RULES)
def test_seeds_deal_differently_and_a_seed_always_the_same(
    store: WriterStore, rule: str, tmp_path: Path
) -> None:
    first, second = deal(store, rule), deal(store, rule, seed=1)

    assert first.folder == deal(store, rule).folder != second.folder
    assert first.rows.tolist() != second.rows.tolist()
    rows = first.rows.tolist()
    for file in first.folder.iterdir():
        file.unlink()
    first.folder.rmdir()
    assert deal(store, rule).rows.tolist() == rows


def test_iid_has_every_label_in_its_share(store: WriterStore) -> None:
    dealt = deal(store, "iid")

    for client in range(8):
        counts = labels(dealt, client)
        assert np.abs(counts / counts.sum() - 1 / 6).max() < 0.12


def test_shards_give_a_client_few_labels(store: WriterStore) -> None:
    for shards, most in ((1, 2), (2, 4)):
        dealt = deal(store, "shards", shards=shards)
        sizes = [len(dealt.writer(client, 0.1, 0).train) for client in range(8)]
        assert max(np.count_nonzero(labels(dealt, client)) for client in range(8)) <= most
        assert max(sizes) - min(sizes) <= shards
        for client in range(8):  # held out is what the client trains on, but for the cuts' edges
            writer = dealt.writer(client, 0.1, 0)
            trained = set(writer.labels[writer.train].tolist())
            assert np.isin(writer.labels[writer.test], list(trained)).mean() >= 0.5


def test_alpha_is_the_way_from_one_label_to_iid(store: WriterStore) -> None:
    def largest_share(alpha: float) -> float:
        dealt = deal(store, "dirichlet", alpha=alpha)
        shares = [labels(dealt, client) / labels(dealt, client).sum() for client in range(8)]
        return float(np.mean([share.max() for share in shares]))

    one, some, all_alike = largest_share(1e-300), largest_share(1.0), largest_share(1e6)
    assert all_alike < 0.3 < some < one
    assert one > 0.7  # not 1: labels are used up


def test_a_partition_of_a_selection(store: WriterStore) -> None:
    some = whole(Glyphs, writers=None, classes=[0, 1, 2]).select(store)
    dealt = deal(some, "iid")

    assert set(dealt.labels[dealt.rows].tolist()) == {0, 1, 2}
    assert len(dealt.rows) == len(some.rows)

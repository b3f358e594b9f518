"""Robust aggregation against naive definitions, Flower's strategies and lying clients."""

import dataclasses
import itertools
import os
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray

from femfed import UserError
from femfed.strategies import columns
from femfed.strategies.base import Strategy, Update, Weights
from femfed.strategies.bulyan import Bulyan
from femfed.strategies.columns import by_rank, squared_distances
from femfed.strategies.fedavg import FedAvg
from femfed.strategies.fedmedian import FedMedian
from femfed.strategies.fedtrimmedmean import FedTrimmedMean
from femfed.strategies.geometric_median import GeometricMedian
from femfed.strategies.krum import Krum
from femfed.strategies.multikrum import MultiKrum

SHAPES = ((3, 2), (4,), (2, 2, 1, 3))
ROUNDS = range(5)
Points = NDArray[np.float64]

# Every rule, with how many byzantine clients among 11 it keeps within the honest ones' range.
RULES: list[tuple[Strategy, int]] = [
    (FedMedian(), 5),
    (FedTrimmedMean(0.4), 4),
    (Krum(4), 4),
    (Krum(None), 4),
    (MultiKrum(4, None, False), 4),
    (MultiKrum(4, 3, True), 4),
    (Bulyan(2, True), 2),
    (Bulyan(2, False), 2),
    (Bulyan(None, True), 2),
    (GeometricMedian(100, 1e-6, True), 2),  # stays near the honest updates with 5, see below
    (GeometricMedian(100, 1e-6, False), 2),
]
every_rule = pytest.mark.parametrize(("rule", "byzantine"), RULES, ids=lambda value: str(value))


def some_updates(seed: int, n: int, decimals: int = 7) -> list[Update]:
    """Random updates; with few decimals many of their values are equal."""
    draw = np.random.default_rng(seed)
    return [
        Update(
            examples=int(draw.integers(20, 200)),
            loss_sum=0.0,
            correct=0,
            client=7 * client,
            delta=[draw.normal(0, 1, s).round(decimals).astype(np.float32) for s in SHAPES],
        )
        for client in range(n)
    ]


def numbers(*values: float, examples: Sequence[int] | None = None) -> list[Update]:
    """Updates of one parameter from clients 0, 1, ..."""
    return [
        Update(n, 0.0, 0, client=client, delta=[np.float32([value])])
        for client, (n, value) in enumerate(zip(examples or [1] * len(values), values, strict=True))
    ]


def number(delta: Weights) -> float:
    ((value,),) = delta
    return float(value)


def points(updates: Sequence[Update]) -> Points:
    """The updates as rows, in float64."""
    return np.array([flat(update.delta) for update in updates])


def flat(delta: Weights) -> Points:
    return np.concatenate([layer.ravel() for layer in delta]).astype(np.float64)


def assert_equals(delta: Weights, expected: Points) -> None:
    assert [layer.shape for layer in delta] == list(SHAPES)
    np.testing.assert_allclose(flat(delta), expected, atol=1e-6, rtol=0)


# the definitions, as a reader of the papers would write them down


def naive_scores(x: Points, byzantine: int) -> list[float]:
    scores = []
    for i in range(len(x)):
        squared = sorted(((x[i] - x[j]) ** 2).sum() for j in range(len(x)) if j != i)
        scores.append(sum(squared[: max(1, len(x) - byzantine - 2)]))
    return scores


def naive_best(x: Points, byzantine: int) -> list[int]:
    scores = naive_scores(x, byzantine)
    return sorted(range(len(x)), key=lambda i: (scores[i], i))


def naive_bulyan(x: Points, byzantine: int, rescored: bool) -> Points:
    theta = len(x) - 2 * byzantine
    beta = theta - 2 * byzantine
    if rescored:
        left, chosen = list(range(len(x))), list[int]()
        while len(chosen) < theta:
            chosen.append(left.pop(naive_best(x[left], byzantine)[0]))
    else:
        chosen = naive_best(x, byzantine)[:theta]
    mean = []
    for column in x[chosen].T:
        median = np.median(column)
        mean.append(np.mean(sorted(column, key=lambda v: (abs(v - median), v))[:beta]))
    return np.array(mean)


def naive_geometric_median(
    x: Points, share: Sequence[int], iterations: int, smoothing: float
) -> Points:
    median = np.average(x, axis=0, weights=share)
    for _ in range(iterations):
        distances = np.sqrt(((x - median) ** 2).sum(axis=1))
        median = np.average(x, axis=0, weights=share / np.maximum(distances, smoothing))
    return median


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("seed", ROUNDS)
def test_median(seed: int, n: int) -> None:
    updates = some_updates(seed, n)

    assert_equals(FedMedian().aggregate(updates), np.median(points(updates), axis=0))


@pytest.mark.parametrize(
    ("fraction", "n", "cut"),
    [(0.0, 7, 0), (0.1, 9, 0), (0.1, 10, 1), (0.2, 10, 2), (0.3, 10, 3), (0.499, 3, 1)],
)
@pytest.mark.parametrize("seed", ROUNDS)
def test_trimmed_mean(seed: int, fraction: float, n: int, cut: int) -> None:
    updates = some_updates(seed, n)

    expected = np.sort(points(updates), axis=0)[cut : n - cut].mean(axis=0)

    assert_equals(FedTrimmedMean(fraction).aggregate(updates), expected)


@pytest.mark.parametrize(
    ("fraction", "n", "cut"),
    # 0.29 * 100 is 28.999...; with 10 clients 5 from each side would leave none
    [(0.29, 100, 29), (0.28, 100, 28), (0.49999999999, 10, 4), (0.4, 1, 0), (0.4, 2, 0)],
)
def test_trimmed_mean_cuts_whole_clients(fraction: float, n: int, cut: int) -> None:
    # 1, 4, 9, ...: every other cut has another mean
    squares = [float(i * i) for i in range(1, n + 1)]

    mean = number(FedTrimmedMean(fraction).aggregate(numbers(*squares)))

    assert mean == np.float32(np.mean(squares[cut : n - cut]))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.4])
def test_trimmed_mean_is_scipys(fraction: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    updates = some_updates(0, 20)

    assert_equals(
        FedTrimmedMean(fraction).aggregate(updates),
        stats.trim_mean(points(updates), fraction, axis=0),
    )


@pytest.mark.parametrize("decimals", [7, 0])
@pytest.mark.parametrize(("n", "byzantine"), [(3, 0), (5, 1), (11, 0), (11, 4), (20, 3)])
@pytest.mark.parametrize("seed", ROUNDS)
def test_krum(seed: int, n: int, byzantine: int, decimals: int) -> None:
    updates = some_updates(seed, n, decimals)
    x = points(updates)
    best = naive_best(x, byzantine)

    assert_equals(Krum(byzantine).aggregate(updates), x[best[0]])
    for selected in (1, 2, n):
        some = best[:selected]
        examples = [updates[i].examples for i in some]
        alike = MultiKrum(byzantine, selected, False).aggregate(updates)
        assert_equals(alike, x[some].mean(axis=0))
        by_examples = MultiKrum(byzantine, selected, True).aggregate(updates)
        assert_equals(by_examples, np.average(x[some], axis=0, weights=examples))


@pytest.mark.parametrize("decimals", [7, 0])
@pytest.mark.parametrize("rescored", [True, False])
@pytest.mark.parametrize(("n", "byzantine"), [(1, 0), (6, 0), (7, 1), (10, 1), (11, 2), (24, 5)])
@pytest.mark.parametrize("seed", ROUNDS)
def test_bulyan(seed: int, n: int, byzantine: int, rescored: bool, decimals: int) -> None:
    updates = some_updates(seed, n, decimals)

    expected = naive_bulyan(points(updates), byzantine, rescored)

    assert_equals(Bulyan(byzantine, rescored).aggregate(updates), expected)


@pytest.mark.parametrize(
    ("iterations", "smoothing"), [(0, 1e-6), (1, 1e-6), (4, 1e-5), (4, 4.0), (100, 1e-6)]
)
@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("seed", ROUNDS)
def test_geometric_median(seed: int, n: int, iterations: int, smoothing: float) -> None:
    updates = some_updates(seed, n)
    x, examples = points(updates), [update.examples for update in updates]

    weighed = GeometricMedian(iterations, smoothing, True).aggregate(updates)
    alike = GeometricMedian(iterations, smoothing, False).aggregate(updates)

    assert_equals(weighed, naive_geometric_median(x, examples, iterations, smoothing))
    assert_equals(alike, naive_geometric_median(x, [1] * n, iterations, smoothing))


# by hand


def test_median_by_hand() -> None:
    assert number(FedMedian().aggregate(numbers(5.0, -1.0, 2.0))) == 2.0
    # (2 + 5) / 2, whatever the examples
    assert number(FedMedian().aggregate(numbers(5, -1, 2, 9, examples=[1, 90, 1, 1]))) == 3.5


def test_trimmed_mean_by_hand() -> None:
    # 1 from each side: (2 + 3 + 7) / 3
    assert number(FedTrimmedMean(0.2).aggregate(numbers(100.0, 2.0, 7.0, -50.0, 3.0))) == 4.0


def test_krum_by_hand() -> None:
    # n = 6, byzantine = 1: 3 nearest.
    # 0: 1 + 9 + 36 = 46    1: 1 + 4 + 25 = 30    3: 4 + 9 + 9 = 22
    # 6: 9 + 25 + 36 = 70   -9: 81 + 100 + 144    50: 44^2 + ...
    updates = numbers(0.0, 1.0, 3.0, 6.0, -9.0, 50.0)

    assert number(Krum(1).aggregate(updates)) == 3.0
    # 3, 1, 0 and 6 score best
    assert number(MultiKrum(1, 4, False).aggregate(updates)) == 2.5
    # of six clients all but one: with -9, (0 + 1 + 3 + 6 - 9) / 5 = 0.2
    assert number(MultiKrum(1, None, False).aggregate(updates)) == np.float32(0.2)


def test_bulyan_by_hand() -> None:
    # n = 7, byzantine = 1: theta = 5, beta = 3.
    # Sums over 4 nearest, 0 to 4: 23, 10, 7, 6, 6, 15.
    # Anew over 3, 2, 1, 1 nearest: 3 is taken, then 1 (6, as 2 and the other 3), 3, 0, 2.
    # Closest to the median 2 of 0, 1, 2, 3, 3: 1, 2 and one 3
    updates = numbers(0.0, 1.0, 2.0, 3.0, 3.0, 4.0, 90.0)

    assert number(Bulyan(1, True).aggregate(updates)) == 2.0
    # The first ranking's best are 1, 2, 3, 3, 4; closest to their median 3: 2 (rather than 4), 3, 3
    assert number(Bulyan(1, False).aggregate(updates)) == np.float32(8 / 3)


def test_geometric_median_by_hand() -> None:
    # Mean (0 + 0 + 9) / 3 = 3; weights 1/3, 1/3, 1/6: (9/6) / (5/6) = 1.8
    updates = numbers(0.0, 0.0, 9.0)

    assert number(GeometricMedian(1, 1e-6, True).aggregate(updates)) == np.float32(1.8)
    # smoothing = 6: all distances count as 6, which is the mean again
    assert number(GeometricMedian(5, 6.0, True).aggregate(updates)) == 3.0
    # two of four examples on either side of 4: whatever lies outside does not matter
    updates = numbers(4.0, -1.0, 70.0, examples=[2, 1, 1])
    assert number(GeometricMedian(200, 1e-6, True).aggregate(updates)) == pytest.approx(4, abs=1e-5)


def test_ties_go_to_the_lowest_client() -> None:
    # 1 and -1 are mirror images; n = 4, byzantine = 0: 1 + 4 and 1 + 4 (0 has none better)
    updates = numbers(3.0, -1.0, 1.0, -3.0)

    for order in itertools.permutations(updates):
        assert number(Krum(0).aggregate(order)) == -1.0
        assert number(MultiKrum(0, 1, True).aggregate(order)) == -1.0


def test_two_updates_are_the_first() -> None:
    assert number(Krum(None).aggregate(numbers(5.0, 1.0)[::-1])) == 5.0


# against Flower


def flowers(strategy: flower.Strategy, updates: Sequence[Update]) -> Points:
    """What Flower's strategy makes of these updates, as one vector."""
    replies = []
    for update in updates:
        content = RecordDict(
            {
                "arrays": ArrayRecord([layer.copy() for layer in update.delta]),
                "metrics": MetricRecord({"num-examples": update.examples}),
            }
        )
        about = Metadata(1, "", update.client, 0, "", "", 1.0, 1.0, "train")
        replies.append(Message(content, metadata=about))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return flat(arrays.to_numpy_ndarrays())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FedMedian(), lambda: flower.FedMedian()),
        (FedTrimmedMean(0.2), lambda: flower.FedTrimmedAvg(beta=0.2)),
        (Krum(2), lambda: flower.Krum(num_malicious_nodes=2)),
        (
            MultiKrum(2, 5, True),
            lambda: flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5),
        ),
        (Bulyan(2, False), lambda: flower.Bulyan(num_malicious_nodes=2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Strategy) else "",
)
@pytest.mark.parametrize("seed", ROUNDS)
def test_flower_agrees(ours: Strategy, theirs: Callable[[], Any], seed: int) -> None:
    updates = some_updates(seed, 12)

    assert_equals(ours.aggregate(updates), flowers(theirs(), updates))


# lying clients


@every_rule
@pytest.mark.parametrize("lie", [1e6, -1e6, 3e37, "opposite"])
@pytest.mark.parametrize("seed", ROUNDS)
def test_lying_clients_do_not_carry_it_off(
    rule: Strategy, byzantine: int, seed: int, lie: float | str
) -> None:
    honest, liars = some_updates(seed, 11)[byzantine:], some_updates(seed, 11)[:byzantine]
    honest = [dataclasses.replace(update, examples=50) for update in honest]
    sizes = itertools.cycle([lie] if isinstance(lie, float) else [1e6, -1e6])
    updates = [*(lying(liar, size) for liar, size in zip(liars, sizes, strict=False)), *honest]

    low, high = points(honest).min(axis=0), points(honest).max(axis=0)
    robust, mean = flat(rule.aggregate(updates)), flat(FedAvg().aggregate(updates))

    assert (low <= robust).all()
    assert (robust <= high).all()
    if lie != "opposite":  # these may cancel in the mean
        assert not ((low <= mean) & (mean <= high)).any()


def lying(update: Update, size: float) -> Update:
    delta = [np.full_like(layer, size) for layer in update.delta]
    return dataclasses.replace(update, examples=50, delta=delta)


@pytest.mark.parametrize("liars", [1, 3, 5])
@pytest.mark.parametrize("seed", ROUNDS)
def test_the_geometric_median_stays_near_the_honest(seed: int, liars: int) -> None:
    """Lemma of Cohen et al. (STOC 2016), on which the paper's robustness rests."""
    honest = some_updates(seed, 11)[liars:]
    updates = [*(lying(honest[0], 1e6) for _ in range(liars)), *honest]
    x = points(honest)

    away = np.linalg.norm(
        flat(GeometricMedian(150, 1e-6, False).aggregate(updates)) - x.mean(axis=0)
    )

    farthest = np.linalg.norm(x - x.mean(axis=0), axis=1).max()
    assert away <= 2 * (11 - liars) / (11 - 2 * liars) * farthest
    # Few iterations leave 1e6 * sqrt(18) times about (liars / honest)^5
    few = flat(GeometricMedian(4, 1e-6, False).aggregate(updates)) - x.mean(axis=0)
    assert np.linalg.norm(few) > 20


def test_a_claim_of_many_examples_moves_only_rules_that_count_them() -> None:
    updates = numbers(1.0, 1.0, 1.0, 5.0, examples=[10, 10, 10, 1000])

    assert number(GeometricMedian(100, 1e-6, True).aggregate(updates)) == pytest.approx(5, abs=1e-5)
    assert number(GeometricMedian(100, 1e-6, False).aggregate(updates)) == pytest.approx(1, 1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("liars", [0, 3])
def test_distances_do_not_cancel(offset: float, liars: int) -> None:
    """Updates a thousandth apart, far from the origin, beside liars a million away."""
    draw = np.random.default_rng(0)
    x = offset + draw.normal(0, 1e-3, (12, 500))
    x[:liars] = 1e6
    sent = x.astype(np.float32)
    updates = [Update(1, 0.0, 0, client=i, delta=[row]) for i, row in enumerate(sent)]
    x = sent.astype(np.float64)
    direct = ((x[:, None] - x) ** 2).sum(axis=2)
    np.fill_diagonal(direct, np.inf)

    np.testing.assert_allclose(squared_distances(updates), direct, rtol=1e-9)


@pytest.mark.parametrize("seed", ROUNDS)
def test_the_geometric_median_is_exact_beside_lies(seed: int) -> None:
    updates = some_updates(seed, 12)
    updates = [*(lying(update, 1e6) for update in updates[:3]), *updates[3:]]
    x, examples = points(updates), [update.examples for update in updates]

    median = GeometricMedian(100, 1e-6, True).aggregate(updates)

    assert_equals(median, naive_geometric_median(x, examples, 100, 1e-6))


# values in order


@pytest.mark.parametrize("n", [*range(1, 20), 31, 32, 33, 63, 64, 65, 100])
def test_ranks_are_those_of_a_sort(n: int) -> None:
    values = np.random.default_rng(n).integers(0, 3 * n, (n, 200)).astype(np.float32)  # with ties
    updates = [Update(1, 0.0, 0, client=i, delta=[row.copy()]) for i, row in enumerate(values)]
    for ranks in ([0], [n - 1], [(n - 1) // 2, n // 2], range(n // 4, n - n // 4), range(n)):
        factors = np.sqrt(2.0 + np.arange(len(ranks)))[:, None]  # so that their order shows

        (found,) = by_rank(
            updates,
            ranks,
            lambda x, ranks=ranks, factors=factors: (np.array(x)[ranks] * factors).sum(0),
        )

        expected = (np.sort(values, axis=0)[ranks] * factors).sum(0).astype(np.float32)
        np.testing.assert_array_equal(found, expected)
        for update, row in zip(updates, values, strict=True):
            np.testing.assert_array_equal(update.delta[0], row)


# in parts


@every_rule
def test_parts_join_up(rule: Strategy, byzantine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = some_updates(0, 11)
    whole = flat(rule.aggregate(updates))

    # One coordinate at a time, and five, in rows that are compared and in columns that are sorted.
    for size, compared in itertools.product((1, 55), (64, 0)):
        monkeypatch.setattr("femfed.strategies.columns._PART", size)
        monkeypatch.setattr("femfed.strategies.columns._LEAST", 1)
        monkeypatch.setattr("femfed.strategies.columns._ROW", max(1, size // 11))
        monkeypatch.setattr("femfed.strategies.columns._MOST_COMPARED", compared)
        np.testing.assert_allclose(flat(rule.aggregate(updates)), whole, atol=1e-7, rtol=0)


@every_rule
@pytest.mark.parametrize("spread", [1.0, 1e-4])  # apart, and near each other
def test_memory_is_that_of_a_part(
    rule: Strategy, byzantine: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    draw = np.random.default_rng(0)
    sent = 1 + np.float32(spread) * draw.random((11, 1_000_000), np.float32)  # 44 MB
    updates = [Update(1, 0.0, 0, client=i, delta=[row]) for i, row in enumerate(sent)]

    tracemalloc.start()
    rule.aggregate(updates)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 4_000_000 + 10_000_000  # the result, and a few copies of 2^18 values a core


@every_rule
def test_a_core_goes_through_the_updates_in_their_order(
    rule: Strategy, byzantine: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Those that are too many for the memory come from the disk, once.
    draw = np.random.default_rng(0)
    updates = [
        Update(1, 0.0, 0, client=i, delta=[draw.random(50 * columns._LEAST, np.float32)])
        for i in range(11)
    ]
    looked_at, pieces = list[int](), columns._pieces

    def noting(updates: Sequence[Update], part: tuple[int, slice]) -> list[np.ndarray]:
        looked_at.append(part[1].start)
        return pieces(updates, part)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(columns, "_PART", 11 * columns._LEAST)
    monkeypatch.setattr(columns, "_ROW", columns._LEAST)
    monkeypatch.setattr(columns, "_pieces", noting)
    rule.aggregate(updates)

    turns_back = sum(later <= before for before, later in itertools.pairwise(looked_at))
    assert len(looked_at) > 32
    assert turns_back <= 1  # from the products to the mean of what was selected


def on_a_disk(updates: Sequence[Update], noted: list[tuple[int, int]]) -> list[Update]:
    """Return the same updates, of which whole blocks can be read; note from where to where."""

    def reading(update: Update) -> Update:
        vector = flat(update.delta)
        vector = np.pad(vector, (0, -len(vector) % 1024), constant_values=np.nan)

        def read(begin: int, into: NDArray[np.float32]) -> None:
            noted.append((begin, begin + into.size))
            assert begin % 1024 == into.size % 1024 == into.ctypes.data % 4096 == 0
            into[:] = vector[begin : begin + into.size]

        return dataclasses.replace(update, read=read)

    return [reading(update) for update in updates]


@every_rule
@pytest.mark.parametrize("compared", [0, 64])
def test_from_a_disk_come_the_same_bits(
    rule: Strategy, byzantine: int, compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether updates fit in memory depends on the machine, and on what else runs there."""
    draw, shapes = np.random.default_rng(0), ((5000,), (0, 3), (70, 90), (), (900,), (1, 1024))
    updates = [
        Update(1, 0.0, 0, client=i, delta=[draw.random(shape, np.float32) for shape in shapes])
        for i in range(11)
    ]
    monkeypatch.setattr(columns, "_PART", 11 * 700)
    monkeypatch.setattr(columns, "_LEAST", 700)
    monkeypatch.setattr(columns, "_ROW", 700)
    monkeypatch.setattr(columns, "_MOST_COMPARED", compared)
    monkeypatch.setattr(columns, "_SPAN", 11 * 3000)
    noted, in_memory = list[tuple[int, int]](), rule.aggregate(updates)
    monkeypatch.setattr(columns, "_pieces", None)

    from_disk = rule.aggregate(on_a_disk(updates, noted))

    assert [layer.shape for layer in from_disk] == list(shapes)
    for one, other in zip(in_memory, from_disk, strict=True):
        np.testing.assert_array_equal(one, other)
    ways = [way for way, _ in itertools.groupby(noted)]  # all updates' same block by block
    assert len(ways) > 3
    assert sum(begin == 0 for begin, _ in ways) == (2 if isinstance(rule, TWICE) else 1)
    for (_, end), (begin, _) in itertools.pairwise(ways):
        assert begin in {0, end, end - 1024}  # a block that two share is read for both
    assert {begin == 0 for begin, _ in ways} == {True, False}


# Inner products, then a mean of what was selected.
TWICE = (MultiKrum, Bulyan, GeometricMedian)


def test_a_disk_reads_on_while_values_are_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_SPAN", 2 * 1024)
    monkeypatch.setattr(columns, "_ROW", 1024)
    updates = [
        Update(1, 0.0, 0, client=i, delta=[np.arange(4096, dtype=np.float32)]) for i in range(2)
    ]
    reached = {begin: threading.Event() for begin in range(0, 4096, 1024)}

    def reading(update: Update) -> Callable[[int, NDArray[np.float32]], None]:
        def read(begin: int, into: NDArray[np.float32]) -> None:
            into[:] = update.delta[0][begin : begin + into.size]
            reached[begin].set()

        return read

    def rule(values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        following = int(values[0][0]) + 1024
        assert following not in reached or reached[following].wait(60)
        return values[0]

    (found,) = by_rank([dataclasses.replace(u, read=reading(u)) for u in updates], [0], rule)

    np.testing.assert_array_equal(found, updates[0].delta[0])


@every_rule
def test_what_a_disk_cannot_read_is_told(rule: Strategy, byzantine: int) -> None:
    def broken(begin: int, into: NDArray[np.float32]) -> None:
        raise OSError("Input/output error")

    updates = [dataclasses.replace(update, read=broken) for update in some_updates(0, 11)]

    with pytest.raises(OSError, match="Input/output error"):
        rule.aggregate(updates)


@every_rule
def test_an_empty_layer_and_a_scalar_are_layers(rule: Strategy, byzantine: int) -> None:
    updates = [
        Update(1, 0.0, 0, client=i, delta=[np.zeros((0, 3), np.float32), np.array(1, np.float32)])
        for i in range(11)
    ]

    empty, scalar = rule.aggregate(updates)

    assert (empty.shape, scalar.shape, float(scalar)) == ((0, 3), (), 1.0)


# what is refused


@pytest.mark.parametrize(("least", "rule"), [(11, Krum(4)), (11, MultiKrum(4, 1, True))])
@pytest.mark.parametrize("n", [1, 10])
def test_too_few_updates_for_krum(rule: Strategy, least: int, n: int) -> None:
    with pytest.raises(UserError, match=rf"byzantine=4 with {n} .* {least}: .*clients_per_round"):
        rule.aggregate(some_updates(0, n))
    rule.aggregate(some_updates(0, least))


@pytest.mark.parametrize("rescored", [True, False])
@pytest.mark.parametrize("n", [1, 14])
def test_too_few_updates_for_bulyan(n: int, rescored: bool) -> None:
    with pytest.raises(UserError, match=rf"byzantine=3 with {n} .* 15: .*clients_per_round"):
        Bulyan(3, rescored).aggregate(some_updates(0, n))
    Bulyan(3, rescored).aggregate(some_updates(0, 15))


def test_too_few_updates_to_select() -> None:
    with pytest.raises(UserError, match=r"selected=6 with 5 .* 6: .*clients_per_round"):
        MultiKrum(0, 6, False).aggregate(some_updates(0, 5))


@pytest.mark.parametrize(("n", "krum", "bulyan"), [(3, 0, 0), (5, 1, 0), (10, 3, 1), (11, 4, 2)])
def test_null_is_as_many_as_can_be_withstood(n: int, krum: int, bulyan: int) -> None:
    for seed in range(20):  # one byzantine client less changes some of them
        updates = some_updates(seed, n)
        assert_equals(Krum(None).aggregate(updates), flat(Krum(krum).aggregate(updates)))
        assert_equals(
            MultiKrum(None, None, False).aggregate(updates),
            flat(MultiKrum(krum, n - krum, False).aggregate(updates)),
        )
        assert_equals(
            Bulyan(None, True).aggregate(updates), flat(Bulyan(bulyan, True).aggregate(updates))
        )


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (Krum(1), "byzantine"),
        (MultiKrum(1, 1, False), "byzantine"),
        (MultiKrum(1, 1, False), "selected"),
        (MultiKrum(1, 1, False), "by_examples"),
        (Bulyan(1, True), "byzantine"),
        (Bulyan(1, True), "rescored"),
        (GeometricMedian(4, 1e-6, True), "iterations"),
        (GeometricMedian(4, 1e-6, True), "by_examples"),
    ],
)
@pytest.mark.parametrize("value", [-1, 1.5, float("inf"), float("nan"), "2"])
def test_a_whole_number_is_whole_and_a_switch_a_switch(
    rule: Strategy, name: str, value: object
) -> None:
    with pytest.raises(UserError, match=rf"strategy\.{name}={value}; expected"):
        dataclasses.replace(rule, **{name: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedTrimmedMean(0.5),
        lambda: FedTrimmedMean(float("inf")),
        lambda: MultiKrum(0, 0, True),
        lambda: Krum(True),
        lambda: GeometricMedian(True, 1e-6, True),
        lambda: GeometricMedian(4, 0.0, True),
        lambda: GeometricMedian(4, float("inf"), True),
    ],
)
def test_bad_values_are_refused(make: Callable[[], Strategy]) -> None:
    with pytest.raises(UserError, match=r"^strategy\.\w+=.*; expected"):
        make()

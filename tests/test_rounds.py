"""The round loop: cohorts, federations, what a round's rows hold; a fake stands for the workers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from femfed import UserError
from femfed.data.store import WriterStore
from femfed.engine.federation import Federation, Writers, draw_federation
from femfed.engine.rounds import (
    NOTHING_FINISHED,
    Round,
    Schedule,
    Trained,
    client_rows,
    draw_cohort,
    mean_of_writers,
    pooled,
    row,
    run_rounds,
    spread,
    writer_rows,
)
from femfed.report.files import CLIENT_COLUMNS, ROUND_COLUMNS, WRITER_COLUMNS
from femfed.seeds import generator
from femfed.strategies.base import Cohort, Outcome, State, Strategy, Update, Weights

SCHEDULE = Schedule(
    seed=3, rounds=7, clients=20, clients_per_round=4, failure_rate=0.0, evaluate_every=3
)
NOBODY = np.empty(0, np.int64)
TRAINABLE = np.arange(50) * 2  # every second writer has images to train on


# seeds


def test_generators_are_equal_only_if_all_coordinates_are() -> None:
    coordinates = list(product((0, 1, 2**32), ("cohort", "batches"), (0, 1), (0, 1)))

    first = [generator(*each).integers(2**63, size=4).tolist() for each in coordinates]
    again = [generator(*each).integers(2**63, size=4).tolist() for each in coordinates]

    assert first == again
    assert all(ours != theirs for ours, theirs in combinations(first, 2))


def test_a_seed_keeps_its_meaning() -> None:
    """Another order or hash of the coordinates would change every result ever published."""
    numbers = generator(1, "split", round=2, client=3).integers(1000, size=4)

    assert numbers.tolist() == [942, 577, 867, 257]


def test_generators_are_independent() -> None:
    expected = generator(0, "cohort", 2).random(3).tolist()
    other, ours = generator(0, "cohort", 1), generator(0, "cohort", 2)

    other.random(1000)

    assert ours.random(3).tolist() == expected


def test_generators_of_neighbours_do_not_resemble_each_other() -> None:
    draws = np.stack([generator(0, "batches", round=1, client=i).random(4000) for i in range(20)])

    # The correlation of 4,000 independent pairs is 0 +- 0.016.
    assert np.abs(np.corrcoef(draws) - np.eye(20)).max() < 0.08


# cohorts and federations


def test_a_cohort_is_a_function_of_seed_and_round() -> None:
    cohorts = [draw_cohort(0, number, 100, 10) for number in range(1, 51)]

    for number, cohort in enumerate(cohorts, start=1):
        assert np.array_equal(cohort, draw_cohort(0, number, 100, 10))
        assert (np.diff(cohort) > 0).all()  # sorted, nobody twice
        assert 0 <= cohort.min() <= cohort.max() < 100
    assert len({tuple(cohort) for cohort in cohorts}) == 50
    assert not np.array_equal(cohorts[0], draw_cohort(1, 1, 100, 10))
    assert len(set(np.concatenate(cohorts))) > 95  # in 500 draws 100 * 0.9**50 = 0.5 are missed


def test_a_cohort_of_everybody() -> None:
    assert draw_cohort(0, 1, 5, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_smaller_federation_is_part_of_a_larger() -> None:
    small = draw_federation(0, TRAINABLE, NOBODY, 10, 0.1)
    large = draw_federation(0, TRAINABLE, NOBODY, 45, 0.1)

    assert small.clients.tolist() == large.clients[:10].tolist()
    assert small.unseen.tolist() == large.unseen.tolist()
    assert (len(large.clients), len(large.unseen)) == (45, 5)
    everybody = sorted([*large.clients.tolist(), *large.unseen.tolist()])
    assert everybody == TRAINABLE.tolist()  # nobody twice, nobody without images
    assert small.clients.tolist() != draw_federation(1, TRAINABLE, NOBODY, 10, 0.1).clients.tolist()


def test_the_unseen_yield_to_the_clients() -> None:
    assert len(draw_federation(0, TRAINABLE, NOBODY, 48, 0.1).unseen) == 2
    everybody = draw_federation(0, TRAINABLE, NOBODY, 50, 0.1)
    assert sorted(everybody.clients.tolist()) == TRAINABLE.tolist()
    assert everybody.unseen.tolist() == []
    assert draw_federation(0, TRAINABLE, NOBODY, 10, 0.0).unseen.tolist() == []


def test_too_many_clients_are_refused() -> None:
    with pytest.raises(UserError, match=r"clients=51, but the dataset has 50 writers; expected"):
        draw_federation(0, TRAINABLE, NOBODY, 51, 0.1)


# outcomes


def test_pooled_weighs_by_examples() -> None:
    # (6 + 2) / (3 + 1) and (3 + 0) / (3 + 1); a writer without examples does not count
    outcomes = [Outcome(3, 6.0, 3), Outcome(0, 0.0, 0), Outcome(1, 2.0, 0)]

    assert pooled(outcomes) == (2.0, 0.75)
    assert pooled([Outcome(0, 0.0, 0)]) == (None, None)
    assert pooled([]) == (None, None)


def test_spread_counts_every_writer_once() -> None:
    # Accuracies 0, 0.1, ..., 1 of writers of different size: p10 is the second smallest of eleven,
    # and a tenth of eleven writers is the worst one.
    outcomes = [Outcome(10 * n, 0.0, n * n) for n in range(10, 0, -1)]
    outcomes += [Outcome(7, 0.0, 0), Outcome(0, 0.0, 0)]

    expected = {"mean": 0.5, "p10": 0.1, "p50": 0.5, "p90": 0.9, "worst_tenth": 0.0}
    assert spread(outcomes) == pytest.approx({f"accuracy_{k}": v for k, v in expected.items()})


def test_spread_between_two_writers() -> None:
    # 0.2 + (0.1, 0.5, 0.9) * 0.6, and the worst of two
    expected = {"mean": 0.5, "p10": 0.26, "p50": 0.5, "p90": 0.74, "worst_tenth": 0.2}

    found = spread([Outcome(10, 0.0, 8), Outcome(5, 0.0, 1)])

    assert found == pytest.approx({f"accuracy_{k}": v for k, v in expected.items()})


def test_the_mean_of_writers_counts_each_once_and_the_pooled_accuracy_each_image() -> None:
    # 9 of 10 and 0 of 2 images: (0.9 + 0) / 2, and 9 / 12
    outcomes = [Outcome(10, 0.0, 9), Outcome(2, 0.0, 0), Outcome(0, 0.0, 0)]

    assert mean_of_writers(outcomes) == pytest.approx(0.45)
    assert pooled(outcomes)[1] == 0.75
    assert mean_of_writers([]) is None


def test_the_worst_tenth_of_many_is_their_mean() -> None:
    # 30 writers: the worst three have 0, 0.01 and 0.02
    found = spread([Outcome(100, 0.0, correct) for correct in range(30)])

    assert found["accuracy_worst_tenth"] == pytest.approx(0.01)


@pytest.mark.parametrize("outcomes", [[], [Outcome(0, 0.0, 0)]])
def test_spread_of_nobody(outcomes: list[Outcome]) -> None:
    assert set(spread(outcomes).values()) == {None}
    assert set(spread(outcomes)) == set(spread([Outcome(1, 0.0, 1)]))


# the loop


@dataclass
class FakeWorkers:
    """Workers whose delta is the round's number and who note what they are asked."""

    asked: list[tuple[object, ...]] = field(default_factory=list)

    def train(self, weights: Weights, state: State, cohort: Writers, round: int) -> Trained:
        self.asked.append(("train", round, float(weights[0][0]), cohort.tolist()))
        outcomes = [Outcome(int(client) + 1, 2.0, 1) for client in cohort]
        updates = [
            Update(**vars(outcome), client=client, delta=[np.float32([client])])
            for client, outcome in zip(cohort.tolist(), outcomes, strict=True)
        ]
        seconds = [0.25] * len(cohort)
        return Trained([np.float32([round])], updates, [], 1.0, 1.0, cohort, outcomes, seconds)

    def evaluate(
        self, weights: Weights, state: State
    ) -> tuple[Sequence[Outcome], Sequence[Outcome]]:
        self.asked.append(("evaluate", self.asked[-1][1], float(weights[0][0])))
        return [Outcome(2, 1.0, 1)] * SCHEDULE.clients, [Outcome(4, 1.0, 4)] * 3


@dataclass(frozen=True)
class Counting(Strategy):
    """Federated averaging that counts its rounds."""

    def init(self, weights: Weights) -> State:
        return {"rounds": [np.float32([0])]}

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        (count,) = state["rounds"]
        return [w + d for w, d in zip(weights, delta, strict=True)], {"rounds": [count + 1]}


def run(workers: FakeWorkers, finished: int = 0, **changes: int) -> list[Round]:
    """Run from round `finished`, when weight and state are 1 + ... + finished and finished."""
    done = max(0, finished)
    weights = [np.float32([done * (done + 1) / 2])]
    state = {"rounds": [np.float32([done])]}
    schedule = replace(SCHEDULE, **changes)
    return list(run_rounds(schedule, Counting(), workers, weights, state, finished))


def test_rounds_follow_one_another() -> None:
    workers = FakeWorkers()

    rounds = run(workers, rounds=3)

    cohorts = [draw_cohort(3, number, 20, 4).tolist() for number in (1, 2, 3)]
    assert workers.asked == [
        ("train", 1, 0.0, cohorts[0]),
        ("train", 2, 1.0, cohorts[1]),
        ("train", 3, 3.0, cohorts[2]),
        ("evaluate", 3, 6.0),
    ]
    assert [r.number for r in rounds] == [1, 2, 3]
    assert [float(r.weights[0][0]) for r in rounds] == [1, 3, 6]
    assert [float(r.state["rounds"][0][0]) for r in rounds] == [1, 2, 3]
    assert [r.cohort.tolist() for r in rounds] == cohorts


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7])]
)
def test_every_kth_round_and_the_last_are_evaluated(every: int, expected: list[int]) -> None:
    rounds = run(FakeWorkers(), evaluate_every=every)

    assert [r.number for r in rounds if r.seen is not None] == expected
    assert [r.number for r in rounds if r.unseen is not None] == expected


@pytest.mark.parametrize("every", [1, 100])
def test_round_0_evaluates_the_initial_weights_and_trains_nobody(every: int) -> None:
    workers, without = FakeWorkers([("start", 0)]), FakeWorkers()

    first, *rest = run(workers, NOTHING_FINISHED, evaluate_every=every)
    others = run(without, evaluate_every=every)

    assert workers.asked[1:] == [("evaluate", 0, 0.0), *without.asked]
    assert [r.number for r in (first, *rest)] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [r.weights for r in rest] == [r.weights for r in others]
    assert (first.weights, first.is_last) == ([np.float32([0])], False)
    cells = row(first)
    assert tuple(cells) == ROUND_COLUMNS
    assert (cells["round"], cells["test_accuracy"], cells["unseen_accuracy"]) == (0, 0.5, 1.0)
    zeros = ("clients", "failed", "examples", "bytes_up", "bytes_down", "seconds_train")
    assert [cells[name] for name in zeros] == [0] * 6
    assert (cells["train_loss"], cells["train_accuracy"]) == (None, None)


@pytest.mark.parametrize("finished", [1, 4, 6, 7])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(finished: int) -> None:
    whole, resumed = FakeWorkers(), FakeWorkers()

    rounds = run(whole)
    rest = run(resumed, finished)

    assert [r.number for r in rest] == list(range(finished + 1, 8))
    assert resumed.asked == [asked for asked in whole.asked if int(str(asked[1])) > finished]
    assert [r.weights for r in rest] == [r.weights for r in rounds[finished:]]
    assert [r.state for r in rest] == [r.state for r in rounds[finished:]]


def test_a_round_is_run_when_it_is_asked_for() -> None:
    workers = FakeWorkers()
    weights = [np.float32([0])]

    rounds = run_rounds(SCHEDULE, Counting(), workers, weights, Counting().init(weights))
    next(rounds)

    assert [asked[:2] for asked in workers.asked] == [("train", 1)]
    assert weights[0].tolist() == [0]


def test_a_failing_client_is_counted_and_not_asked() -> None:
    workers, whole = FakeWorkers(), FakeWorkers()

    rounds = run(workers, failure_rate=0.4, rounds=30)
    run(whole, rounds=30)

    asked, drawn = ([a for a in w.asked if a[0] == "train"] for w in (workers, whole))
    for finished in rounds:
        assert len(finished.cohort) + finished.failed == 4
        assert row(finished)["failed"] == finished.failed
    trained = {number: cohort for _, number, _, cohort in asked}
    for _, number, _, cohort in drawn:
        assert set(trained.get(number, [])) <= set(cohort)
    failed = sum(finished.failed for finished in rounds)
    assert 120 * 0.4 - 16 < failed < 120 * 0.4 + 16  # three standard deviations


def test_a_round_that_nobody_completes_changes_nothing() -> None:
    rounds = run(FakeWorkers(), failure_rate=0.9, rounds=30)

    empty = [finished for finished in rounds if not len(finished.cohort)]
    assert empty  # 0.9^4 of 30
    for finished in empty:
        before = rounds[finished.number - 2] if finished.number > 1 else None
        assert finished.weights == (before.weights if before else [np.float32([0])])
        assert row(finished)["clients"] == row(finished)["bytes_up"] == 0
        assert row(finished)["train_loss"] is None


def test_whoever_does_not_average_is_given_every_update() -> None:
    class Largest(Counting):
        def aggregate(self, updates: Sequence[Update]) -> Weights:
            return max(updates, key=lambda update: update.client).delta

    weights = [np.float32([0])]
    schedule = replace(SCHEDULE, rounds=2)
    first, second = run_rounds(schedule, Largest(), FakeWorkers(), weights, Counting().init([]))

    assert float(first.weights[0][0]) == max(first.cohort)
    assert float(second.weights[0][0]) == max(first.cohort) + max(second.cohort)


def test_what_is_sent_besides_counts_as_bytes() -> None:
    class Twice(Counting):
        broadcasts = ("control",)
        sends_extra = True

    class Never(Counting):
        exchanges = False

    def first(strategy: Strategy) -> Round:
        weights = [np.zeros(3, np.float32)]
        return next(iter(run_rounds(SCHEDULE, strategy, FakeWorkers(), weights, {"rounds": [0]})))

    assert (row(first(Counting()))["bytes_up"], row(first(Counting()))["bytes_down"]) == (48, 48)
    assert (row(first(Twice()))["bytes_up"], row(first(Twice()))["bytes_down"]) == (96, 96)
    assert row(first(Never()))["bytes_up"] == 0


def test_seconds_are_told_apart() -> None:
    """The clock is read at start, after training, around the evaluation and at the end."""
    readings: Iterator[float] = iter([10.0, 13.0, 14.0, 19.0, 21.0])
    schedule, weights = replace(SCHEDULE, rounds=1), [np.float32([0])]

    (only,) = run_rounds(
        schedule, Strategy(), FakeWorkers(), weights, {}, clock=lambda: next(readings)
    )

    assert (only.seconds_train, only.seconds_evaluate, only.seconds_total) == (3.0, 5.0, 11.0)
    assert row(only)["seconds_overhead"] == 3.0


# rows


@pytest.fixture
def federation() -> Federation:
    """Client i is writer 22 - i; writers 0, 1 and 2 are unseen."""
    return Federation(np.arange(22, 2, -1), np.arange(3))


@pytest.fixture
def store(tmp_path: Path) -> WriterStore:
    """The index of 23 writers in shards of ten."""
    n = np.arange(23)
    return WriterStore(
        folder=tmp_path,
        names=tuple(f"f{i:04}_00" for i in n),
        numbers=n // 10,
        subject_numbers=n % 10,
        offsets=np.arange(24),
        train_examples=np.full(23, -1),
        apart=np.zeros(23, np.bool_),
        rows=None,
        images=np.zeros((23, 28, 28), np.uint8),
        labels=np.zeros(23, np.uint8),
        skipped_writers=0,
    )


@pytest.fixture
def rounds() -> list[Round]:
    return run(FakeWorkers())


def test_the_row_of_a_round(rounds: list[Round]) -> None:
    last = row(rounds[-1])
    examples = sum(rounds[-1].cohort.tolist()) + 4  # client i has i + 1

    assert tuple(last) == ROUND_COLUMNS
    assert (last["round"], last["clients"], last["examples"]) == (7, 4, examples)
    assert (last["train_loss"], last["train_accuracy"]) == (8 / examples, 4 / examples)
    assert (last["test_loss"], last["test_accuracy"]) == (0.5, 0.5)
    assert (last["unseen_loss"], last["unseen_accuracy"]) == (0.25, 1.0)
    assert last["accuracy_p10"] == last["accuracy_worst_tenth"] == last["accuracy_mean"] == 0.5
    assert last["unseen_accuracy_mean"] == 1.0
    assert last["bytes_up"] == last["bytes_down"] == 4 * 4  # four clients, one float32


def test_the_row_of_a_round_without_evaluation(rounds: list[Round]) -> None:
    first = row(rounds[0])

    assert tuple(first) == ROUND_COLUMNS
    empty = [name for name, value in first.items() if value is None]
    assert empty == [n for n in ROUND_COLUMNS if n.startswith(("test", "accuracy", "unseen"))]


def test_the_rows_of_clients(
    rounds: list[Round], federation: Federation, store: WriterStore
) -> None:
    rows = client_rows(rounds[1], federation, store)

    assert [tuple(each) for each in rows] == [CLIENT_COLUMNS] * 4
    assert [each["client"] for each in rows] == rounds[1].cohort.tolist()
    for each in rows:
        index = 22 - each["client"]
        assert each["writer"] == f"f{index:04}_00"
        assert (each["number"], each["subject_number"]) == divmod(index, 10)
        assert (each["round"], each["examples"]) == (2, each["client"] + 1)
        assert each["train_loss"] == 2 / each["examples"]
        assert (each["seconds"], each["bytes_up"], each["bytes_down"]) == (0.25, 4, 4)


def test_the_rows_of_writers(
    rounds: list[Round], federation: Federation, store: WriterStore
) -> None:
    rows = writer_rows(rounds[-1], federation, store)

    assert [tuple(each) for each in rows] == [WRITER_COLUMNS] * 23
    assert [each["client"] for each in rows] == [*range(20), None, None, None]
    assert [each["role"] for each in rows] == ["seen"] * 20 + ["unseen"] * 3
    assert [each["writer"][:5] for each in rows[19:]] == ["f0003", "f0000", "f0001", "f0002"]
    assert [each["test_accuracy"] for each in rows[18:]] == [0.5, 0.5, 1.0, 1.0, 1.0]
    assert writer_rows(rounds[0], federation, store) == []  # not evaluated

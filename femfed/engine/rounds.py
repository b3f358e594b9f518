"""The round loop: each round is a pure function of (weights, state, round, seed)."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from femfed.data.store import WriterStore
from femfed.engine.federation import Federation, Writers
from femfed.seeds import generator
from femfed.strategies.base import Outcome, State, Strategy, Weights


def draw_cohort(seed: int, round: int, clients: int, clients_per_round: int) -> Writers:
    """Return the clients of one round, drawn without replacement, in ascending order."""
    draw = generator(seed, "cohort", round)
    return np.sort(draw.choice(clients, clients_per_round, replace=False))


@dataclass(frozen=True)
class Trained:
    """What the workers made of one cohort.

    Attributes:
        delta: the aggregated update.
        outcomes: of each client of the cohort, in its order.
        seconds: each client's own time, in its order.
    """

    delta: Weights
    outcomes: Sequence[Outcome]
    seconds: Sequence[float]


class Workers(Protocol):
    """Whoever trains and evaluates: Flower's grid behind `apps.py`, or a fake in a test."""

    def train(self, weights: Weights, cohort: Writers, round: int) -> Trained:
        """Train `cohort` from `weights` and aggregate."""

    def evaluate(self, weights: Weights, round: int) -> tuple[Sequence[Outcome], Sequence[Outcome]]:
        """Evaluate `weights` on every client's held-out images and on every unseen writer."""


@dataclass(frozen=True)
class Round:
    """One finished round.

    Attributes:
        number: counts from 1.
        weights: the global weights after it.
        state: the strategy's state after it.
        cohort: the clients that trained.
        trained: what they came to.
        seen: evaluation on each client's held-out images, None in a round without evaluation.
        unseen: evaluation on each unseen writer, None likewise.
        seconds_train: from the cohort's dispatch to its aggregate.
        seconds_evaluate: of the evaluation.
        seconds_total: of the whole round.
    """

    number: int
    weights: Weights
    state: State
    cohort: Writers
    trained: Trained
    seen: Sequence[Outcome] | None
    unseen: Sequence[Outcome] | None
    seconds_train: float
    seconds_evaluate: float
    seconds_total: float


@dataclass(frozen=True)
class Schedule:
    """How many rounds of how many clients.

    Attributes:
        seed: seed of the run.
        rounds: rounds to run.
        clients: writers in the federation.
        clients_per_round: writers in a cohort.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
    """

    seed: int
    rounds: int
    clients: int
    clients_per_round: int
    evaluate_every: int


def run_rounds(
    schedule: Schedule,
    strategy: Strategy,
    workers: Workers,
    weights: Weights,
    state: State,
    finished: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Round]:
    """Yield round after round, from the one after `finished` on."""
    for number in range(finished + 1, schedule.rounds + 1):
        start = clock()
        cohort = draw_cohort(schedule.seed, number, schedule.clients, schedule.clients_per_round)
        trained = workers.train(weights, cohort, number)
        seconds_train = clock() - start
        weights, state = strategy.apply(weights, trained.delta, state)
        seen = unseen = None
        evaluation = clock()
        if number % schedule.evaluate_every == 0 or number == schedule.rounds:
            seen, unseen = workers.evaluate(weights, number)
        seconds_evaluate = clock() - evaluation
        yield Round(
            number=number,
            weights=weights,
            state=state,
            cohort=cohort,
            trained=trained,
            seen=seen,
            unseen=unseen,
            seconds_train=seconds_train,
            seconds_evaluate=seconds_evaluate,
            seconds_total=clock() - start,
        )


def pooled(outcomes: Sequence[Outcome]) -> tuple[float | None, float | None]:
    """Return mean loss and accuracy over all images of all writers, None where there are none."""
    examples = sum(outcome.examples for outcome in outcomes)
    if not examples:
        return None, None
    loss_sum = sum(outcome.loss_sum for outcome in outcomes)
    return loss_sum / examples, sum(outcome.correct for outcome in outcomes) / examples


def spread(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Return p10, p50, p90 of the writers' accuracies and the mean of the worst tenth of them."""
    accuracies = np.sort([o.correct / o.examples for o in outcomes if o.examples])
    if not accuracies.size:
        return dict.fromkeys(
            ("accuracy_p10", "accuracy_p50", "accuracy_p90", "accuracy_worst_tenth")
        )
    p10, p50, p90 = np.quantile(accuracies, (0.1, 0.5, 0.9))
    worst = accuracies[: max(1, round(len(accuracies) / 10))]
    return {
        "accuracy_p10": float(p10),
        "accuracy_p50": float(p50),
        "accuracy_p90": float(p90),
        "accuracy_worst_tenth": float(worst.mean()),
    }


def row(finished: Round) -> dict[str, Any]:
    """Return a round as a row of rounds.csv.

    Bytes are those a client of a real federation would exchange: the weights down, as many numbers
    up, 4 bytes each.
    """
    train_loss, train_accuracy = pooled(finished.trained.outcomes)
    seen, unseen = finished.seen or (), finished.unseen or ()
    test_loss, test_accuracy = pooled(seen)
    unseen_loss, unseen_accuracy = pooled(unseen)
    exchanged = _bytes(finished) * len(finished.cohort)
    return {
        "round": finished.number,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        **spread(seen),
        "unseen_loss": unseen_loss,
        "unseen_accuracy": unseen_accuracy,
        "clients": len(finished.cohort),
        "examples": sum(outcome.examples for outcome in finished.trained.outcomes),
        "bytes_up": exchanged,
        "bytes_down": exchanged,
        "seconds_train": finished.seconds_train,
        "seconds_evaluate": finished.seconds_evaluate,
        "seconds_overhead": (
            finished.seconds_total - finished.seconds_train - finished.seconds_evaluate
        ),
        "seconds_total": finished.seconds_total,
    }


def client_rows(
    finished: Round, federation: Federation, store: WriterStore
) -> list[dict[str, Any]]:
    """Return a round's clients as rows of clients.csv."""
    rows = []
    trained = zip(
        finished.cohort.tolist(), finished.trained.outcomes, finished.trained.seconds, strict=True
    )
    for client, outcome, seconds in trained:
        train_loss, train_accuracy = pooled([outcome])
        rows.append(
            {
                "round": finished.number,
                "client": client,
                **_identity(store, int(federation.clients[client])),
                "examples": outcome.examples,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "seconds": seconds,
                "bytes_up": _bytes(finished),
                "bytes_down": _bytes(finished),
            }
        )
    return rows


def writer_rows(
    finished: Round, federation: Federation, store: WriterStore
) -> list[dict[str, Any]]:
    """Return every evaluated writer as a row of writers.csv."""
    seen = zip(federation.clients.tolist(), finished.seen or (), strict=False)
    unseen = zip(federation.unseen.tolist(), finished.unseen or (), strict=False)
    roles = [("seen", i, index, outcome) for i, (index, outcome) in enumerate(seen)]
    roles += [("unseen", None, index, outcome) for index, outcome in unseen]  # type: ignore[misc]
    rows = []
    for role, client, index, outcome in roles:
        test_loss, test_accuracy = pooled([outcome])
        rows.append(
            {
                **_identity(store, index),
                "role": role,
                "client": client,
                "examples": outcome.examples,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
            }
        )
    return rows


def _bytes(finished: Round) -> int:
    return sum(layer.nbytes for layer in finished.weights)


def _identity(store: WriterStore, index: int) -> dict[str, Any]:
    return {
        "writer": store.names[index],
        "number": int(store.numbers[index]),
        "subject_number": int(store.subject_numbers[index]),
    }

"""The round loop: each round is a pure function of (weights, state, round, seed)."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from femfed import RunError
from femfed.data.store import CLASSES, WriterStore
from femfed.engine.federation import Federation, Writers
from femfed.local import is_finite
from femfed.seeds import generator
from femfed.strategies.base import Cohort, Outcome, State, Strategy, Update, Weights

NOTHING_FINISHED = -1  # the last finished round of a run that has not evaluated round 0
DIVERGED = 10 * math.log(CLASSES)  # loss per image; guessing has a tenth of it


def draw_cohort(seed: int, round: int, clients: int, clients_per_round: int) -> Writers:
    """Return the clients of one round, drawn without replacement, in ascending order."""
    draw = generator(seed, "cohort", round)
    return np.sort(draw.choice(clients, clients_per_round, replace=False))


def draw_completing(seed: int, round: int, cohort: Writers, failure_rate: float) -> Writers:
    """Return those of a cohort who complete the round."""
    return cohort[generator(seed, "failures", round).random(len(cohort)) >= failure_rate]


@dataclass(frozen=True)
class Trained:
    """What the workers made of one cohort.

    Attributes:
        delta: the weighted mean of the updates, where the strategy averages.
        updates: the single updates in the clients' order, where it does not.
        extra: the mean of what clients sent besides; empty where they send nothing else.
        most_steps: the most local steps that any of the cohort takes.
        weight_sum: sum of the clients' weights in these means.
        cohort: who of the cohort completed the round, in its order.
        outcomes: of each of these.
        seconds: each one's own time.
    """

    delta: Weights
    updates: Sequence[Update]
    extra: Weights
    most_steps: float
    weight_sum: float
    cohort: Writers
    outcomes: Sequence[Outcome]
    seconds: Sequence[float]

    def summary(self, drawn: int, clients: int) -> Cohort:
        """Return what the server knows of the cohort besides the updates.

        Args:
            drawn: clients drawn for the round.
            clients: of the federation.
        """
        return Cohort(
            outcomes=self.outcomes,
            drawn=drawn,
            clients=clients,
            most_steps=self.most_steps,
            weight_sum=self.weight_sum,
            extra=self.extra,
        )


class Workers(Protocol):
    """Whoever trains and evaluates: Flower's grid behind `apps.py`, or a fake in a test."""

    def train(self, weights: Weights, state: State, cohort: Writers, round: int) -> Trained:
        """Train `cohort` from `weights`; average where the strategy does."""

    def evaluate(
        self, weights: Weights, state: State
    ) -> tuple[Sequence[Outcome], Sequence[Outcome]]:
        """Evaluate `weights` on every client's held-out images and on every unseen writer."""


@dataclass(frozen=True)
class Round:
    """One finished round.

    Attributes:
        number: counts from 1; round 0 evaluates the initial weights and trains no client.
        weights: the global weights after it.
        state: the strategy's state after it.
        cohort: the clients that trained.
        failed: clients that were drawn and did not complete the round.
        trained: what the cohort came to.
        bytes_up: what each client sent.
        bytes_down: what each client was sent.
        seen: evaluation on each client's held-out images, None in a round without evaluation.
        unseen: evaluation on each unseen writer, None likewise.
        is_last: whether the run ends with it.
        seconds_train: from the cohort's dispatch to its aggregate.
        seconds_evaluate: of the evaluation.
        seconds_total: of the whole round.
    """

    number: int
    weights: Weights
    state: State
    cohort: Writers
    failed: int
    trained: Trained
    bytes_up: int
    bytes_down: int
    seen: Sequence[Outcome] | None
    unseen: Sequence[Outcome] | None
    is_last: bool
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
        failure_rate: probability that a client that was drawn does not complete the round.
        evaluate_every: rounds between evaluations; round 0 and the last are always evaluated.
        stop_on_divergence: whether a loss or weights beyond all bounds end the run.
    """

    seed: int
    rounds: int
    clients: int
    clients_per_round: int
    failure_rate: float
    evaluate_every: int
    stop_on_divergence: bool = True


def run_rounds(
    schedule: Schedule,
    strategy: Strategy,
    workers: Workers,
    weights: Weights,
    state: State,
    finished: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Round]:
    """Yield round after round, from the one after `finished` on.

    After `NOTHING_FINISHED` comes round 0, the evaluation of the initial weights.
    """
    if finished == NOTHING_FINISHED:
        yield _round_0(workers, weights, state, clock)
        finished = 0
    size = sum(layer.nbytes for layer in weights) if strategy.exchanges else 0
    for number in range(finished + 1, schedule.rounds + 1):
        start = clock()
        drawn = draw_cohort(schedule.seed, number, schedule.clients, schedule.clients_per_round)
        cohort = draw_completing(schedule.seed, number, drawn, schedule.failure_rate)
        trained = Trained([], [], [], 0.0, 0.0, cohort, [], [])
        if len(cohort):
            trained = workers.train(weights, state, cohort, number)
        seconds_train = clock() - start
        if trained.outcomes:
            summary = trained.summary(len(drawn), schedule.clients)
            if strategy.averages:
                weights, state = strategy.apply(weights, trained.delta, state, summary)
            else:
                weights, state = strategy.combine(weights, trained.updates, state, summary)
        if schedule.stop_on_divergence:
            _check(number, weights, trained)
        seen = unseen = None
        evaluation = clock()
        if number % schedule.evaluate_every == 0 or number == schedule.rounds:
            seen, unseen = workers.evaluate(weights, state)
        seconds_evaluate = clock() - evaluation
        yield Round(
            number=number,
            weights=weights,
            state=state,
            cohort=trained.cohort[:0] if strategy.pools else trained.cohort,
            failed=0 if strategy.pools else len(drawn) - len(trained.cohort),
            trained=trained,
            bytes_up=size * (1 + strategy.sends_extra),
            bytes_down=size * (1 + len(strategy.broadcasts)),
            seen=seen,
            unseen=unseen,
            is_last=number == schedule.rounds,
            seconds_train=seconds_train,
            seconds_evaluate=seconds_evaluate,
            seconds_total=clock() - start,
        )


def _round_0(workers: Workers, weights: Weights, state: State, clock: Callable[[], float]) -> Round:
    nobody = np.empty(0, np.int64)
    start = clock()
    seen, unseen = workers.evaluate(weights, state)
    seconds = clock() - start
    return Round(
        number=0,
        weights=weights,
        state=state,
        cohort=nobody,
        failed=0,
        trained=Trained([], [], [], 0.0, 0.0, nobody, [], []),
        bytes_up=0,
        bytes_down=0,
        seen=seen,
        unseen=unseen,
        is_last=False,
        seconds_train=0.0,
        seconds_evaluate=seconds,
        seconds_total=seconds,
    )


def _check(number: int, weights: Weights, trained: Trained) -> None:
    loss, _ = pooled(trained.outcomes)
    finite = all(is_finite(layer) for layer in weights)
    if finite and (loss is None or loss < DIVERGED):
        return
    what = f"a training loss of {loss:.3g}" if finite else "weights that are not finite"
    raise RunError(
        f"the run diverged: round {number} came to {what}, where guessing is a loss of "
        f"{math.log(CLASSES):.2f}; try a smaller local.learning_rate or server learning rate, or "
        "go on regardless with stop_on_divergence=false"
    )


def pooled(outcomes: Sequence[Outcome]) -> tuple[float | None, float | None]:
    """Return mean loss and accuracy over all images of all writers, None where there are none."""
    examples = sum(outcome.examples for outcome in outcomes)
    if not examples:
        return None, None
    loss_sum = sum(outcome.loss_sum for outcome in outcomes)
    return loss_sum / examples, sum(outcome.correct for outcome in outcomes) / examples


def mean_of_writers(outcomes: Sequence[Outcome]) -> float | None:
    """Return the mean of the writers' accuracies, each counted once; None where there are none."""
    accuracies = [o.correct / o.examples for o in outcomes if o.examples]
    return float(np.mean(accuracies)) if accuracies else None


def spread(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Return mean, p10, p50 and p90 of the writers' accuracies, and the worst tenth's mean."""
    accuracies = np.sort([o.correct / o.examples for o in outcomes if o.examples])
    if not accuracies.size:
        names = ("mean", "p10", "p50", "p90", "worst_tenth")
        return dict.fromkeys(f"accuracy_{name}" for name in names)
    p10, p50, p90 = np.quantile(accuracies, (0.1, 0.5, 0.9))
    worst = accuracies[: max(1, round(len(accuracies) / 10))]
    return {
        "accuracy_mean": mean_of_writers(outcomes),
        "accuracy_p10": float(p10),
        "accuracy_p50": float(p50),
        "accuracy_p90": float(p90),
        "accuracy_worst_tenth": float(worst.mean()),
    }


def row(finished: Round) -> dict[str, Any]:
    """Return a round as a row of rounds.csv.

    Bytes are those the clients of a real federation would exchange: the weights down, as many
    numbers up, 4 bytes each, and what the strategy sends besides. `test_accuracy` is the share of
    all clients' held-out images that are recognised: a client with twice the images counts twice.
    `accuracy_mean` counts every client once.
    """
    train_loss, train_accuracy = pooled(finished.trained.outcomes)
    seen, unseen = finished.seen or (), finished.unseen or ()
    test_loss, test_accuracy = pooled(seen)
    unseen_loss, unseen_accuracy = pooled(unseen)
    clients = len(finished.cohort)
    return {
        "round": finished.number,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        **spread(seen),
        "unseen_loss": unseen_loss,
        "unseen_accuracy": unseen_accuracy,
        "unseen_accuracy_mean": mean_of_writers(unseen),
        "clients": clients,
        "failed": finished.failed,
        "examples": sum(outcome.examples for outcome in finished.trained.outcomes),
        "bytes_up": clients * finished.bytes_up,
        "bytes_down": clients * finished.bytes_down,
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
    cohort, trained = finished.cohort.tolist(), finished.trained  # pooled training has no clients
    for client, outcome, seconds in zip(cohort, trained.outcomes, trained.seconds, strict=False):
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
                "bytes_up": finished.bytes_up,
                "bytes_down": finished.bytes_down,
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


def _identity(store: WriterStore, index: int) -> dict[str, Any]:
    return {
        "writer": store.names[index],
        "number": int(store.numbers[index]),
        "subject_number": int(store.subject_numbers[index]),
    }

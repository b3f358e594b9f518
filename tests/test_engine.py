"""The apps through the inline engine: cuts, wires, single updates and failures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from femfed.client import LocalTraining
from femfed.data.store import Handwriting, WriterStore, stored
from femfed.engine.apps import ClientError, Job, Run, cut
from femfed.engine.federation import Federation
from femfed.engine.inline import InlineEngine
from femfed.engine.rounds import Round, Schedule
from femfed.local import Local
from femfed.models import Dense
from femfed.strategies.base import Strategy, Weights
from femfed.strategies.fedavg import FedAvg
from femfed.strategies.fedprox import FedProx


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> WriterStore:
    """Nine writers of 5 to 45 images; the last two are unseen below."""

    def writers():
        for i in range(9):
            draw = np.random.default_rng(i)
            n = 5 * (i + 1)
            images = draw.integers(256, size=(n, 28, 28), dtype=np.uint8)
            yield Handwriting(f"w{i}", 3, i, images, draw.integers(62, size=n))

    return stored(tmp_path_factory.mktemp("cache"), {"dataset": "noise"}, writers)


SCHEDULE = Schedule(
    seed=1, rounds=3, clients=7, clients_per_round=5, failure_rate=0.0, evaluate_every=2
)


def a_job(store: WriterStore, folder: Path, **changes) -> Job:
    job = Job(
        model=Dense(invert=True, units=(8,)),
        strategy=FedAvg(),
        local=Local(epochs=1, batch_size=4, learning_rate=0.05, momentum=0.0, weight_decay=0.0),
        schedule=SCHEDULE,
        federation=Federation(np.arange(7), np.array([7, 8])),
        store=store,
        test_fraction=0.2,
        workers=2,
        bundle=None,
        by_value=False,
        memory=folder / "memory",
    )
    return replace(job, **changes)


def finish(job: Job, folder: Path) -> tuple[Weights, list[Round]]:
    """Run a job to its end; return the weights and its rounds."""
    rounds: list[Round] = []
    weights = job.model.build(job.schedule.seed).get_weights()
    run = Run(
        job, weights, job.strategy.init(weights), rounds.append, lambda done, cohort: None, print
    )
    with InlineEngine() as engine:
        engine.run(run, folder)
    return run.weights, rounds


def same(ours: Weights, theirs: Weights) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"bundle": 1},
        {"bundle": 2},
        {"bundle": 100},
        {"workers": 1},
        {"workers": 16},
        {"by_value": True},
        {"by_value": True, "bundle": 1},
        {"strategy": FedProx(proximal_mu=0.0)},
    ],
    ids=str,
)
def test_how_a_cohort_travels_changes_no_bit(store, tmp_path, changes) -> None:
    expected, _ = finish(a_job(store, tmp_path), tmp_path)

    found, _ = finish(a_job(store, tmp_path, **changes), tmp_path)

    assert same(found, expected)


def test_messages_may_be_more_than_nodes(store, tmp_path, monkeypatch) -> None:
    """Where clients fail, fewer of them may be cut into more bundles."""
    assert len(cut(np.ones(230), 2, None)) > len(cut(np.ones(256), 2, None))
    expected, _ = finish(a_job(store, tmp_path), tmp_path)
    monkeypatch.setattr(Job, "nodes", 2)

    found, _ = finish(a_job(store, tmp_path, by_value=True, bundle=1), tmp_path)

    assert same(found, expected)


@pytest.mark.parametrize("by_value", [False, True])
def test_single_updates_give_the_same_mean(store, tmp_path, monkeypatch, by_value) -> None:
    expected, _ = finish(a_job(store, tmp_path), tmp_path)
    monkeypatch.setattr(Strategy, "averages", False)

    found, _ = finish(a_job(store, tmp_path, by_value=by_value, bundle=2), tmp_path)

    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_round_is_what_its_clients_trained(store, tmp_path) -> None:
    """One round by hand: w + sum_i n_i (w_i - w) / sum_i n_i."""
    job = a_job(store, tmp_path, schedule=replace(SCHEDULE, rounds=1, clients_per_round=3))
    start = job.model.build(1).get_weights()
    _, (first,) = finish(job, tmp_path)
    training = LocalTraining(job.model, job.strategy, job.local, 1)
    total, examples = np.zeros(training.parameters), 0
    for client in first.cohort.tolist():
        writer = store.writer(client, 0.2, 1)
        outcome = training.train(writer, 1, client)
        delta = np.empty(training.parameters, np.float32)
        training.delta(delta)
        total += outcome.examples * delta.astype(np.float64)
        examples += outcome.examples

    mean = (total / examples).astype(np.float32)
    found = np.concatenate([(a - b).ravel() for a, b in zip(first.weights, start, strict=True)])

    np.testing.assert_allclose(found, mean, atol=1e-7)


def test_seen_writers_are_held_to_their_test_images_and_unseen_ones_to_all(store, tmp_path) -> None:
    _, rounds = finish(a_job(store, tmp_path), tmp_path)

    assert [finished.seen is None for finished in rounds] == [True, False, False]
    assert [o.examples for o in rounds[-1].seen] == [1, 2, 3, 4, 5, 6, 7]
    assert [o.examples for o in rounds[-1].unseen] == [40, 45]
    assert all(len(finished.trained.outcomes) == 5 for finished in rounds)


def test_a_client_that_diverges_ends_the_run_by_name(store, tmp_path) -> None:
    local = Local(epochs=1, batch_size=4, learning_rate=1e30, momentum=0.0, weight_decay=0.0)

    with pytest.raises(ClientError, match=r"client \d \(writer w\d, number 3, subject number \d\)"):
        finish(a_job(store, tmp_path, local=local), tmp_path)


def test_any_other_failure_of_a_client_shows_its_traceback(store, tmp_path, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(LocalTraining, "train", broken)

    with pytest.raises(ClientError, match=r"(?s)writer w\d.*a defect.*Traceback.*KeyError"):
        finish(a_job(store, tmp_path), tmp_path)


def test_nothing_shared_is_left(store, tmp_path, monkeypatch) -> None:
    memory, folder = tmp_path / "memory", tmp_path / "run"
    memory.mkdir()
    folder.mkdir()
    monkeypatch.setattr("femfed.engine.wire.SHARED_MEMORY", memory)

    finish(a_job(store, tmp_path), folder)

    assert list(memory.iterdir()) == list(folder.iterdir()) == []

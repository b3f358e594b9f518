"""What the benchmarks share: writers of equal size, a job over them, and the floor beside it."""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from femfed import UserError
from femfed.data.store import Handwriting, WriterStore, stored
from femfed.engine.apps import Job, Run
from femfed.engine.federation import Federation
from femfed.engine.footprint import available_cpus
from femfed.engine.rounds import Round, Schedule
from femfed.local import Local
from femfed.models import CNN, CPU, Model, PooledCNN, check_precision
from femfed.strategies.base import Strategy
from femfed.strategies.fedavg import FedAvg

MODELS: dict[str, Model] = {
    "cnn": CNN(invert=True, dropout=0.25, dense_dropout=0.5),
    "leaf_cnn": PooledCNN(invert=True, units=2048),
}
LOCAL = Local(epochs=1, batch_size=20, learning_rate=0.01, momentum=0.0, weight_decay=0.0)
EXAMPLES = 180  # images a client: nine batches of twenty
REMEMBERED = 30  # memories that the floor keeps; those of hundreds would push out files' pages
CORES = available_cpus()


def available_precisions(cpu: Path = CPU) -> list[str]:
    """Return the precisions that a CPU has products of; say on stderr which is skipped and why.

    Args:
        cpu: file in which the kernel describes the processor.
    """
    try:
        check_precision(MODELS["cnn"], "bfloat16", cpu)
    except UserError as error:
        print(f"bfloat16 is skipped: {error}", file=sys.stderr, flush=True)
        return ["float32"]
    return ["float32", "bfloat16"]


def equal_writers(cache: Path, writers: int, examples: int = EXAMPLES) -> WriterStore:
    """Return a store of writers with as many images of noise: the arithmetic is what is timed."""
    return noise_writers(cache, [examples] * writers)


def noise_writers(cache: Path, sizes: Sequence[int]) -> WriterStore:
    """Return a store of writers with these numbers of images of noise."""

    def noise() -> Iterator[Handwriting]:
        draw = np.random.default_rng(0)
        for i, size in enumerate(sizes):
            images = draw.integers(256, size=(size, 28, 28), dtype=np.uint8)
            labels = draw.integers(62, size=size, dtype=np.uint8)
            yield Handwriting(f"noise_{i}", i // 100, i % 100, images, labels, size)

    return stored(cache, {"dataset": "noise", "sizes": list(sizes)}, noise)


def job(
    store: WriterStore,
    model: Model,
    clients_per_round: int,
    rounds: int,
    workers: int = CORES,
    strategy: Strategy = FedAvg(),  # noqa: B008  # frozen
) -> Job:
    """Return a job over `store` that evaluates only after its last round."""
    nobody = np.zeros(0, np.int64)
    return Job(
        model=model,
        strategy=strategy,
        local=LOCAL,
        schedule=Schedule(
            seed=0,
            rounds=rounds,
            clients=len(store),
            clients_per_round=clients_per_round,
            failure_rate=0.0,
            evaluate_every=rounds,
        ),
        federation=Federation(np.arange(len(store)), nobody),
        store=store,
        test_fraction=0.1,
        workers=workers,
        bundle=None,
        by_value=False,
        memory=store.folder / "memory",
    )


def run(job: Job, on_round: Callable[[Round], None]) -> Run:
    """Return a run of `job` from fresh weights."""
    return Run(job, None, None, on_round, lambda done, cohort: None, print)


@contextmanager
def floor(job: Job) -> Iterator[Callable[[], float]]:
    """Yield a function that trains one cohort without a federation and returns its seconds.

    One single-threaded process per worker loops over its share of the cohort with the same compiled
    epoch and adds up what clients would send in the graph; nothing is sent anywhere, and what
    clients remember is kept in memory, by `REMEMBERED` of them in turn. A strategy that pools its
    clients' images has one process.
    """
    context = multiprocessing.get_context("spawn")
    count = 1 if job.strategy.pools else min(job.workers, job.schedule.clients_per_round)
    barrier = context.Barrier(count + 1)
    processes = [
        context.Process(target=_floor, args=(job, place, count, barrier), daemon=True)
        for place in range(count)
    ]

    def train_once() -> float:
        barrier.wait()
        start = time.perf_counter()
        barrier.wait()
        return time.perf_counter() - start

    try:
        for process in processes:
            process.start()
        barrier.wait()  # all models are built and traced
        yield train_once
    finally:
        for process in processes:
            process.kill()
            process.join()


def _floor(job: Job, place: int, count: int, barrier: Barrier) -> None:
    try:
        _train_again_and_again(job, place, count, barrier)
    except BaseException:
        barrier.abort()  # else the others would wait for ever
        raise


def _train_again_and_again(job: Job, place: int, count: int, barrier: Barrier) -> None:
    import tensorflow as tf

    from femfed.client import LocalTraining

    strategy = job.strategy
    training = LocalTraining(job.model, strategy, job.local, 0, job.precision)
    weights = [variable.value for variable in training.model.trainable_variables]
    start = [tf.Variable(weight) for weight in weights]
    extra = training._extra  # what some strategies send besides
    total = [tf.Variable(tf.zeros_like(each)) for each in [*weights, *extra]]
    memories: dict[int, Any] = {}
    mine = range(place, job.schedule.clients_per_round, count)
    writers = [job.store.writer(index, job.test_fraction, 0) for index in mine]
    training.train(writers[0], 0, 0)
    updates = training._updates()  # the same for all: writers are of one size

    @tf.function  # type: ignore[untyped-decorator]
    def fold(examples: Any) -> None:
        deltas = [
            weight - origin if update is None else tf.cast(update, tf.float32)
            for weight, origin, update in zip(weights, start, updates, strict=True)
        ]
        for sums, sent in zip(total, [*deltas, *extra], strict=True):
            sums.assign_add(examples * sent)

    fold(tf.constant(1.0))
    barrier.wait()
    round = 0
    while True:
        round += 1
        barrier.wait()
        for order, (client, writer) in enumerate(zip(mine, writers, strict=True)):
            memory = order % max(1, REMEMBERED // count)
            if strategy.remembers:
                training.load_memory(memories.get(memory))
            outcome = training.train(writer, round, client)
            if strategy.remembers:
                memories[memory] = np.concatenate(training.memory())
            if strategy.sums:
                fold(tf.constant(float(outcome.examples)))
        barrier.wait()


def temporary_cache() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for stores and runs, removed at the end."""
    return tempfile.TemporaryDirectory(prefix="femfed-benchmark-")

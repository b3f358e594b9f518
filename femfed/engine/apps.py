"""The Flower ServerApp and ClientApp.

They live in this importable module because a worker process keeps a module's globals from message
to message only if it imported the module. A worker builds its model and traces its functions once.
"""

import contextlib
import functools
import itertools
import json
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from femfed import (
    PICTURES_AND_TABLES,
    RunError,
    UserError,
    light_imports,
    one_line,
    printable,
)
from femfed.data.store import Writer, WriterStore
from femfed.engine.federation import Federation, Writers
from femfed.engine.footprint import available_memory, forget_peak, peak_memory
from femfed.engine.memory import Memories, Uncached
from femfed.engine.rounds import Round, Schedule, Trained, run_rounds
from femfed.engine.wire import (
    NOBODY,
    Inbox,
    Outbox,
    construct,
    describe,
    left_by_the_dead,
    row_bytes,
    shared_folder,
    to_json,
)
from femfed.local import LARGEST_SUM, DivergedError, Local, unflatten
from femfed.models import Model
from femfed.seeds import generator
from femfed.strategies.base import Outcome, State, Strategy, Update, Weights

POLL = 0.001  # seconds between two looks for a reply that is on its way
DEADLY = 3  # times that a client's training may end its worker in one round
PATIENCE = 0.02  # seconds until the next look for replies that nobody announces
ANNOUNCED = 0.1  # the same where workers ring: a look takes a millisecond from one of them

COLUMNS = tuple(each.name for each in fields(Outcome))

T = TypeVar("T")
Handler = Callable[[Message, Context], Message]

# Errors of a worker that are none of a client's, by the name they travel under.
ERRORS: dict[str, type[Exception]] = {"disk": OSError, "user": UserError}
TOLD = tuple(ERRORS.values())


class ClientError(RunError):
    """A client's training or evaluation failed; ends the run."""


class LostWorkerError(RunError):
    """A worker process died before it replied; its round can be run again."""


class StoppedError(RuntimeError):
    """The run was asked to stop; seen by the ServerApp's thread."""


# The worker's side -----------------------------------------------------------------------------


class Worker:
    """What one worker process keeps between messages.

    Args:
        spec: the JSON line every message carries.
    """

    def __init__(self, spec: str) -> None:
        # Here only: the driver imports this module and has no use for TensorFlow, which takes
        # seconds to import and hundreds of MiB.
        with light_imports(without=PICTURES_AND_TABLES):
            from femfed.client import LocalTraining

        parts = json.loads(spec)
        self._seed, self._test_fraction = parts["seed"], parts["test_fraction"]
        self.strategy: Strategy = construct(parts["strategy"])
        self.store = WriterStore.open(Path(parts["store"]))
        self.training = LocalTraining(
            construct(parts["model"]),
            self.strategy,
            construct(parts["local"]),
            self._seed,
            parts["precision"],
        )
        sends, receives = 1 + self.strategy.sends_extra, 1 + len(self.strategy.broadcasts)
        self.inbox = Inbox(self.training.parameters, sends, receives)
        self.memories = Memories(Path(parts["memory"]))
        self.uncached = Uncached(self.memories)
        self.apart = 1  # places from a client to the next one that this worker takes, most likely
        self.folded = ""  # the attempt at a round that this worker's sum is of
        self._loaded = ""

    def writer(self, index: int) -> Writer:
        """Return writer `index` of the store, split as the run splits it."""
        return self.store.writer(index, self._test_fraction, self._seed)

    def pool(self, indices: Sequence[int], examples: int, round: int) -> Writer:
        """Return `examples` training images of all these writers together, drawn for a round."""
        rows = np.concatenate(
            [self.store.rows_of(index)[self.writer(index).train] for index in indices]
        )
        draw = generator(self._seed, "pool", round)
        passes = -(-examples // len(rows))
        drawn = np.concatenate([draw.permutation(rows) for _ in range(passes)])[:examples]
        every = np.arange(examples, dtype=np.int32)
        images, labels = self.store.images[drawn], self.store.labels[drawn]
        return Writer("all writers", -1, -1, images, labels, train=every, test=every[:0])

    def load(self, content: RecordDict, version: str) -> None:
        """Load the global weights of a message unless they are loaded already."""
        if version != self._loaded:
            self.training.load(self.inbox.weights(content))
            self._loaded = version


_workers: dict[str, Worker] = {}  # one at most: a process serves one run after the other


def _worker(spec: str) -> Worker:
    if spec not in _workers:
        if _workers:
            from femfed.client import forget

            _workers.clear()
            forget()  # the last run's model goes before the next one comes
        forget_peak()
        _workers[spec] = Worker(spec)
    return _workers[spec]


client_app = ClientApp()


def _telling(handler: Handler) -> Handler:
    """Have a handler's errors that tell all in a line come back; Flower would send their trace."""

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except TOLD as error:
            return _failed(message, str(error), error)

    return answer


@client_app.query()
@_telling
def ready(message: Message, context: Context) -> Message:
    """Build the worker before the first round; tell which process and which node this is."""
    task = _task(message)
    worker = _worker(task["spec"])
    reply = _reply(message, context, {})
    if task["asks_weights"]:
        reply.content["weights"] = ArrayRecord(worker.training.initial_weights)
    return reply


@client_app.query("save")
@_telling
def save(message: Message, context: Context) -> Message:
    """Save the global weights as a Keras model."""
    task = _task(message)
    worker = _worker(task["spec"])
    worker.load(message.content, task["version"])
    worker.training.save(Path(task["path"]))
    worker.inbox.ring(message.content)
    return _reply(message, context, {})


@client_app.train()
@_telling
def train(message: Message, context: Context) -> Message:
    """Train a bundle of clients one after the other and fold their updates."""
    task = _task(message)
    worker = _worker(task["spec"])
    training = worker.training
    worker.load(message.content, task["version"])
    total, lives_on = worker.inbox.sum(message.content)
    fresh = worker.folded != task["attempt"] or not lives_on
    outcomes: list[Outcome] = []
    seconds: list[float] = []
    largest, began = 0.0, time.perf_counter()
    clients, strategy = task["clients"], worker.strategy
    size = sum(vector.nbytes for vector in training.memory())
    crowded = strategy.remembers and task["memories"] * size > available_memory() // 2
    memories = worker.uncached if crowded else worker.memories
    places: list[int] = []  # of the clients that complete the round
    updates: list[NDArray[np.float32]] = []  # theirs
    dropped: list[str] = []
    with worker.uncached, worker.inbox:
        for place in worker.inbox.places(message.content, task["turns"], len(clients)):
            client, version = clients[place], task["versions"][place]
            start = time.perf_counter()
            worker.inbox.note(message.content, client)
            if strategy.pools:
                writer = worker.pool(task["writers"], task["examples"], task["round"])
            else:
                writer = worker.writer(task["writers"][place])
            try:
                if strategy.remembers:
                    training.load_memory(memories.recall(client, version))
                    ahead = place + worker.apart
                    if crowded and ahead < len(clients):
                        worker.uncached.read_ahead(clients[ahead], task["versions"][ahead])
                epochs = 1 if strategy.pools else None
                outcome = training.train(writer, task["round"], client, epochs)
                weight = strategy.weight(outcome, task["most_steps"])
                if not strategy.averages:
                    with worker.inbox.update(message.content, task["slots"][place]) as update:
                        training.delta(update)
                elif task["drop"]:
                    training.check(weight)
                if strategy.remembers:
                    memories.keep(client, task["round"], training.memory())
                if strategy.sums:  # last: who is dropped has added nothing
                    largest += training.fold(weight, total, first=fresh)
                    fresh, worker.folded = False, task["attempt"]
            except OSError:  # names a file, which may be of a client before
                raise
            except Exception as error:
                if not task["drop"] or isinstance(error, UserError):
                    return _failed(message, _named(writer, client, error), error)
                dropped.append(_named(writer, client, error))
                continue
            if not strategy.averages:
                updates.append(update)
            places.append(place)
            outcomes.append(outcome)
            seconds.append(time.perf_counter() - start)
    worker.inbox.note(message.content, NOBODY)
    if taken := len(places) + len(dropped):
        worker.apart = round(len(clients) / taken)
    about = {"places": places, "dropped": dropped, "seconds": seconds, "largest": largest}
    reply = _reply(message, context, {**_columns(outcomes), **about, "began": began})
    if not fresh:
        worker.inbox.put_sum(reply.content, total, lives_on=lives_on)
    if not strategy.averages:
        worker.inbox.put_updates(message.content, reply.content, updates)
    worker.inbox.ring(message.content)
    return reply


@client_app.evaluate()
@_telling
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global weights on a bundle of writers, one after the other."""
    task = _task(message)
    worker = _worker(task["spec"])
    worker.load(message.content, task["version"])
    outcomes: list[Outcome] = []
    places: list[int] = []
    for place in worker.inbox.places(message.content, task["turns"], len(task["writers"])):
        index, client, version = (task[name][place] for name in ("writers", "clients", "versions"))
        writer = worker.writer(index)
        try:
            outcomes.append(_evaluated(worker, writer, index, client, version))
        except Exception as error:
            return _failed(message, _named(writer, client, error), error)
        places.append(place)
    worker.inbox.ring(message.content)
    return _reply(message, context, {**_columns(outcomes), "places": places})


def _evaluated(worker: Worker, writer: Writer, index: int, client: int, version: int) -> Outcome:
    """Evaluate a client by its own weights, if it has such, or else the global ones."""
    strategy, training = worker.strategy, worker.training
    if strategy.tuning_steps or (strategy.personalises and version):
        if strategy.remembers:
            training.load_memory(worker.memories.recall(client, version))
        return training.evaluate_personal(writer, index)
    unseen = client < 0
    rows = np.arange(len(writer.labels), dtype=np.int32) if unseen else writer.test
    return training.evaluate(writer, rows)


def _reply(message: Message, context: Context, columns: dict[str, Any]) -> Message:
    about = {
        "partition": context.node_config["partition-id"],
        "pid": os.getpid(),
        "peak": peak_memory(),
    }
    return Message(RecordDict({"outcome": ConfigRecord({**about, **columns})}), reply_to=message)


def _failed(message: Message, text: str, error: Exception) -> Message:
    kind = next((each for each in ERRORS if isinstance(error, ERRORS[each])), "")
    told = kind or isinstance(error, DivergedError)
    trace = "" if told else traceback.format_exc()
    about: dict[str, Any] = {"error": text, "trace": trace, "kind": kind}
    return Message(RecordDict({"failure": ConfigRecord(about)}), reply_to=message)


def _named(writer: Writer, client: int, error: Exception | str) -> str:
    who = f"client {client}" if client >= 0 else "unseen"
    return (
        f"{who} (writer {printable(writer.name)}, number {writer.number}, subject number "
        f"{writer.subject_number}): {str(error) or repr(error)}"
    )


def _columns(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    return {name: [getattr(outcome, name) for outcome in outcomes] for name in COLUMNS}


def _task(message: Message) -> dict[str, Any]:
    return dict(message.content.config_records["task"])


# The driver's side -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Everything a run needs, made by `simulate.py`.

    Attributes:
        model: the model's spec.
        strategy: the algorithm.
        local: how a client trains.
        schedule: rounds and cohorts.
        federation: which writers take part.
        store: their images.
        test_fraction: share of a writer's images held out where the source publishes no split.
        workers: worker processes.
        bundle: clients a message; None lets the workers take turns, or, by value, cuts the cohort
            by their number.
        by_value: send weights and updates inside the messages instead of through shared files.
        memory: folder of what clients remember from round to round.
        drop: leave a client whose training fails out of its round instead of ending the run.
        precision: of the clients' activations and products, `float32` or `bfloat16`.
    """

    model: Model
    strategy: Strategy
    local: Local
    schedule: Schedule
    federation: Federation
    store: WriterStore
    test_fraction: float
    workers: int
    bundle: int | None
    by_value: bool
    memory: Path
    drop: bool = False
    precision: str = "float32"

    @functools.cached_property
    def spec(self) -> str:
        """What a worker needs to know, as one JSON line."""
        return to_json(
            model=describe(self.model),
            strategy=describe(self.strategy),
            local=describe(self.local),
            precision=self.precision,
            seed=self.schedule.seed,
            store=str(self.store.folder),
            test_fraction=self.test_fraction,
            memory=str(self.memory),
        )

    @functools.cached_property
    def train_examples(self) -> NDArray[np.int64]:
        """Images that each client trains on, `[clients]`."""
        return np.array(
            [
                len(self.store.writer(index, self.test_fraction, self.schedule.seed).train)
                for index in self.federation.clients.tolist()
            ]
        )

    @property
    def most_memories(self) -> int:
        """How many files of what clients remember there will be at most.

        Two for each client, the newest and the one before, and those that a round writes.
        """
        clients, cohort = self.schedule.clients, self.schedule.clients_per_round
        return min(2 * clients, self.schedule.rounds * cohort) + cohort

    @property
    def takes_turns(self) -> bool:
        """Whether each worker gets one message a round and takes client by client from all."""
        return self.bundle is None and not self.by_value

    @property
    def evaluated(self) -> Writers:
        """Every writer that is evaluated: the clients, then the unseen."""
        return np.concatenate([self.federation.clients, self.federation.unseen])

    @functools.cached_property
    def nodes(self) -> int:
        """Flower nodes to register: about as many as there are bundles at most, not writers."""
        if self.takes_turns:
            return self.workers
        train = len(cut(np.ones(self.schedule.clients_per_round), self.workers, self.bundle))
        return max(train, len(cut(np.ones(len(self.evaluated)), self.workers, None)))


def cut(sizes: NDArray[Any], workers: int, bundle: int | None) -> list[list[int]]:
    """Cut items into bundles, largest items first; return each bundle's positions.

    Without a fixed `bundle` size, every bundle is half of a worker's fair share of what is left:
    the first ones are long, so messages are few, and the last ones are short, so that all workers
    finish together. How the cut falls changes no result: sums are exact (`local.GRID`).
    """
    order = np.argsort(-sizes, kind="stable").tolist()
    if bundle is not None:
        return [order[i : i + bundle] for i in range(0, len(order), bundle)]
    if workers == 1:
        return [order] if order else []
    shortest = max(1, len(order) // (64 * workers))
    bundles = []
    while order:
        length = max(shortest, -(-len(order) // (2 * workers)))
        bundles.append(order[:length])
        order = order[length:]
    return bundles


class GridWorkers:
    """Trains and evaluates through Flower's grid: a message is about a bundle, or about all turns.

    Args:
        job: the run.
        grid: Flower's, from the ServerApp.
        outbox: hands out weights and takes in sums.
        stop: set by whoever wants the run to stop.
        on_clients: called with (clients done, clients of the cohort) as replies come in.
        on_status: told of clients that are left out.
    """

    def __init__(
        self,
        job: Job,
        grid: Grid,
        outbox: Outbox,
        stop: threading.Event,
        on_clients: Callable[[int, int], None],
        on_status: Callable[[str], None],
    ) -> None:
        self._job, self._grid, self._stop = job, grid, stop
        self._on_clients, self._on_status = on_clients, on_status
        # Workers outlive a run and an attempt at a round: what they loaded and added up has a name.
        self._attempt = str(uuid4())
        self._peaks: dict[int, int] = {}
        self._outbox = outbox
        self._version = 0
        self._published: Weights | None = None
        self._shapes: list[tuple[int, ...]] = []
        self._memories = Memories(job.memory)
        self._versions = np.zeros(len(job.federation.clients), np.int64)

    @property
    def peak_memory(self) -> int:
        """Sum of the workers' peak resident memory in bytes, this process's own left out."""
        return sum(peak for pid, peak in self._peaks.items() if pid != os.getpid())

    def start(self, weights: Weights | None, finished: int) -> Weights:
        """Have every worker build its model, and learn which node is served when.

        Args:
            weights: the global weights, None before the first round.
            finished: the last finished round.

        Returns:
            The global weights, where there were none the initial ones of the model.
        """
        self._versions = self._memories.versions(len(self._versions), finished)
        if not self._job.strategy.averages:
            self._outbox.reserve_updates(self._job.schedule.clients_per_round)
        self._nodes = self._registered()
        spec = self._job.spec
        asks = [weights is None, *(False for _ in self._nodes[1:])]
        contents = [
            RecordDict({"task": ConfigRecord({"spec": spec, "asks_weights": each})})
            for each in asks
        ]
        replies = self._exchange("query", contents, lambda done: None)
        partitions = [_outcome(reply)["partition"] for reply in replies]
        # Flower hands messages to workers in the order of its partitions.
        self._nodes = [node for _, node in sorted(zip(partitions, self._nodes, strict=True))]
        if weights is None:
            weights = replies[0].array_records["weights"].to_numpy_ndarrays()
        self._shapes = [layer.shape for layer in weights]
        return weights

    def save(self, weights: Weights, state: State, path: Path) -> None:
        """Have a worker save the global weights as a Keras model."""
        content = self._content(self._publish(weights, state), path=str(path))
        self._exchange("query.save", [content], lambda done: None)

    def train(self, weights: Weights, state: State, cohort: Writers, round: int) -> Trained:
        """Train `cohort` from `weights` and aggregate."""
        job, writers = self._job, self._job.federation.clients[cohort]
        examples = job.train_examples[cohort]
        steps = [job.local.steps(int(count)) for count in examples]
        shared = self._publish(weights, state)
        about = {
            "round": round,
            "attempt": f"{self._attempt}.{round}",
            "most_steps": max(steps),
            "drop": job.drop,
            "memories": job.most_memories,
        }
        if job.strategy.pools:
            bundles, turns = [[0]], ""
            batches = sum(-(-int(count) // job.local.batch_size) for count in examples)
            about["examples"] = job.local.epochs * batches * job.local.batch_size
            everyone = {"turns": turns, "clients": [0], "versions": [0], "slots": [0]}
            everyone["writers"] = job.federation.clients.tolist()
            contents = [self._content(shared, **about, **everyone)]
        else:
            bundles, turns = self._shared_out(examples, job.bundle)
            contents = [
                self._content(
                    shared,
                    **about,
                    turns=turns,
                    clients=cohort[bundle].tolist(),
                    versions=self._versions[cohort[bundle]].tolist(),
                    writers=writers[bundle].tolist(),
                    slots=bundle,
                )
                for bundle in bundles
            ]

        def show(done: set[int]) -> None:
            if turns:  # of those that were taken, each worker still at it has one before it
                taken = min(self._outbox.turns_taken(), len(cohort))
                self._on_clients(max(0, taken - len(bundles) + len(done)), len(cohort))
            else:
                self._on_clients(sum(len(bundles[place]) for place in done), len(cohort))

        replies = self._exchange("train", contents, show)
        completed = _completed(bundles, replies)
        outcomes = _in_order(completed, [_outcomes(reply) for reply in replies])
        seconds = _in_order(completed, [_outcome(reply)["seconds"] for reply in replies])
        for line in (line for reply in replies for line in _outcome(reply)["dropped"]):
            self._on_status(f"round {round} without {line}")
        present = sorted(place for part in completed for place in part)
        cohort = cohort[present]
        if not outcomes:
            return Trained([], [], [], max(steps), 0.0, cohort, [], [])
        weight_sum = sum(job.strategy.weight(outcome, max(steps)) for outcome in outcomes)
        delta, extra, updates = list[Any](), list[Any](), list[Update]()
        if job.strategy.sums:
            if not sum(_outcome(reply)["largest"] for reply in replies) < LARGEST_SUM:
                raise DivergedError(
                    f"the cohort's updates times their weights add up beyond {LARGEST_SUM:.0f}"
                )
            means = self._outbox.means(replies, weight_sum)
            delta, extra = (*(unflatten(mean, self._shapes) for mean in means), [])[:2]
        elif not job.strategy.averages:
            rows = self._outbox.updates(replies, completed, len(examples))
            updates = [
                Update(
                    **vars(outcome),
                    client=client,
                    delta=unflatten(rows[place], self._shapes),
                    read=self._outbox.reader(place),
                )
                for client, place, outcome in zip(cohort.tolist(), present, outcomes, strict=True)
            ]
        if job.strategy.remembers:
            self._versions[cohort] = round
        return Trained(
            delta=delta,
            updates=updates,
            extra=extra,
            most_steps=max(steps),
            weight_sum=weight_sum,
            cohort=cohort,
            outcomes=outcomes,
            seconds=seconds,
        )

    def evaluate(
        self, weights: Weights, state: State
    ) -> tuple[Sequence[Outcome], Sequence[Outcome]]:
        """Evaluate on every client's held-out images and on all images of the unseen writers."""
        job, writers = self._job, self._job.evaluated
        clients = len(job.federation.clients)
        unseen = np.arange(len(writers)) >= clients
        numbers = np.where(unseen, -1, np.arange(len(writers)))
        versions = np.concatenate([self._versions, np.zeros(len(writers) - clients, np.int64)])
        held_out = np.where(unseen, 1.0, job.test_fraction)
        bundles, turns = self._shared_out(job.store.examples[writers] * held_out, None)
        shared = self._publish(weights, state)
        contents = [
            self._content(
                shared,
                turns=turns,
                writers=writers[bundle].tolist(),
                clients=numbers[bundle].tolist(),
                versions=versions[bundle].tolist(),
            )
            for bundle in bundles
        ]
        replies = self._exchange("evaluate", contents, lambda done: None)
        outcomes = _in_order(_completed(bundles, replies), [_outcomes(reply) for reply in replies])
        return outcomes[:clients], outcomes[clients:]

    def _shared_out(self, sizes: NDArray[Any], bundle: int | None) -> tuple[list[list[int]], str]:
        """Return the places that each message is about, largest first, and the name of the turns.

        Where workers take turns, each gets one message, and all messages are about all places.
        """
        job = self._job
        if job.takes_turns:
            return cut(sizes, 1, None) * job.workers, self._outbox.start_turns()
        return cut(sizes, job.workers, bundle), ""

    def _publish(self, weights: Weights, state: State) -> RecordDict:
        if weights is not self._published:  # an evaluation and the next round share their weights
            self._published = weights
            self._version += 1
            sent = [weights, *(state[name] for name in self._job.strategy.broadcasts)]
            self._shared = self._outbox.publish([array for each in sent for array in each])
        return self._shared

    def _content(self, shared: RecordDict, **task: Any) -> RecordDict:
        version = f"{self._attempt}.{self._version}"
        about = ConfigRecord({"spec": self._job.spec, "version": version, **task})
        return RecordDict({**shared, "task": about})

    def _registered(self) -> list[int]:
        """Return all node ids; Flower registers nodes after the ServerApp has started."""
        while len(nodes := sorted(self._grid.get_node_ids())) < self._job.nodes:
            if self._stop.wait(PATIENCE):
                raise StoppedError
        return nodes

    def _exchange(
        self, kind: str, contents: list[RecordDict], on_wait: Callable[[set[int]], None]
    ) -> list[RecordDict]:
        """Send each content to a node, in turn, and return the replies in the same order.

        Args:
            kind: Flower's type of the messages.
            contents: one a message.
            on_wait: called with the places of the replies that are here, again and again.

        Raises:
            ClientError: a client failed.
            LostWorkerError: a worker died.
            StoppedError: the run was asked to stop.
        """
        messages = [
            Message(content, dst_node_id=node, message_type=kind)
            for content, node in zip(contents, itertools.cycle(self._nodes), strict=False)
        ]
        ringing = 0
        patience = PATIENCE if self._job.by_value or kind == "query" else ANNOUNCED
        places = {name: place for place, name in enumerate(self._grid.push_messages(messages))}
        replies: dict[int, RecordDict] = {}
        while len(replies) < len(contents):
            waiting = [name for name, place in places.items() if place not in replies]
            arrived = list(self._grid.pull_messages(waiting))
            if self._stop.is_set():
                raise StoppedError
            for reply in arrived:
                try:
                    if reply.has_error():
                        failed = reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
                        raise (ClientError if failed else LostWorkerError)(reply.error.reason)
                    content = self._checked(reply.content)
                except Exception:
                    self._outbox.end_turns()  # or the other workers would train all that are left
                    raise
                replies[places[reply.metadata.reply_to_message_id]] = content
            on_wait(set(replies))
            ringing = max(0, ringing - len(arrived))
            if not arrived:
                ringing += self._outbox.wait(POLL if ringing else patience)
        return [replies[place] for place in range(len(contents))]

    def _checked(self, content: RecordDict) -> RecordDict:
        if "failure" in content.config_records:
            failure: dict[str, Any] = dict(content.config_records["failure"])
            if failure["kind"]:
                raise ERRORS[failure["kind"]](failure["error"])
            lines = [failure["error"], *failure["trace"].splitlines()]
            raise ClientError("\n  ".join(map(one_line, lines)))  # the first is the message
        outcome = _outcome(content)
        self._peaks[outcome["pid"]] = outcome["peak"]
        return content


@dataclass
class Run:
    """A run under way: what the engine starts from, and starts again from after a lost worker.

    Attributes:
        job: what to run.
        weights: the global weights after the last finished round, None before the first.
        state: the strategy's state after it, None likewise.
        on_round: called after every round.
        on_clients: called with (clients done, clients of the cohort) during a round.
        on_status: called with what is going on before the first round or after a loss.
        finished: the last finished round; `NOTHING_FINISHED` evaluates round 0 first.
        peak_memory: sum of the workers' peak resident memory in bytes, 0 if there is none but
            this process.
        save_as: file for the final model, None to save none.
        saved: whether that is done.
        lost: how often a client's training ended its worker since the last finished round.
        started: set once all workers have answered.
    """

    job: Job
    weights: Weights | None
    state: State | None
    on_round: Callable[[Round], None]
    on_clients: Callable[[int, int], None]
    on_status: Callable[[str], None]
    finished: int = 0
    peak_memory: int = 0
    save_as: Path | None = None
    saved: bool = False
    lost: Counter[int] = field(default_factory=Counter)
    started: threading.Event = field(default_factory=threading.Event)

    @property
    def shared_bytes(self) -> int:
        """Bytes that travel by reference at most: weights, a sum per worker, single updates."""
        strategy = self.job.strategy
        updates = 0 if strategy.averages else self.job.schedule.clients_per_round
        sent, summed = 1 + len(strategy.broadcasts), 1 + strategy.sends_extra
        parameters = self.job.model.parameters
        each = 4 * sent + 8 * summed * self.job.workers
        return each * parameters + updates * row_bytes(parameters)

    @property
    def done(self) -> bool:
        """Whether the last round is finished and its model saved."""
        return self.finished >= self.job.schedule.rounds and (self.saved or self.save_as is None)

    def blame(self, shared: Path | None) -> None:
        """Note which clients were being trained by workers that are gone.

        Raises:
            ClientError: the same client's training ended its worker three times in one round.
        """
        for client in left_by_the_dead(shared) if shared else ():
            self.lost[client] += 1
            if self.lost[client] == DEADLY:
                writer = self.job.store.writer(int(self.job.federation.clients[client]), 0.0, 0)
                reason = (
                    f"its training ended the worker process {DEADLY} times in round "
                    f"{self.finished + 1}; is there memory enough for {len(writer.labels)} images "
                    "and fewer workers (engine.workers)?"
                )
                raise ClientError(_named(writer, client, reason))


@contextlib.contextmanager
def travelling(run: Run, fallback: Path) -> Iterator[Path | None]:
    """Yield the folder for what travels by reference, None for a run that sends by value.

    Args:
        run: what will travel.
        fallback: folder to use where there is too little shared memory.
    """
    if run.job.by_value:
        yield None
        return
    with shared_folder(fallback, run.shared_bytes) as shared:
        if shared.path.parent == fallback:
            size = run.shared_bytes / 2**20
            run.on_status(
                f"weights and updates, up to {size:.0f} MiB, travel through files in {fallback}: "
                "too little shared memory"
            )
        yield shared.path


def server_app(
    runs: Iterable[tuple[Run, Path | None]],
    stop: threading.Event,
    on_end: Callable[[BaseException | None], None],
) -> ServerApp:
    """Return the ServerApp that takes run after run from its last finished round to its end.

    Args:
        runs: each with the folder for what travels by reference.
        stop: set by whoever wants a run to stop.
        on_end: called after each, with what ended it early if anything did: Flower would print
            what is raised. After an error no other run is taken.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        for run, folder in runs:
            try:
                _take_to_end(run, folder, grid, stop)
            except Exception as error:
                on_end(error)
                return
            on_end(None)

    return app


def _take_to_end(run: Run, folder: Path | None, grid: Grid, stop: threading.Event) -> None:
    strategy, parameters = run.job.strategy, run.job.model.parameters
    with Outbox(folder, parameters, 1 + strategy.sends_extra, 1 + len(strategy.broadcasts)) as box:
        workers = GridWorkers(run.job, grid, box, stop, run.on_clients, run.on_status)
        run.weights = weights = workers.start(run.weights, run.finished)
        run.started.set()
        run.state = state = strategy.init(weights) if run.state is None else run.state
        rounds = run_rounds(run.job.schedule, strategy, workers, weights, state, run.finished)
        for finished in rounds:
            run.weights, run.state = finished.weights, finished.state
            run.finished, run.peak_memory = finished.number, workers.peak_memory
            run.lost.clear()
            run.on_round(finished)
        if run.save_as is not None:
            workers.save(run.weights, run.state, run.save_as)
            run.saved = True


def _in_order(bundles: list[list[int]], parts: Iterable[Sequence[T]]) -> list[T]:
    """Undo the cut: put each bundle's items back in the order of their places."""
    items = {
        place: item
        for bundle, part in zip(bundles, parts, strict=True)
        for place, item in zip(bundle, part, strict=True)
    }
    return [items[place] for place in sorted(items)]


def _completed(bundles: list[list[int]], replies: Iterable[RecordDict]) -> list[list[int]]:
    """Return which places each reply is about."""
    return [
        [bundle[place] for place in _outcome(reply)["places"]]
        for bundle, reply in zip(bundles, replies, strict=True)
    ]


def _outcome(reply: RecordDict) -> dict[str, Any]:
    return dict(reply.config_records["outcome"])


def _outcomes(reply: RecordDict) -> list[Outcome]:
    outcome = _outcome(reply)
    return [Outcome(*sums) for sums in zip(*(outcome[name] for name in COLUMNS), strict=True)]

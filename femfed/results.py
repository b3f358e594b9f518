"""What a run leaves, round by round and at its end, and where a resumed one goes on."""

import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from femfed import UserError, checkpoint
from femfed.data.store import WriterStore
from femfed.engine.federation import Federation
from femfed.engine.footprint import forget_peak, peak_memory
from femfed.engine.memory import Memories
from femfed.engine.rounds import NOTHING_FINISHED, Round, client_rows, row, writer_rows
from femfed.folder import remove_partial_files
from femfed.report.events import Events
from femfed.report.files import Row, RunFiles, last_is_evaluated
from femfed.report.plots import plot_curves, plot_writers
from femfed.report.progress import Progress

LIBRARIES = ("femfed", "flwr", "ray", "tensorflow", "keras", "numpy", "hydra-core")


class Results:
    """Writes tables, events, checkpoints and plots of one run.

    Args:
        folder: where.
        store: the writers' names and coordinates.
        federation: which of them take part.
        progress: the display.
        checkpoint_every: rounds between checkpoints.
        started: when the command was given, of `time.perf_counter`.
        evaluate_every: rounds between evaluations.
        settings: what of the config decides what the run computes, by its key.
    """

    def __init__(
        self,
        folder: Path,
        store: WriterStore,
        federation: Federation,
        progress: Progress,
        checkpoint_every: int,
        started: float,
        evaluate_every: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._store, self._federation = folder, store, federation
        self._progress, self._checkpoint_every = progress, checkpoint_every
        self._started, self._evaluate_every = started, evaluate_every
        self._settings = dict(settings or {})
        self._files = RunFiles(folder)
        self._memories = Memories(folder / "memory")
        self._seconds = {"total": 0.0, "startup": 0.0, "train": 0.0, "evaluate": 0.0}
        self._versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        self._last: Round | None = None
        self._events: Events | None = None  # made with the first round: a refused run has none
        self._rows: Sequence[Row] = ()  # of rounds.csv, that the run goes on after
        self._synced = 0  # the last round whose memories are on the disk
        self._states: checkpoint.ClientStates = {}  # the newest of them
        self._rounds = 0
        forget_peak()

    def rewind(self, rounds: int) -> checkpoint.Checkpoint | None:
        """Take the folder back to its newest sound checkpoint; None if there is none.

        A checkpoint is sound if it is what was written, and all that it counts on is: the client
        states and both tables. Nothing is changed before one is found.

        Args:
            rounds: the round to go on to. A run that was ended in its last round has to run it
                again for its evaluation.

        Raises:
            UserError: the run is finished, the dataset or the config is not the one it began with,
                or no checkpoint has all that it counts on.
        """
        self._rounds = rounds
        begun, tables = self._newest_sound(rounds)
        finished, about = (begun.round, begun.about) if begun else (NOTHING_FINISHED, {})
        # A run evaluates its last round whatever its number; a longer one would not have.
        every = {int(about.get("evaluate.every", self._evaluate_every)), self._evaluate_every}
        surplus = last_is_evaluated(tables["rounds.csv"]) and all(finished % each for each in every)
        for name, version in self._versions.items():
            if begun and about.get(name, version) != version:
                self._progress.message(
                    f"begun with {name} {about[name]}, resumed with {version}: the bits may "
                    "differ from those of an undisturbed run"
                )
        if surplus:
            self._progress.message(
                f"drops the evaluation of round {finished}, which was the last one until now"
            )
        for name, table in tables.items():
            if finished > 0 and not table:
                self._progress.message(
                    f"{self._folder / name} is lost; it goes on with round {finished + 1}"
                )
        remove_partial_files(self._folder)
        rows = self._files.rewind(finished, tables, evaluated=not surplus)
        self._memories.rewind(self._states)
        self._synced = max(0, finished)
        checkpoint.remove_others(self._folder / "checkpoint")
        (self._folder / "summary.json").unlink(missing_ok=True)
        self._rows = rows
        for name in ("total", "train", "evaluate"):
            self._seconds[name] = sum(float(each[f"seconds_{name}"] or 0.0) for each in rows)
        return begun

    def _newest_sound(
        self, rounds: int
    ) -> tuple[checkpoint.Checkpoint | None, Mapping[str, bytes]]:
        """Return the newest sound checkpoint before round `rounds`, and both tables up to it."""
        folder, complete = self._folder / "checkpoint", (self._folder / "summary.json").exists()
        problem = ""
        for round in reversed(checkpoint.rounds(folder)):
            path = checkpoint.path_of(folder, round)
            try:
                found = checkpoint.load(path)
            except checkpoint.DamagedError as error:
                self._progress.message(f"{error}; goes on from the checkpoint before")
                continue
            self._check_dataset(found)
            if other := self._other_setting(found):
                problem = problem or f"{path} is of a run with {other}"
                self._progress.message(f"{problem}; tries the checkpoint before")
                continue
            if round > rounds or (round == rounds and complete):
                raise UserError(
                    f"the run in {self._folder} has finished {round} rounds already; expected "
                    f"rounds={round + 1} or more"
                )
            if round == rounds:
                continue
            try:
                self._states = self._checked_states(path, found)
                return found, self._files.check(round, found.about)
            except ValueError as error:
                problem = problem or str(error)
                self._progress.message(f"{error}; tries the checkpoint before")
        if problem:
            raise UserError(
                f"{problem}; expected the files that the run wrote; put them back, or begin again "
                f"from round 0 by removing {folder}"
            )
        self._states = {}
        return None, self._files.check(NOTHING_FINISHED, {})

    def _check_dataset(self, found: checkpoint.Checkpoint) -> None:
        ours = self._store.folder.name
        theirs = found.about.get("dataset", ours)
        if theirs not in {ours, *self._store.known_as}:
            raise UserError(
                f"the run in {self._folder} began with the dataset store {theirs}, but this is "
                f"{ours}; expected the same source, unchanged"
            )

    def _other_setting(self, found: checkpoint.Checkpoint) -> str:
        """Return what a checkpoint's run had in its config where this run has another value."""
        for key, value in self._settings.items():
            theirs = found.about.get(f"config {key}", value)
            if theirs != value:
                return f"{key}={theirs[:200]}, where this run's config has {value[:200]}"
        return ""

    def _checked_states(self, path: Path, found: checkpoint.Checkpoint) -> checkpoint.ClientStates:
        """Return the client states that a checkpoint counts on.

        Raises:
            ClientStateError: one is not what was written.
        """
        if found.clients is None:
            self._progress.message(
                f"{path} is of an earlier femfed and has no checksums: the tables and client "
                "states are taken as they are"
            )
            return self._memories.states(found.round)
        if found.clients:
            self._progress.status(f"checking the states of {len(found.clients)} clients")
        self._memories.check(found.clients)
        return found.clients

    def on_round(self, finished: Round) -> None:
        """Write one round."""
        if self._last is None:
            now = time.perf_counter() - self._started
            self._seconds["startup"] = now - finished.seconds_total
        self._last = finished
        self._seconds["train"] += finished.seconds_train
        self._seconds["evaluate"] += finished.seconds_evaluate
        line, clients = row(finished), client_rows(finished, self._federation, self._store)
        self._files.append_clients(clients)
        self._files.append_round(line)
        if self._events is None:
            self._events = Events(self._folder, self._rows)
        self._events.append_round(line)
        # Of the last round but one as well: a run that ends in its last goes on from there.
        due = finished.number % self._checkpoint_every == 0 or finished.number >= self._rounds - 1
        if finished.number and due:  # the initial weights follow from the seed
            about = {"dataset": self._store.folder.name, **self._versions, **self._files.marks()}
            about |= {f"config {key}": value for key, value in self._settings.items()}
            about["evaluate.every"] = str(self._evaluate_every)
            folder = self._folder / "checkpoint"
            self._files.sync()
            self._states |= self._memories.sync(after=self._synced)
            self._synced = finished.number
            saved = checkpoint.Checkpoint(
                finished.number, finished.weights, finished.state, about, self._states
            )
            checkpoint.save(folder, saved)
            self._memories.prune(checkpoint.rounds(folder)[0])
            if finished.is_last:
                self._memories.remove_spare()
                checkpoint.remove_others(folder)
        self._progress.round(line, clients)

    def finish(
        self, title: str, about: dict[str, Any], weights: list[Any], workers_peak: int
    ) -> float | None:
        """Write what is known at the end only; return the test accuracy, if there is one."""
        assert self._last is not None
        assert self._events is not None
        final = row(self._last)
        self._files.write_writers(writer_rows(self._last, self._federation, self._store))
        plot_curves(self._folder, title)
        plot_writers(self._folder, title)
        self._seconds["total"] += time.perf_counter() - self._started
        overhead = 2 * self._seconds["total"] - sum(self._seconds.values())
        self._files.write_summary(
            {
                **about,
                "weights_sha256": checkpoint.sha256(weights),
                "test_loss": final["test_loss"],
                "test_accuracy": final["test_accuracy"],
                "accuracy_mean": final["accuracy_mean"],
                "unseen_accuracy": final["unseen_accuracy"],
                "unseen_accuracy_mean": final["unseen_accuracy_mean"],
                "seconds": {**self._seconds, "overhead": overhead},
                "peak_memory_mb": (peak_memory() + workers_peak) / 1e6,
                "versions": {"python": platform.python_version(), **self._versions},
            }
        )
        accuracy: float | None = final["test_accuracy"]
        return accuracy

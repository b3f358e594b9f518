"""What a run leaves, round by round and at its end, and where a resumed one goes on."""

import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

from femfed import UserError, checkpoint
from femfed.data.store import WriterStore
from femfed.engine.federation import Federation
from femfed.engine.footprint import forget_peak, peak_memory
from femfed.engine.memory import Memories
from femfed.engine.rounds import NOTHING_FINISHED, Round, client_rows, row, writer_rows
from femfed.report.events import Events
from femfed.report.files import RunFiles
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
    """

    def __init__(
        self,
        folder: Path,
        store: WriterStore,
        federation: Federation,
        progress: Progress,
        checkpoint_every: int,
        started: float,
    ) -> None:
        self._folder, self._store, self._federation = folder, store, federation
        self._progress, self._checkpoint_every = progress, checkpoint_every
        self._started = started
        self._files = RunFiles(folder)
        self._memories = Memories(folder / "memory")
        self._seconds = {"total": 0.0, "startup": 0.0, "train": 0.0, "evaluate": 0.0}
        self._versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        self._last: Round | None = None
        self._synced = 0  # the last round whose memories are on the disk
        self._rounds = 0
        forget_peak()

    def rewind(self, rounds: int) -> checkpoint.Checkpoint | None:
        """Take the folder back to its newest sound checkpoint; None if there is none.

        Args:
            rounds: the round to go on to. A run that was ended in its last round has to run it
                again for its evaluation.

        Raises:
            UserError: the run is finished, or the dataset is not the one it began with.
        """
        self._rounds = rounds
        folder, complete = self._folder / "checkpoint", (self._folder / "summary.json").exists()
        kept = checkpoint.rounds(folder)
        if kept and (kept[-1] > rounds or (kept[-1] == rounds and complete)):
            raise UserError(
                f"the run in {self._folder} has finished {kept[-1]} rounds already; expected "
                f"rounds={kept[-1] + 1} or more"
            )
        begun, rows = None, list[Any]()
        for round in reversed([round for round in kept if round < rounds]):
            try:
                found = checkpoint.load(checkpoint.path_of(folder, round))
                ours = found.about["dataset"] in self._store.known_as
                rows = self._files.rewind(round) if ours else []
            except (checkpoint.DamagedError, ValueError) as error:
                self._progress.message(f"{error}; goes on from the checkpoint before")
            else:
                begun = found
                break
        if begun is None:
            rows = self._files.rewind(NOTHING_FINISHED)
        elif not ours:
            raise UserError(
                f"the run in {self._folder} began with the dataset store {begun.about['dataset']}, "
                f"but this is {self._store.folder.name}; expected the same source, unchanged"
            )
        for name, version in self._versions.items():
            if begun and begun.about[name] != version:
                self._progress.message(
                    f"begun with {name} {begun.about[name]}, resumed with {version}: the bits may "
                    "differ from those of an undisturbed run"
                )
        self._memories.rewind(begun.round if begun else 0)
        checkpoint.remove_others(folder)
        (self._folder / "summary.json").unlink(missing_ok=True)
        self._events = Events(self._folder, rows)
        for name in ("total", "train", "evaluate"):
            self._seconds[name] = sum(float(each[f"seconds_{name}"] or 0.0) for each in rows)
        return begun

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
        self._events.append_round(line)
        # Of the last round but one as well: a run that ends in its last goes on from there.
        due = finished.number % self._checkpoint_every == 0 or finished.number >= self._rounds - 1
        if finished.number and due:  # the initial weights follow from the seed
            about = {"dataset": self._store.folder.name, **self._versions}
            folder = self._folder / "checkpoint"
            self._files.sync()
            self._memories.sync(after=self._synced)
            self._synced = finished.number
            checkpoint.save(
                folder,
                checkpoint.Checkpoint(finished.number, finished.weights, finished.state, about),
            )
            self._memories.prune(checkpoint.rounds(folder)[0])
            if finished.is_last:
                self._memories.remove_spare()
                checkpoint.remove_others(folder)
        self._progress.round(line, clients)

    def finish(
        self, title: str, about: dict[str, Any], weights: list[Any], workers_peak: int
    ) -> None:
        """Write what is known at the end only."""
        assert self._last is not None
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

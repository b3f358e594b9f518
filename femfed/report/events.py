"""The rounds of a run as TensorBoard scalars."""

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from femfed.report.files import Row


class Events:
    """Writes every number of a round into `folder/tensorboard`; a context manager.

    Tags group what belongs in one chart: `accuracy/test`, `accuracy/p10`, `loss/unseen`,
    `seconds/train`, `bytes/up`, `cohort/clients`.

    Args:
        folder: of the run.
        rounds: rows of rounds.csv that the run was resumed after.
    """

    def __init__(self, folder: Path, rounds: Sequence[Row] = ()) -> None:
        # TensorBoard reads all files of a folder. A resumed run writes its first part again, from
        # `rounds`, so that no point is there twice.
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        (folder / "tensorboard").mkdir()
        # `SummaryWriter` would put a queue of another process's kind before this: it needs a
        # semaphore in /dev/shm, and its thread stops without a word where the disk is full.
        self._writer = EventsWriter(str(folder / "tensorboard" / "events"), f".{os.getpid()}")
        for row in rounds:
            self._add(row)
        self._writer.flush()

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append_round(self, row: Row) -> None:
        """Add the numbers of one round; what was not evaluated or is not finite has no point."""
        self._add(row)
        self._writer.flush()

    def _add(self, row: Row) -> None:
        for column, value in row.items():
            if column == "round" or not isinstance(value, int | float) or not math.isfinite(value):
                continue  # a NaN would make tensorboardX log a warning at every round
            summary = scalar(_tag(column), value)
            event = Event(wall_time=time.time(), step=row["round"], summary=summary)
            self._writer.write_event(event)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _tag(column: str) -> str:
    first, _, rest = column.partition("_")
    if not rest:
        return f"cohort/{first}"
    if first not in ("train", "test", "unseen"):
        return f"{first}/{rest}"
    measure, _, statistic = rest.partition("_")
    return f"{measure}/{'_'.join(filter(None, [statistic, first]))}"

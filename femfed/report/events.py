"""The rounds of a run as TensorBoard scalars."""

import math
import os
import shutil
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from femfed.report.files import Row


class Events:
    """Writes every number of a round into `folder/tensorboard`.

    Tags group what belongs in one chart: `accuracy/test`, `accuracy/p10`, `loss/unseen`,
    `seconds/train`, `bytes/up`, `cohort/clients`.

    tensorboardX's `SummaryWriter` hands events to a thread through a queue between processes: it
    needs /dev/shm, and stops without a word where the disk is full. So only its formats are used.

    Args:
        folder: of the run.
        rounds: rows of rounds.csv that the run was resumed after.
    """

    def __init__(self, folder: Path, rounds: Sequence[Row] = ()) -> None:
        # TensorBoard reads all files of a folder. A resumed run writes its first part again, from
        # `rounds`, so that no point is there twice.
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        (folder / "tensorboard").mkdir()
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / "tensorboard" / name
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        self._append([version, *(event for row in rounds for event in _events(row))])

    def append_round(self, row: Row) -> None:
        """Add the numbers of one round; what was not evaluated or is not finite has no point."""
        self._append(_events(row))

    def _append(self, events: Iterable[Event]) -> None:
        """Append events as records: length, data, and the checksum of each."""
        records = b""
        for event in events:
            data = event.SerializeToString()
            length = struct.pack("<Q", len(data))
            sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
            records += length + sums[0] + data + sums[1]
        with self._path.open("ab") as file:
            file.write(records)


def _events(row: Row) -> Iterator[Event]:
    for column, value in row.items():
        if column == "round" or not isinstance(value, int | float) or not math.isfinite(value):
            continue  # a NaN would make tensorboardX log a warning at every round
        summary = scalar(_tag(column), value)
        yield Event(wall_time=time.time(), step=row["round"], summary=summary)


def _tag(column: str) -> str:
    first, _, rest = column.partition("_")
    if not rest:
        return f"cohort/{first}"
    if first not in ("train", "test", "unseen"):
        return f"{first}/{rest}"
    measure, _, statistic = rest.partition("_")
    return f"{measure}/{'_'.join(filter(None, [statistic, first]))}"

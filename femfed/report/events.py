"""The rounds of a run as TensorBoard scalars."""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tensorboardX import SummaryWriter

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
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), flush_secs=5, filename_suffix=f".{os.getpid()}"
        )
        for row in rounds:
            self.append_round(row)

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append_round(self, row: Row) -> None:
        """Add the numbers of one round; what was not evaluated or is not finite has no point."""
        number = row["round"]
        for column, value in row.items():
            if column == "round" or not isinstance(value, int | float) or not math.isfinite(value):
                continue  # a NaN would make tensorboardX log a warning at every round
            self._writer.add_scalar(_tag(column), value, number)

    def close(self) -> None:
        """Write what is still queued."""
        self._writer.close()


def _tag(column: str) -> str:
    first, _, rest = column.partition("_")
    if not rest:
        return f"cohort/{first}"
    if first not in ("train", "test", "unseen"):
        return f"{first}/{rest}"
    measure, _, statistic = rest.partition("_")
    return f"{measure}/{'_'.join(filter(None, [statistic, first]))}"

"""The tables of a run: rounds.csv, clients.csv, writers.csv and summary.json.

The first two grow by whole lines while the run goes on, the last two appear whole or not at all.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

ROUND_COLUMNS = (
    "round",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",  # of all images of all clients, pooled
    "accuracy_mean",  # of clients, each counted once
    "accuracy_p10",
    "accuracy_p50",
    "accuracy_p90",
    "accuracy_worst_tenth",
    "unseen_loss",
    "unseen_accuracy",
    "unseen_accuracy_mean",
    "clients",
    "failed",
    "examples",
    "bytes_up",
    "bytes_down",
    "seconds_train",
    "seconds_evaluate",
    "seconds_overhead",
    "seconds_total",
)
NEWER_COLUMNS = ("accuracy_mean", "unseen_accuracy_mean")  # older tables of rounds lack them
CLIENT_COLUMNS = (
    "round",
    "client",
    "writer",
    "number",
    "subject_number",
    "examples",
    "train_loss",
    "train_accuracy",
    "seconds",
    "bytes_up",
    "bytes_down",
)
WRITER_COLUMNS = (
    "writer",
    "number",
    "subject_number",
    "role",  # seen or unseen
    "client",  # empty for the unseen
    "examples",
    "test_loss",
    "test_accuracy",
)

Row = Mapping[str, float | int | str | None]


class RunFiles:
    """Writes the tables of one run into `folder`; holds no file open between calls.

    A column that is not evaluated is None and becomes an empty cell. Floats read back exactly. A
    run that goes on in a folder with tables appends to them, after `rewind`.

    Raises:
        ValueError: the folder holds a table with other columns, or a row has columns too many or
            too few; they are named.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        _mend(folder / "rounds.csv", ROUND_COLUMNS)
        _mend(folder / "clients.csv", CLIENT_COLUMNS)

    def rewind(self, finished: int) -> list[dict[str, float | int | None]]:
        """Cut both tables off after round `finished`; return what is left of rounds.csv.

        Tables of older versions begin with round 1 and get empty cells in `NEWER_COLUMNS`.

        Raises:
            ValueError: one of the rounds up to there is missing.
        """
        kept = []
        for name, columns in (("clients.csv", CLIENT_COLUMNS), ("rounds.csv", ROUND_COLUMNS)):
            path = self._folder / name
            rows = []
            if path.exists():
                empty = dict.fromkeys(columns, "")
                with path.open(newline="", encoding="utf-8") as table:
                    rows = [
                        empty | row
                        for row in csv.DictReader(table)
                        if int(row["round"]) <= finished
                    ]
                with replacing(path) as file:
                    file.write(_header(columns) + _lines(path, rows, columns))
            kept = rows
        found = [int(row["round"]) for row in kept]
        if found not in (list(range(finished + 1)), list(range(1, finished + 1))):
            raise ValueError(f"{self._folder / 'rounds.csv'} lacks rounds up to {finished}")
        return [
            {name: int(cell) if name == "round" else _number(cell) for name, cell in row.items()}
            for row in kept
        ]

    def sync(self) -> None:
        """Have the disk hold both tables, before a checkpoint counts on them."""
        for name in ("clients.csv", "rounds.csv"):
            with (self._folder / name).open("rb") as table:
                os.fsync(table.fileno())

    def append_round(self, row: Row) -> None:
        """Append the line of one round to rounds.csv."""
        _append(self._folder / "rounds.csv", [row], ROUND_COLUMNS)

    def append_clients(self, rows: Iterable[Row]) -> None:
        """Append the lines of one round's clients to clients.csv: all or, on error, none."""
        _append(self._folder / "clients.csv", rows, CLIENT_COLUMNS)

    def write_writers(self, rows: Iterable[Row]) -> None:
        """Write writers.csv, the final accuracy of every writer."""
        path = self._folder / "writers.csv"
        with replacing(path) as file:
            file.write(_header(WRITER_COLUMNS) + _lines(path, rows, WRITER_COLUMNS))

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write summary.json."""
        with replacing(self._folder / "summary.json") as file:
            file.write(json.dumps(summary, indent=2).encode() + b"\n")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` when the block ends, and leaves no trace if it raises."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _number(cell: str) -> float | None:
    return float(cell) if cell else None


def _append(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    lines = _lines(path, rows, columns)  # before the file is touched: a bad row leaves no trace
    with path.open("ab") as file:
        file.write(lines if file.tell() else _header(columns) + lines)


def _header(columns: Sequence[str]) -> bytes:
    return ",".join(columns).encode() + b"\n"


def _lines(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")  # a float is written as its repr, None as ""
    for row in rows:
        if unknown := [column for column in row if column not in columns]:
            raise ValueError(f"{path.name} has no column {', '.join(unknown)}")
        if missing := [column for column in columns if column not in row]:
            raise ValueError(f"a row of {path.name} lacks {', '.join(missing)}")
        writer.writerow([row[column] for column in columns])
    return text.getvalue().encode()


def _mend(path: Path, columns: Sequence[str]) -> None:
    """Cut off the half line that a killed run may have left, so that a resumed one can append."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    header = content[: content.find(b"\n") + 1]
    older = [column for column in columns if column not in NEWER_COLUMNS]
    if header and header not in (_header(columns), _header(older)):
        raise ValueError(
            f"{path} has the columns {header.decode().strip()}; expected {','.join(columns)}"
        )

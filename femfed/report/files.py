"""The tables of a run: rounds.csv, clients.csv, writers.csv and summary.json.

The first two grow by whole lines while the run goes on, the last two appear whole or not at all.
"""

import csv
import io
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

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

TABLES = {"clients.csv": CLIENT_COLUMNS, "rounds.csv": ROUND_COLUMNS}  # those that grow
EVALUATED = tuple(  # empty in a round without evaluation
    name for name in ROUND_COLUMNS if name.startswith(("test_", "accuracy_", "unseen_"))
)
BOM = b"\xef\xbb\xbf"  # with which spreadsheets save tables

# A spreadsheet takes a cell that begins so for a formula; an apostrophe goes before it.
_FORMULA, _QUOTED = re.compile(r"'*[=+\-@\t\r]"), re.compile(r"'+[=+\-@\t\r]")

Row = Mapping[str, float | int | str | None]


class TableError(ValueError):
    """A table is not what the run wrote."""


class RunFiles:
    """Writes the tables of one run into `folder`; holds no file open between calls.

    A column that is not evaluated is None and becomes an empty cell. Floats read back exactly. A
    run that goes on in a folder with tables appends to them, after `rewind`.

    Raises:
        ValueError: a row has columns too many or too few; they are named.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._written = dict.fromkeys(TABLES, (0, 0))  # bytes of each table and their CRC-32
        self._unevaluated = (0, 0)  # of rounds.csv, had its last round not been evaluated

    def marks(self) -> dict[str, str]:
        """Return length and checksum of both tables, for a checkpoint to know them by."""
        marks = {name: f"{size} {checksum}" for name, (size, checksum) in self._written.items()}
        size, checksum = self._unevaluated
        return {**marks, "rounds.csv unevaluated": f"{size} {checksum}"}

    def check(self, finished: int, marks: Mapping[str, str]) -> dict[str, bytes]:
        """Return both tables up to round `finished`; a table that is lost has no rows.

        Line ends and a byte order mark of a spreadsheet's are no damage. Tables of older versions
        begin with round 1 and get empty cells in newer columns.

        Args:
            finished: the round.
            marks: what `marks` was after it; empty in a checkpoint of an earlier femfed.

        Raises:
            TableError: a table is not what the run wrote.
        """
        tables = {}
        for name, columns in TABLES.items():
            path = self._folder / name
            tables[name] = b""
            if finished < 1 or not path.exists():
                continue
            content = path.read_bytes()
            plain = content.removeprefix(BOM).replace(b"\r\n", b"\n")
            if name in marks:
                known = [marks[key] for key in (name, f"{name} unevaluated") if key in marks]
                table = _marked(path, finished, (content, plain), known)
                tables[name] = _with_columns(path, table, columns)
            else:
                tables[name] = _parsed(path, finished, plain, columns)
        return tables

    def rewind(
        self, finished: int, tables: Mapping[str, bytes], evaluated: bool = True
    ) -> list[dict[str, float | int | None]]:
        """Put both tables back to how they were after round `finished`.

        Args:
            finished: the round.
            tables: what `check` returned.
            evaluated: whether that round keeps its evaluation.

        Returns:
            The rows of rounds.csv.
        """
        rows = _rounds(tables["rounds.csv"])
        for name, content in tables.items():
            path, whole = self._folder / name, content
            if name == "rounds.csv" and rows and not evaluated:
                rows[-1] |= dict.fromkeys(EVALUATED, "")
                whole = _header(ROUND_COLUMNS) + _lines(path, rows, ROUND_COLUMNS)
            if whole:
                with replacing(path) as file:
                    file.write(whole)
            else:
                path.unlink(missing_ok=True)
            self._written[name] = len(whole), zlib.crc32(whole)
        return [
            {name: int(cell) if name == "round" else _number(cell) for name, cell in row.items()}
            for row in rows
        ]

    def sync(self) -> None:
        """Have the disk hold both tables, before a checkpoint counts on them."""
        for name in ("clients.csv", "rounds.csv"):
            with (self._folder / name).open("rb") as table:
                os.fsync(table.fileno())

    def append_round(self, row: Row) -> None:
        """Append the line of one round to rounds.csv."""
        before = self._written["rounds.csv"]
        self._append("rounds.csv", [row])
        unevaluated = {**row, **dict.fromkeys(EVALUATED)}
        lines = _lines(self._folder / "rounds.csv", [unevaluated], ROUND_COLUMNS)
        self._unevaluated = _longer(before, lines if before[0] else _header(ROUND_COLUMNS) + lines)

    def append_clients(self, rows: Iterable[Row]) -> None:
        """Append the lines of one round's clients to clients.csv: all or, on error, none."""
        self._append("clients.csv", rows)

    def write_writers(self, rows: Iterable[Row]) -> None:
        """Write writers.csv, the final accuracy of every writer."""
        path = self._folder / "writers.csv"
        with replacing(path) as file:
            file.write(_header(WRITER_COLUMNS) + _lines(path, rows, WRITER_COLUMNS))

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write summary.json; a number that is not finite, which JSON has not, becomes null."""
        with replacing(self._folder / "summary.json") as file:
            file.write(json.dumps(_finite(summary), indent=2, allow_nan=False).encode() + b"\n")

    def _append(self, name: str, rows: Iterable[Row]) -> None:
        path = self._folder / name
        lines = _lines(path, rows, TABLES[name])  # before the file is touched: a bad row is no line
        with path.open("ab") as file:
            if not file.tell():
                lines = _header(TABLES[name]) + lines
            file.write(lines)
        self._written[name] = _longer(self._written[name], lines)


def _rounds(table: bytes) -> list[dict[str, str]]:
    """Return the rows of a rounds.csv."""
    return list(csv.DictReader(io.StringIO(table.decode(), newline="")))


def last_is_evaluated(table: bytes) -> bool:
    """Return whether the last row of a rounds.csv has an evaluation."""
    rows = _rounds(table)
    return bool(rows) and any(rows[-1][name] for name in EVALUATED)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` when the block ends, and leaves no trace if it raises."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)  # of a killed process that had the same number
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


def _finite(value: Any) -> Any:
    """Return a value for JSON, with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _longer(mark: tuple[int, int], lines: bytes) -> tuple[int, int]:
    """Return length and checksum of a table after some more lines."""
    return mark[0] + len(lines), zlib.crc32(lines, mark[1])


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
        writer.writerow([_cell(column, row[column]) for column in columns])
    return text.getvalue().encode(errors="backslashreplace")  # halves of characters


def _cell(column: str, value: float | int | str | None) -> float | int | str | None:
    """Return what a cell holds: a writer's name that looks like a formula is quoted."""
    if column == "writer" and isinstance(value, str) and _FORMULA.match(value):
        return f"'{value}"
    return value


def rows_of(table: bytes) -> Iterator[dict[str, str]]:
    """Yield the rows of a table that a run wrote, with the writers' names as they are."""
    for row in csv.DictReader(io.StringIO(table.decode(errors="replace"), newline="")):
        if _QUOTED.match(row.get("writer") or ""):
            row["writer"] = row["writer"][1:]
        yield row


def _marked(path: Path, finished: int, contents: Iterable[bytes], marks: Iterable[str]) -> bytes:
    """Return the part of a table that has the length and checksum of one of the marks.

    Raises:
        TableError: none has.
    """
    for mark in marks:
        size, checksum = (int(part) for part in mark.split())
        for content in contents:
            if len(content) >= size and zlib.crc32(content[:size]) == checksum:
                return content[:size]
    raise TableError(f"{path} is not what the run wrote up to round {finished}")


def _parsed(path: Path, finished: int, content: bytes, columns: Sequence[str]) -> bytes:
    """Return the part of a table up to a round, where no checkpoint has a mark of it.

    Raises:
        TableError: it has other columns, or a round is missing.
    """
    whole = content[: content.rfind(b"\n") + 1]  # a killed run may have left half a line
    try:
        whole = _with_columns(path, whole, columns)
        rows = [row for row in rows_of(whole) if int(row["round"]) <= finished]
        if path.name == "rounds.csv":
            rounds = [int(row["round"]) for row in rows]
            if [round for round in rounds if round] != list(range(1, finished + 1)):
                raise ValueError(f"it lacks rounds up to {finished}")
            for cell in (cell for row in rows for cell in row.values()):
                _number(cell)
        return _header(columns) + _lines(path, rows, columns)
    except TableError:
        raise
    except (ValueError, TypeError, csv.Error) as error:
        raise TableError(f"{path} is not what the run wrote: {error}") from None


def _with_columns(path: Path, content: bytes, columns: Sequence[str]) -> bytes:
    """Return a table with all of these columns; those that an earlier femfed lacks are empty.

    Raises:
        TableError: it has others.
    """
    if content.startswith(_header(columns)):
        return content
    head = io.StringIO(content.decode(errors="replace"), newline="")
    names = csv.DictReader(head).fieldnames or [""]
    if surplus := set(names) - set(columns):
        first = ",".join(map(str, names))[:200]
        raise TableError(
            f"{path} has the columns {first}; expected {','.join(columns)} (surplus: "
            f"{', '.join(sorted(map(str, surplus)))[:200]})"
        )
    filled = [{name: row.get(name) for name in columns} for row in rows_of(content)]
    return _header(columns) + _lines(path, filled, columns)

"""Read finished runs from any folders, and say of the others why they are left out."""

import csv
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONFIG = Path(".hydra") / "config.yaml"
OF_A_RUN = {"checkpoint", "memory", "tensorboard", ".hydra"}  # folders that hold no runs
SMALL_BYTES = 2**17  # of a config or a summary, which a run writes with a few kB
TABLE_BYTES = 2**30  # of rounds.csv: a million rounds have a third of it
TAIL_BYTES = 2**16  # of simulate.log, where its last error is looked for

Settings = Mapping[str, str]  # dotted key of the config -> value as text


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: of the run.
        settings: its config, flat, besides `strategy`, `model` and `dataset` as their names.
        rounds: round -> its row of rounds.csv, for every evaluated round, in order.
    """

    folder: Path
    settings: Settings
    rounds: Mapping[int, Mapping[str, float]]


class NotComparableError(ValueError):
    """A run has no result to compare; the message says why."""


def find(folder: Path) -> Iterator[Path]:
    """Yield the folders of all runs at or below a folder, in order; links to runs count."""
    for here, below, _ in os.walk(folder):
        below[:] = sorted(name for name in below if name not in OF_A_RUN)
        if _is_run(Path(here)):
            yield Path(here)
        yield from (
            Path(here, name)
            for name in below
            if Path(here, name).is_symlink() and _is_run(Path(here, name))
        )


def _is_run(folder: Path) -> bool:
    names = (str(CONFIG), "rounds.csv", "summary.json")
    return any(os.path.lexists(folder / name) for name in names)


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        NotComparableError: it is not finished, or a file is missing or damaged.
    """
    if not os.path.lexists(folder / "summary.json"):
        raise NotComparableError(f"it is not finished: {_how_far(folder)}")
    rounds = _rounds(folder / "rounds.csv")
    settings = _settings(folder)
    try:
        summary = json.loads(_content(folder / "summary.json", SMALL_BYTES))
        assert isinstance(summary, dict)
    except (ValueError, AssertionError, RecursionError):
        raise NotComparableError("summary.json is damaged") from None
    evaluated = {n: row for n, row in rounds.items() if math.isfinite(row["test_accuracy"])}
    if not evaluated:
        raise NotComparableError("rounds.csv has no evaluated round")
    names = {key: str(summary[key]) for key in ("strategy", "model", "dataset") if key in summary}
    return Run(folder, {**settings, **names}, evaluated)


def _how_far(folder: Path) -> str:
    """Return the last round of an unfinished run and what its log says of its end."""
    try:
        last = max(_rounds(folder / "rounds.csv"), default=0)
        said = f"round {last} of {_settings(folder).get('rounds', '?')}"
    except NotComparableError as error:
        said = str(error)
    return "; ".join(filter(None, [said, _last_error(folder / "simulate.log")]))


def _rounds(path: Path) -> dict[int, dict[str, float]]:
    rounds: dict[int, dict[str, float]] = {}
    text = _content(path, TABLE_BYTES)
    if not text.strip():
        raise NotComparableError("rounds.csv is empty")
    table = csv.DictReader(text.splitlines())
    try:
        if missing := {"round", "test_accuracy"}.difference(table.fieldnames or ()):
            raise NotComparableError(f"rounds.csv has no column {', '.join(sorted(missing))}")
        for row in table:
            number = int(row["round"])
            if None in row or None in row.values():  # too many cells, too few
                raise ValueError
            cells = {name: float(cell) if cell else math.nan for name, cell in row.items()}
            accuracy = cells["test_accuracy"]
            if number < 0 or not (0 <= accuracy <= 1 or math.isnan(accuracy)):
                raise ValueError
            rounds[number] = cells
    except (csv.Error, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, NotComparableError):
            raise
        raise NotComparableError(f"rounds.csv is damaged in line {table.line_num}") from None
    return dict(sorted(rounds.items()))


def _settings(folder: Path) -> dict[str, str]:
    """Return the config of a run, flat; without one, what its folder's name says."""
    if not os.path.lexists(folder / CONFIG):
        parts = [part.partition("=") for part in folder.name.split(",")]
        return {key: value for key, _, value in parts}
    try:
        text = _content(folder / CONFIG, SMALL_BYTES)
        # Nested aliases unfold to more than the memory; femfed writes none.
        assert not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
        config = yaml.safe_load(text)
        assert isinstance(config, dict)
        return dict(_flat(config, ""))
    except (yaml.YAMLError, ValueError, AssertionError, RecursionError) as error:
        if isinstance(error, NotComparableError):
            raise
        raise NotComparableError(f"{CONFIG} is damaged") from None


def _flat(node: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "null" if value is None else str(value)


def _last_error(log: Path) -> str:
    """Return the last line of a log that begins with `error:`; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.startswith("error: ")), "")


def _content(path: Path, most_bytes: int) -> str:
    name = path.name if path.name != CONFIG.name else str(CONFIG)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise NotComparableError(f"{name} is no file")
        if found.st_size > most_bytes:
            raise NotComparableError(f"{name} has {found.st_size:,} bytes")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NotComparableError(f"{name} is missing") from None
    except OSError as error:
        raise NotComparableError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise NotComparableError(f"{name} is damaged") from None

"""Runs side by side: comparison.md and comparison.png from the tables of any run folders.

Runs that differ in their seed only are one line: mean and standard deviation over the seeds.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from femfed import printable
from femfed.report import drawing
from femfed.report.files import replacing
from femfed.report.plots import BLUE, DOTS, STEPS, STYLE, drawable
from femfed.report.runs import NotComparableError, Run, find, read_run

Floats = NDArray[np.float64]

GREY = "#C8C8C8"
LEVELS = (10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95, 98)  # per cent, that rounds are counted to
COLUMNS = 5  # panels in a row
PANEL_INCHES = 1.75  # width of a panel
LINE_INCHES, CHARACTER_INCHES = 0.13, 0.062  # of a title: height of a line, most of a character
VALUE_CHARACTERS, REASON_CHARACTERS, NAME_CHARACTERS = 60, 400, 300
# Two runs that differ in these alone train the same way.
INCIDENTAL = re.compile(
    r"(rounds|evaluate\.every|resume|cache|list_clients|(engine|checkpoint)(\..*)?)$"
)
CHOICES = ("strategy", "model", "dataset")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only, at the rounds that all of them evaluated.

    Attributes:
        name: the values that others have not.
        rounds: rounds with an evaluation, `[evaluations]`.
        accuracy: pooled over clients' held-out images, in per cent, `[seeds, evaluations]`.
        mean: of the clients' accuracies, in per cent, after the last of these rounds, `[seeds]`.
        unseen: accuracy on writers who never train, likewise.
        worst_tenth: of the clients, likewise.
    """

    name: str
    rounds: Floats
    accuracy: Floats
    mean: Floats
    unseen: Floats
    worst_tenth: Floats

    def rounds_to(self, level: float) -> float | None:
        """Return the mean number of rounds to an accuracy, None unless every seed reaches it."""
        reached = self.accuracy >= level
        if not reached.any(axis=1).all():
            return None
        return float(self.rounds[reached.argmax(axis=1)].mean())


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, and the runs that are in none.

    Attributes:
        groups: in alphabetical order.
        left_out: a line for each run that is not compared: its folder and why.
    """

    groups: Sequence[Group]
    left_out: Sequence[str]

    @property
    def runs(self) -> int:
        """Return how many runs are compared."""
        return sum(len(group.accuracy) for group in self.groups)


def compare(*folders: Path, failed: Mapping[Path, str] | None = None) -> list[Path]:
    """Write `comparison.md` and `comparison.png` of the runs below some folders to the first one.

    Args:
        folders: hold runs, or are runs.
        failed: folders of runs that are known to have failed, and why.

    Returns:
        The files that were written: none if there are not two runs, or no finished one.
    """
    found = gather(folders, failed or {})
    if not found.groups or found.runs + len(found.left_out) < 2:
        return []
    return write(found, folders[0])


def write(found: Comparison, folder: Path) -> list[Path]:
    """Write `comparison.md` and `comparison.png` to a folder; return their paths."""
    text = table(found.groups)
    if found.left_out:
        lines = [f"- {_markdown(line)}" for line in found.left_out]
        text += "\n".join(["", "Not compared:", "", *lines, ""])
    with replacing(folder / "comparison.md") as file:
        file.write(text.encode())
    _plot(found.groups, folder / "comparison.png")
    return [folder / "comparison.md", folder / "comparison.png"]


def gather(folders: Iterable[Path], failed: Mapping[Path, str]) -> Comparison:
    """Read the runs below some folders and group those that differ in their seed only.

    Args:
        folders: hold runs, or are runs; a run below two of them counts once.
        failed: folders of runs that are known to have failed, and why.
    """
    roots = [*folders]
    paths = {path.resolve(): path for root in roots for path in find(root)}
    runs, reasons = list[Run](), {path.absolute(): reason for path, reason in failed.items()}
    for path in paths.values():
        try:
            runs.append(read_run(path))
            reasons.pop(path.absolute(), None)
        except NotComparableError as error:
            reasons.setdefault(path.absolute(), str(error))
    seeds_of: dict[Any, dict[str, list[Run]]] = {}  # by all other settings
    for run in runs:
        key = frozenset(item for item in _about(run).items() if not INCIDENTAL.match(item[0]))
        seeds_of.setdefault(key, {}).setdefault(run.settings.get("seed", "?"), []).append(run)
    sets = [same for seeds in seeds_of.values() for same in _without_repeats(seeds, reasons)]
    names = _names(sets)
    groups = [_group(name, same) for name, same in zip(names, sets, strict=True)]
    left_out = [
        f"{printable(_shown(path, roots), 200)}: {printable(reason, REASON_CHARACTERS)}"
        for path, reason in sorted(reasons.items())
    ]
    return Comparison(sorted(groups, key=lambda group: _naturally(group.name)), left_out)


def read(*folders: Path) -> list[Group]:
    """Return the finished runs below some folders, grouped, in alphabetical order."""
    return [*gather(folders, {}).groups]


def _about(run: Run) -> dict[str, str]:
    """Return the settings of a run without its seed, with a name for each choice of a group."""
    about = {key: value for key, value in run.settings.items() if key != "seed"}
    for choice in CHOICES:
        if target := about.pop(f"{choice}._target_", ""):
            about.setdefault(choice, target.rpartition(".")[2].lower())
    return about


def _without_repeats(
    seeds: Mapping[str, Sequence[Run]], reasons: dict[Path, str]
) -> Iterator[list[Run]]:
    """Yield sets of runs that train the same way, one run a seed, with a common round.

    Where a seed occurs twice, as in a sweep over `rounds` or `engine`, runs with the same
    incidental settings are a set. A run that has these too repeats another one and is left out.
    """
    runs = [run for same in seeds.values() for run in same]
    if len(runs) == len(seeds) and _common(runs)[-1:] > [0]:
        yield runs
        return
    sets: dict[Any, dict[str, Run]] = {}
    for run in runs:
        about, seed = _about(run), run.settings.get("seed", "?")
        key = [about.get(name) for name in sorted(about) if INCIDENTAL.match(name)]
        first = sets.setdefault((*key, *run.rounds), {}).setdefault(seed, run)
        if first is not run:
            repeated = f"it repeats {first.folder.name}: the same config and seed"
            reasons[run.folder.absolute()] = repeated
    yield from ([*same.values()] for same in sets.values())


def _common(runs: Sequence[Run]) -> list[int]:
    return sorted(set.intersection(*(set(run.rounds) for run in runs)))


def _group(name: str, runs: Sequence[Run]) -> Group:
    rounds = _common(runs)

    def percent(column: str) -> Floats:
        return np.array([100 * run.rounds[rounds[-1]].get(column, math.nan) for run in runs])

    return Group(
        name=name,
        rounds=np.array(rounds, np.float64),
        accuracy=np.array([[100 * run.rounds[n]["test_accuracy"] for n in rounds] for run in runs]),
        mean=percent("accuracy_mean"),
        unseen=percent("unseen_accuracy"),
        worst_tenth=percent("accuracy_worst_tenth"),
    )


def _names(sets: Sequence[Sequence[Run]]) -> list[str]:
    """Name each set of runs by the values that others have not."""
    shared = [dict(set.intersection(*(set(_about(run).items()) for run in runs))) for runs in sets]
    keys = {key for about in shared for key in about}
    names: list[list[str]] = [[] for _ in sets]
    for key in sorted(keys, key=lambda key: (bool(INCIDENTAL.match(key)), key not in CHOICES, key)):
        choice = key.partition(".")[0] if "." in key else ""
        values: dict[
            str | None, set[str]
        ] = {}  # by what is chosen of a group: others differ anyway
        for about in shared:
            if key in about:
                of = about.get(choice) if choice in CHOICES else None
                values.setdefault(of, set()).add(about[key])
        repeated = {tuple(name) for name in names if names.count(name) > 1}
        for name, about in zip(names, shared, strict=True):
            of = about.get(choice) if choice in CHOICES else None
            differs = len(values.get(of, ())) > 1
            if INCIDENTAL.match(key):  # of use only where nothing else tells two sets apart
                differs = differs and tuple(name) in repeated
            if differs and key in about:
                value = printable(about[key], VALUE_CHARACTERS)
                name.append(value if key == "strategy" else f"{key}={value}")
    plain = [", ".join(name) for name in names]
    for place, runs in enumerate(sets):
        if not plain[place] or plain.count(plain[place]) > 1:
            folder = "all runs" if len(sets) == 1 else printable(runs[0].folder.name)
            names[place].append(folder)
    return [", ".join(name) for name in names]


def _naturally(name: str) -> list[tuple[float, str]]:
    """Return what sorts names by the numbers in them: 2 before 10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", name)
    return [(float(part), "") if place % 2 else (-1.0, part) for place, part in enumerate(parts)]


def _shown(path: Path, roots: Sequence[Path]) -> str:
    """Return a run's folder as seen from the one folder that was given, or from here."""
    root = roots[0].absolute()
    if len(roots) == 1 and root in path.parents:
        return str(path.relative_to(root))
    return os.path.relpath(path)


def table(groups: Sequence[Group]) -> str:
    """Return the groups as a Markdown table, the best first."""
    best = max(group.accuracy.mean(axis=0).max() for group in groups)
    levels = [level for level in LEVELS if level <= best][-2:]
    ends = [group.rounds[-1] for group in groups]
    own_ends = len(set(ends)) > 1
    means = any(np.isfinite(group.mean).all() for group in groups)  # older tables lack them
    heads = ["", "seeds", *["after round"] * own_ends, "accuracy", *["mean of writers"] * means]
    heads += ["unseen writers", "worst tenth", *(f"rounds to {level} %" for level in levels)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for group in sorted(groups, key=lambda group: -group.accuracy[:, -1].mean()):
        reached = [group.rounds_to(level) for level in levels]
        cells = [
            _markdown(group.name),
            str(len(group.accuracy)),
            *[f"{group.rounds[-1]:.0f}"] * own_ends,
            _mean(group.accuracy[:, -1]),
            *[_mean(group.mean)] * means,
            _mean(group.unseen),
            _mean(group.worst_tenth),
            *("-" if rounds is None else f"{rounds:.0f}" for rounds in reached),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """Escape what Markdown or HTML would obey; an underscore within a word is none of that."""
    return re.sub(r"[\\`*\[\]<>|&~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _mean(values: Floats) -> str:
    if not np.isfinite(values).all():
        return "-"
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def _plot(groups: Sequence[Group], path: Path) -> None:
    """Draw a panel a group: its mean and range over the seeds, all others grey behind it."""
    columns = min(COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    style: Any = {**STYLE, "axes.titlesize": 7, "font.size": 7}
    width = max(3.5, PANEL_INCHES * columns)
    with drawing(style):
        titles = [
            _title(group, int((width - 0.4) / columns / CHARACTER_INCHES)) for group in groups
        ]
        lines = [
            max(title.count("\n") + 1 for title in titles[row * columns : (row + 1) * columns])
            for row in range(rows)
        ]
        height = 0.4 + sum(1.2 + LINE_INCHES * count for count in lines)
        figure = Figure(figsize=(width, height), dpi=DOTS, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, group, title in zip(panels.flat, groups, titles, strict=False):
            for other in groups:
                axes.plot(other.rounds, other.accuracy.mean(axis=0), color=GREY, linewidth=0.4)
            _highlight(axes, group)
            axes.set_title(title, loc="left", pad=2)
        for axes in panels.flat[len(groups) :]:
            axes.set_axis_off()
        highest = max(float(group.accuracy.max()) for group in groups)
        panels[0, 0].set_ylim(0, min(100.0, 10 * math.ceil(highest / 10)) or 10.0)
        panels[0, 0].xaxis.set_major_locator(MaxNLocator(nbins=3, steps=STEPS, integer=True))
        figure.supxlabel("Round", size=7)
        figure.supylabel("Accuracy (%)", size=7)
        with replacing(path) as file:
            figure.savefig(file, format="png")


def _title(group: Group, width: int) -> str:
    """Return a group's name and accuracy in lines of at most `width` characters."""
    name = drawable(group.name)
    if len(name) > NAME_CHARACTERS:  # comparison.md has all of it
        name = f"{name[: NAME_CHARACTERS - 3]}..."
    lines = [""]
    for word in [*name.split(" "), f"{group.accuracy[:, -1].mean():.1f}"]:
        short = [word] if len(word) <= width else re.findall(r"[^._=/]+[._=/]?|[._=/]", word)
        space = " " if lines[-1] else ""
        for piece in short:
            for part in (piece[at : at + width] for at in range(0, len(piece), width)):
                if len(lines[-1]) + len(space) + len(part) > width:
                    lines.append(part)
                else:
                    lines[-1] += space + part
                space = ""
    return "\n".join(filter(None, lines))


def _highlight(axes: Axes, group: Group) -> None:
    low, high = group.accuracy.min(axis=0), group.accuracy.max(axis=0)
    axes.fill_between(group.rounds, low, high, color=BLUE, alpha=0.2, linewidth=0)
    dots: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(group.rounds) == 1 else {}
    axes.plot(group.rounds, group.accuracy.mean(axis=0), color=BLUE, linewidth=1.2, **dots)

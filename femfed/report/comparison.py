"""A sweep side by side: comparison.md and comparison.png from the tables of its runs.

Runs that differ in their seed only are one line: mean and standard deviation over the seeds.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from femfed.report import drawing
from femfed.report.files import replacing
from femfed.report.plots import BLUE, DOTS, STEPS, STYLE

Floats = NDArray[np.float64]

GREY = "#C8C8C8"
LEVELS = (10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95, 98)  # per cent, that rounds are counted to
COLUMNS = 5  # panels in a row


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        name: what they have in common and others have not.
        rounds: rounds with an evaluation, `[evaluations]`.
        accuracy: on clients' held-out images, in per cent, `[seeds, evaluations]`.
        unseen: of writers who never train, in per cent, after the last round, `[seeds]`.
        worst_tenth: of the clients, likewise.
    """

    name: str
    rounds: Floats
    accuracy: Floats
    unseen: Floats
    worst_tenth: Floats

    def rounds_to(self, level: float) -> float | None:
        """Return the mean number of rounds to an accuracy, None unless every seed reaches it."""
        reached = self.accuracy >= level
        if not reached.any(axis=1).all():
            return None
        return float(self.rounds[reached.argmax(axis=1)].mean())


def compare(sweep: Path) -> list[Path]:
    """Write `comparison.md` and `comparison.png` of the finished runs below a sweep's folder.

    Returns:
        What was written: nothing if there are not two runs to compare.
    """
    groups = read(sweep)
    if sum(len(group.accuracy) for group in groups) < 2:
        return []
    with replacing(sweep / "comparison.md") as file:
        file.write(table(groups).encode())
    _plot(groups, sweep / "comparison.png")
    return [sweep / "comparison.md", sweep / "comparison.png"]


def read(sweep: Path) -> list[Group]:
    """Return the finished runs below `sweep`, grouped, in alphabetical order.

    Hydra names a run's folder by its overrides, `seed=0,strategy=fedavg`.
    """
    runs: dict[str, list[tuple[Floats, Floats, float, float]]] = {}
    for folder in sorted(path.parent for path in sweep.glob("*/summary.json")):
        overrides = [part for part in folder.name.split(",") if not part.startswith("seed=")]
        with (folder / "rounds.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["test_accuracy"]]
        if rows:
            last = rows[-1]
            runs.setdefault(", ".join(overrides), []).append(
                (
                    np.array([float(row["round"]) for row in rows]),
                    100 * np.array([float(row["test_accuracy"]) for row in rows]),
                    100 * float(last["unseen_accuracy"] or math.nan),
                    100 * float(last["accuracy_worst_tenth"] or math.nan),
                )
            )
    common = set.intersection(*(set(name.split(", ")) for name in runs)) if len(runs) > 1 else set()
    groups = []
    for name, each in sorted(runs.items()):
        rounds = min((run[0] for run in each), key=len)  # a run that was made longer is cut
        own = [part for part in name.split(", ") if part not in common]
        groups.append(
            Group(
                name=", ".join(own).replace("strategy=", "") or "all runs",
                rounds=rounds,
                accuracy=np.stack([run[1][: len(rounds)] for run in each]),
                unseen=np.array([run[2] for run in each]),
                worst_tenth=np.array([run[3] for run in each]),
            )
        )
    return groups


def table(groups: list[Group]) -> str:
    """Return the groups as a Markdown table, the best first."""
    best = max(group.accuracy.mean(axis=0).max() for group in groups)
    levels = [level for level in LEVELS if level <= best][-2:]
    heads = ["", "seeds", "accuracy", "unseen writers", "worst tenth"]
    heads += [f"rounds to {level} %" for level in levels]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for group in sorted(groups, key=lambda group: -group.accuracy[:, -1].mean()):
        reached = [group.rounds_to(level) for level in levels]
        cells = [
            group.name,
            str(len(group.accuracy)),
            *map(_mean, (group.accuracy[:, -1], group.unseen, group.worst_tenth)),
            *("-" if rounds is None else f"{rounds:.0f}" for rounds in reached),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean(values: Floats) -> str:
    if not np.isfinite(values).all():
        return "-"
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def _plot(groups: list[Group], path: Path) -> None:
    """Draw a panel a group: its mean and range over the seeds, all others grey behind it."""
    columns = min(COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    style: Any = {**STYLE, "axes.titlesize": 7, "font.size": 7}
    with drawing(style):
        figure = Figure(
            figsize=(max(3.5, 1.6 * columns), 0.4 + 1.35 * rows), dpi=DOTS, layout="constrained"
        )
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, group in zip(panels.flat, groups, strict=False):
            for other in groups:
                axes.plot(other.rounds, other.accuracy.mean(axis=0), color=GREY, linewidth=0.4)
            _highlight(axes, group)
        for axes in panels.flat[len(groups) :]:
            axes.set_axis_off()
        highest = max(float(group.accuracy.max()) for group in groups)
        panels[0, 0].set_ylim(0, min(100.0, 10 * math.ceil(highest / 10)))
        panels[0, 0].xaxis.set_major_locator(MaxNLocator(nbins=3, steps=STEPS, integer=True))
        figure.supxlabel("Round", size=7)
        figure.supylabel("Accuracy (%)", size=7)
        with replacing(path) as file:
            figure.savefig(file, format="png")


def _highlight(axes: Axes, group: Group) -> None:
    low, high = group.accuracy.min(axis=0), group.accuracy.max(axis=0)
    axes.fill_between(group.rounds, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(group.rounds, group.accuracy.mean(axis=0), color=BLUE, linewidth=1.2)
    axes.set_title(f"{group.name}  {group.accuracy[:, -1].mean():.1f}", loc="left", pad=2)

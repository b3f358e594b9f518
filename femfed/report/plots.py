"""The plots of a run, drawn from its tables: curves.png and writers.png.

Figures are made without pyplot: no global state, no display.
"""

import csv
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from femfed import one_line
from femfed.report import drawing
from femfed.report.files import replacing

Floats = NDArray[np.float64]

# Blue and vermillion of Okabe and Ito's palette: colour-blind readers tell them apart.
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#7A7A7A"
STYLE: Any = {  # any: the keys' type is new in matplotlib 3.11
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "text.parse_math": False,
}
SIZE = (7.2, 3.0)  # inches: the width of a two-column page
DOTS = 250  # an inch
LABEL_SIZE = 7.5
STEPS = (1, 2, 2.5, 5, 10)  # between ticks


def plot_curves(folder: Path, title: str) -> Path:
    """Draw accuracy and loss over the rounds of `folder/rounds.csv`.

    Args:
        folder: the run's folder; `curves.png` is written there.
        title: stands above the panels; says so if the data is synthetic.

    Returns:
        The path of the plot.
    """
    table = {int(row["round"]): row for row in _read(folder / "rounds.csv")}  # the last one counts
    rows = [table[number] for number in sorted(table)]
    rounds = _column(rows, "round")
    with drawing(STYLE):
        figure, (accuracy, loss) = _figure(title, share_y=False)

        percent = _Lines(accuracy, rounds, "{:.1f}")
        low, high = (100 * _column(rows, f"accuracy_{name}") for name in ("p10", "p90"))
        percent.band(low, high, BLUE)
        percent.label(high, "p90 of writers", BLUE)
        percent.label(low, "p10 of writers", BLUE)
        for column, name, colour, width, dashes in (
            ("train_accuracy", "training", GREY, 0.8, "-"),
            ("accuracy_p50", "median writer", BLUE, 0.6, "-"),
            ("accuracy_worst_tenth", "worst tenth", BLUE, 1.2, "--"),
            ("unseen_accuracy", "unseen writers", VERMILLION, 1.2, "-"),
            ("test_accuracy", "seen writers", BLUE, 1.8, "-"),
        ):
            percent.draw(100 * _column(rows, column), name, colour, width, dashes)
        percent.finish("Accuracy (%)", top=min(100.0, 20 * math.ceil(percent.highest / 20)))

        losses = _Lines(loss, rounds, "{:#.3g}")
        losses.draw(_column(rows, "train_loss"), "training", GREY, 0.8)
        losses.draw(_column(rows, "unseen_loss"), "unseen writers", VERMILLION, 1.2)
        losses.draw(_column(rows, "test_loss"), "seen writers", BLUE, 1.8)
        losses.finish("Loss", top=1.06 * losses.highest)
        return _save(figure, folder / "curves.png")


def plot_writers(folder: Path, title: str) -> Path:
    """Draw the final accuracy of every writer in `folder/writers.csv`.

    Left, the writers from the worst to the best; right, accuracy against the writer's examples.

    Args:
        folder: the run's folder; `writers.png` is written there.
        title: stands above the panels; says so if the data is synthetic.

    Returns:
        The path of the plot.
    """
    rows = _read(folder / "writers.csv")
    dense = min(1.0, 300 / max(1, len(rows)))  # many points: smaller and fainter ones
    with drawing(STYLE):
        figure, (ranked, sized) = _figure(title, share_y=True)
        for role, colour, width in (("seen", BLUE, 1.8), ("unseen", VERMILLION, 1.2)):
            some = [row for row in rows if row["role"] == role]
            accuracy, examples = 100 * _column(some, "test_accuracy"), _column(some, "examples")
            known = np.isfinite(accuracy)  # a writer without test images has no accuracy
            accuracy, examples = accuracy[known], examples[known]
            count = len(accuracy)
            if not count:
                continue
            p10, median = np.percentile(accuracy, (10, 50))
            label = f"{count:,} {role} {'writer' if count == 1 else 'writers'}: "
            label += f"median {median:.1f} %, p10 {p10:.1f} %"
            share = 100 * (np.arange(count) + 0.5) / count
            dots = _dots(width) if count <= 40 else {}
            ranked.plot(share, np.sort(accuracy), color=colour, lw=width, label=label, **dots)
            size, alpha = 3 + 9 * dense, 0.2 + 0.5 * dense
            sized.scatter(examples, accuracy, size, color=colour, alpha=alpha, linewidth=0)
            if count >= 200:
                parts = np.array_split(np.argsort(examples), 10)
                x, y = ([v[part].mean() for part in parts] for v in (examples, accuracy))
                label = f"{role}, mean of each tenth by examples"
                outline = [Stroke(linewidth=width + 1.6, foreground="white"), Normal()]
                sized.plot(x, y, color=colour, lw=width, label=label, path_effects=outline)
        ranked.set(xlabel="Writers from worst to best (%)", xlim=(0, 100))
        ranked.set(ylabel="Accuracy (%)", ylim=(-2, 102))
        sized.set(xlabel="Images evaluated of the writer")
        sized.set_xlim(left=0)
        sized.tick_params(left=False)
        for axes in (ranked, sized):
            if axes.lines:
                axes.legend(loc="best", fontsize=LABEL_SIZE)
        return _save(figure, folder / "writers.png")


class _Lines:
    """Lines over the rounds, each with its last value and name at its end, none over another."""

    def __init__(self, axes: Axes, rounds: Floats, form: str) -> None:
        self._axes = axes
        self._rounds = rounds
        self._form = form
        self._ends: list[tuple[float, str, str]] = []
        self._highest = 0.0

    @property
    def highest(self) -> float:
        """The greatest value drawn, 1 if there is none above 0."""
        return self._highest or 1.0

    def draw(self, y: Floats, name: str, colour: str, width: float, dashes: str = "-") -> None:
        """Draw the values that there are, joined over those that there are not."""
        known = np.isfinite(y)
        if not known.any():
            return
        dots = _dots(width) if known.sum() <= 12 else {}
        width *= min(1.0, math.sqrt(200 / len(y)))  # a long jittery line is not to be a blot
        x = self._rounds[known]
        self._axes.plot(x, y[known], color=colour, linewidth=width, linestyle=dashes, **dots)
        self.label(y, name, colour)

    def band(self, low: Floats, high: Floats, colour: str) -> None:
        """Fill between two lines; where there is one round only, with a bar."""
        known = np.isfinite(low) & np.isfinite(high)
        x, low, high = self._rounds[known], low[known], high[known]
        if len(x) == 1:
            self._axes.vlines(x, low, high, color=colour, alpha=0.14, linewidth=8)
        else:
            self._axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)

    def label(self, y: Floats, name: str, colour: str) -> None:
        """Have the last value of `y` labelled."""
        if len(finite := y[np.isfinite(y)]):
            self._ends.append((float(finite[-1]), name, colour))
            self._highest = max(self._highest, float(finite.max()))

    def finish(self, name: str, top: float) -> None:
        """Set the limits, name the axes and write the labels beside them."""
        self._axes.set(xlabel="Round", ylabel=name, ylim=(0, top))
        if len(self._rounds) == 1:
            self._axes.set(xticks=self._rounds, xlim=(self._rounds[0] - 1, self._rounds[0] + 1))
        else:
            self._axes.set_xlim(self._rounds[0], self._rounds[-1])
            self._axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=STEPS, integer=True))
        self._axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=STEPS))
        self._ends.sort()
        places = _apart([value / top for value, _, _ in self._ends], gap=0.054)
        for (value, text, colour), place in zip(self._ends, places, strict=True):
            text = f"{self._form.format(value)}  {text}"
            beside = self._axes.transAxes
            self._axes.text(
                1.045, place, text, transform=beside, color=colour, size=LABEL_SIZE, va="center"
            )
            self._axes.plot(
                (1.005, 1.035), (value / top, place), transform=beside, color=colour, lw=0.5,
                clip_on=False,
            )  # fmt: skip


def drawable(text: str) -> str:
    """Return a text with escapes for the characters that the font of figures lacks."""
    font = get_font(findfont(FontProperties()))
    lacks = {char for char in text if char != "\n" and not font.get_char_index(ord(char))}
    return "".join(char if char not in lacks else ascii(char)[1:-1] for char in text)


def _dots(width: float) -> dict[str, Any]:
    return {"marker": "o", "markersize": 1 + 1.5 * width, "clip_on": False}


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Move sorted places in [0, 1] as little as it takes for neighbours to stand `gap` apart.

    Places that are too near form a group, spaced evenly around the mean of its members.
    """
    groups: list[tuple[float, int]] = []  # mean, members
    for place in places:
        mean, count = place, 1
        while groups and mean - groups[-1][0] < gap * (count + groups[-1][1]) / 2:
            other, members = groups.pop()
            mean = (mean * count + other * members) / (count + members)
            count += members
            mean = min(max(mean, gap * count / 2), 1 - gap * count / 2)
        groups.append((mean, count))
    return [mean + gap * (i - (count - 1) / 2) for mean, count in groups for i in range(count)]


def _figure(title: str, share_y: bool) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=SIZE, dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=share_y)
    lines = textwrap.fill(drawable(one_line(title)), 100)
    figure.suptitle(lines, x=0.01, ha="left", fontsize=9, fontweight="bold")
    return figure, (left, right)


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as file:
        figure.savefig(file, format="png")
    return path


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _column(rows: Sequence[dict[str, str]], name: str) -> Floats:
    return np.array([float(row[name] or math.nan) for row in rows], np.float64)

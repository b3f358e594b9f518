"""A contact sheet: one image of every class from every writer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from femfed import one_line, printable
from femfed.report import drawing
from femfed.report.files import replacing
from femfed.report.plots import drawable

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DOTS = 150  # an inch
NAME_CHARACTERS, CHARACTER_PIXELS = 24, 9  # of a writer's name
STYLE: Any = {"font.size": 7, "font.family": "monospace", "text.parse_math": False}


def draw_sheet(
    path: Path, title: str, names: Sequence[str], pixels: NDArray[np.uint8], source: str
) -> Path:
    """Draw a row of images a writer, a column a class.

    Args:
        path: the PNG to write; beside it if it is there and shows another source.
        title: stands above the images.
        names: of the writers, top to bottom.
        pixels: `[28 * writers, 28 * 62]` uint8.
        source: of the images; stands in the file.

    Returns:
        The path.
    """
    path = _free(path, source)
    height, width = pixels.shape
    with drawing(STYLE):
        names = [_short(drawable(printable(name))) for name in names]
        left, top, right, bottom = 110, 54, 6, 6  # pixels around the images
        left = max(left, 12 + CHARACTER_PIXELS * max(map(len, names), default=0))
        size = (left + width + right, top + height + bottom)
        figure = Figure(figsize=(size[0] / DOTS, size[1] / DOTS), dpi=DOTS)
        FigureCanvasAgg(figure)
        place = (left / size[0], bottom / size[1], width / size[0], height / size[1])
        axes = figure.add_axes(place)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="none", aspect="auto")
        axes.set_yticks(np.arange(len(names)) * 28 + 13.5, names)
        axes.set_xticks(np.arange(len(CHARACTERS)) * 28 + 13.5, list(CHARACTERS))
        axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
        axes.spines[:].set_visible(False)
        title = drawable(one_line(title))
        figure.text(6 / size[0], 1 - 6 / size[1], title, va="top", ha="left", size=8, weight="bold")
        with replacing(path) as file:
            figure.savefig(file, format="png", metadata={"Source": source})
    return path


def _short(name: str) -> str:
    if len(name) <= NAME_CHARACTERS:
        return name
    return f"{name[: NAME_CHARACTERS - 9]}...{name[-6:]}"


def _free(path: Path, source: str) -> Path:
    """Return the first of path, path-2, path-3, ... that is not there or shows this source."""
    number, free = 1, path
    while free.exists() and _source(free) != source:
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def _source(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            return image.info.get("Source")
    except OSError:  # no picture
        return None

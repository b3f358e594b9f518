"""A contact sheet: one image of every class from every writer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from femfed.report import drawing
from femfed.report.files import replacing

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DOTS = 150  # an inch
STYLE: Any = {"font.size": 7, "font.family": "monospace", "text.parse_math": False}


def draw_sheet(path: Path, title: str, names: Sequence[str], pixels: NDArray[np.uint8]) -> Path:
    """Draw a row of images a writer, a column a class.

    Args:
        path: the PNG to write.
        title: stands above the images.
        names: of the writers, top to bottom.
        pixels: `[28 * writers, 28 * 62]` uint8.

    Returns:
        The path.
    """
    height, width = pixels.shape
    left, top, right, bottom = 110, 54, 6, 6  # pixels around the images
    size = (left + width + right, top + height + bottom)
    with drawing(STYLE):
        figure = Figure(figsize=(size[0] / DOTS, size[1] / DOTS), dpi=DOTS)
        FigureCanvasAgg(figure)
        place = (left / size[0], bottom / size[1], width / size[0], height / size[1])
        axes = figure.add_axes(place)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="none", aspect="auto")
        axes.set_yticks(np.arange(len(names)) * 28 + 13.5, names)
        axes.set_xticks(np.arange(len(CHARACTERS)) * 28 + 13.5, list(CHARACTERS))
        axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
        axes.spines[:].set_visible(False)
        figure.text(6 / size[0], 1 - 6 / size[1], title, va="top", ha="left", size=8, weight="bold")
        with replacing(path) as file:
            figure.savefig(file, format="png")
    return path

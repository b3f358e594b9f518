"""How well a finished run's model reads other handwriting: accuracy, spread, confusions.

    python -m benchmarks.transfer RUN dataset=leaf dataset.path=DIR

`RUN` is a run's folder; what follows names the dataset as for `simulate.py`. All images of all its
writers are read; `RUN/confusion.png` shows what was taken for what.
"""

import sys
from pathlib import Path

import keras
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from femfed import config
from femfed.data.store import CHARACTERS, CLASSES

# Pairs of which real forms do not tell one from the other without the field they stand in.
ALIKE = (
    "0Oo",
    "1Iil",
    "Cc",
    "Jj",
    "Kk",
    "Mm",
    "Pp",
    "Ss5",
    "Uu",
    "Vv",
    "Ww",
    "Xx",
    "Yy",
    "Zz2",
    "9gq",
)


def main() -> None:
    """Print the table and draw the matrix."""
    run, overrides = Path(sys.argv[1]), sys.argv[2:]
    cfg = config.compose(overrides)
    dataset = config.make(cfg.dataset, "dataset")
    store = dataset.select(dataset.convert(Path(cfg.cache).expanduser(), cfg.clients))
    model = keras.saving.load_model(run / "model.keras")
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    per_writer = []
    for index in range(len(store)):
        rows = store.rows_of(index)
        pixels = store.images[rows][..., np.newaxis].astype(np.float32) / 255
        predicted = model.predict(pixels, batch_size=512, verbose=0).argmax(axis=1)
        np.add.at(confusion, (store.labels[rows], predicted), 1)
        per_writer.append(float((predicted == store.labels[rows]).mean()))
    print(f"{dataset.variant}: {len(store)} writers, {confusion.sum():,} images")
    digits = confusion[:10]
    print(f"all classes       {accuracy(confusion):6.1%}")
    print(f"digits            {accuracy(digits):6.1%}   among 62 classes")
    print(f"digits            {accuracy(digits[:, :10]):6.1%}   of those taken for a digit")
    print(f"capitals          {accuracy(confusion[10:36], 10):6.1%}")
    print(f"small letters     {accuracy(confusion[36:], 36):6.1%}")
    print(f"alike as one      {accuracy(merged(confusion)):6.1%}   {' '.join(ALIKE)}")
    p10, p50, p90 = np.quantile(per_writer, (0.1, 0.5, 0.9))
    print(f"writers           p10 {p10:.1%}, median {p50:.1%}, p90 {p90:.1%}")
    wrong = confusion - np.diag(np.diag(confusion))
    worst = np.argsort(-wrong, axis=None, kind="stable")[:20]
    pairs = [
        f"{CHARACTERS[a]} as {CHARACTERS[b]} {wrong[a, b]}"
        for a, b in zip(*np.unravel_index(worst, wrong.shape), strict=True)
    ]
    print("most frequent     " + ", ".join(pairs))
    print(f"matrix            {draw(run / 'confusion.png', confusion, dataset.variant)}")


def accuracy(confusion: NDArray[np.int64], first: int = 0) -> float:
    """Return the share of the rows' images in the right column; row 0 belongs to column `first`."""
    right = sum(int(confusion[i, i + first]) for i in range(len(confusion)))
    return right / max(1, int(confusion.sum()))


def merged(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the matrix with each group of ALIKE as one class."""
    home = np.arange(CLASSES)
    for group in ALIKE:
        labels = [CHARACTERS.index(character) for character in group]
        home[labels] = labels[0]
    together = np.zeros_like(confusion)
    np.add.at(together, (home[:, None], home[None, :]), confusion)
    return together


def draw(path: Path, confusion: NDArray[np.int64], variant: str) -> Path:
    """Draw the matrix, each row as shares of its class."""
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    with matplotlib.rc_context({"font.size": 6, "font.family": "monospace"}):
        figure = Figure(figsize=(7.2, 7.2), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xticks=range(CLASSES), yticks=range(CLASSES), xlabel="read as", ylabel="written")
        axes.set_xticklabels(CHARACTERS)
        axes.set_yticklabels(CHARACTERS)
        axes.set_title(f"{variant}: share of each class read as another", loc="left")
        figure.savefig(path)
    return path


if __name__ == "__main__":
    main()

"""What is in a dataset, in numbers and in one picture of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from femfed.data.store import CHARACTERS, CLASSES, Bytes, WriterStore
from femfed.seeds import generator

WHITE = 255


@dataclass(frozen=True)
class Overview:
    """Numbers of some writers.

    Attributes:
        writers: how many.
        images: of all of them.
        per_writer: mean, standard deviation, least, p10, p50, p90 and most images of a writer.
        labels_per_writer: p10, p50, p90 of the number of different labels a writer has.
        classes: images of each class, `[62]`.
        skew: mean total variation distance between a writer's labels and all labels, in [0, 1].
        skew_of_chance: the same for writers of these sizes who draw from all labels.
    """

    writers: int
    images: int
    per_writer: tuple[float, ...]
    labels_per_writer: tuple[float, ...]
    classes: NDArray[np.int64]
    skew: float
    skew_of_chance: float


def overview(store: WriterStore, writers: NDArray[np.int64]) -> Overview:
    """Count what `writers` of `store` have."""
    counts = np.stack(
        [
            np.bincount(store.labels[store.rows_of(index)], minlength=CLASSES)
            for index in writers.tolist()
        ]
    )
    sizes, classes = counts.sum(axis=1), counts.sum(axis=0)
    chance = generator(0, "overview").multinomial(sizes, classes / classes.sum())
    quantiles = np.quantile(sizes, (0, 0.1, 0.5, 0.9, 1))
    return Overview(
        writers=len(writers),
        images=int(sizes.sum()),
        per_writer=(float(sizes.mean()), float(sizes.std()), *map(float, quantiles)),
        labels_per_writer=tuple(map(float, np.quantile((counts > 0).sum(axis=1), (0.1, 0.5, 0.9)))),
        classes=classes,
        skew=_skew(counts),
        skew_of_chance=_skew(chance),
    )


def _skew(counts: NDArray[Any]) -> float:
    """Return the mean over writers of `1/2 sum_c |p_writer(c) - p(c)|`."""
    everyone = counts.sum(axis=0) / counts.sum()
    own = counts / counts.sum(axis=1, keepdims=True)
    return float(np.abs(own - everyone).sum(axis=1).mean() / 2)


def sheet(store: WriterStore, writers: NDArray[np.int64]) -> Bytes:
    """Return one image of every class from every writer, white where there is none.

    Returns:
        `[28 * writers, 28 * 62]` uint8: a row of images a writer, a column of them a class.
    """
    cells = np.full((len(writers), CLASSES, 28, 28), WHITE, np.uint8)
    for row, index in enumerate(writers.tolist()):
        rows = store.rows_of(index)
        labels, first = np.unique(store.labels[rows], return_index=True)
        cells[row, labels] = store.images[rows[first]]
    return cells.transpose(0, 2, 1, 3).reshape(28 * len(writers), 28 * CLASSES)


def table(variant: str, some: Overview) -> list[tuple[str, str]]:
    """Return `some` as lines of a name and a value each."""
    mean, deviation, least, p10, p50, p90, most = some.per_writer
    groups = (("digits", 0, 10), ("capitals", 10, 36), ("small", 36, 62))
    shares = [
        f"{name} {100 * some.classes[a:b].sum() / some.images:.1f} %" for name, a, b in groups
    ]
    present = np.flatnonzero(some.classes)
    order = present[np.argsort(some.classes[present], kind="stable")]
    ends = [f"{CHARACTERS[label]} {some.classes[label]:,}" for label in (order[-1], order[0])]
    return [
        ("variant", variant),
        ("writers", f"{some.writers:,}"),
        ("images", f"{some.images:,}"),
        ("images a writer", f"mean {mean:.1f}, standard deviation {deviation:.1f}"),
        (
            "",
            f"least {least:.0f}, p10 {p10:.0f}, median {p50:.0f}, p90 {p90:.0f}, most {most:.0f}",
        ),
        ("classes", f"{len(present)} of {CLASSES}: {', '.join(shares)}"),
        ("", f"most images: {ends[0]}; least: {ends[1]}"),
        (
            "classes a writer",
            "p10 {:.0f}, median {:.0f}, p90 {:.0f}".format(*some.labels_per_writer),
        ),
        (
            "label skew",
            f"{some.skew:.3f} from writer to all; {some.skew_of_chance:.3f} would be chance",
        ),
    ]

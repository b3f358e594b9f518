"""Real handwriting for tests, and shards in LEAF's published layout made of it.

    python -m tests.handwriting DIR

writes the 539 QMNIST writers to DIR as LEAF shards of 100 writers, 90 % of each in `DIR/train` and
the last 10 % in `DIR/test`.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from femfed.data.source import Dataset

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(),
    reason=f"real handwriting is kept outside the project and is not at {REAL_DATA}",
)

D = TypeVar("D", bound=Dataset)

# A writer: name, images [n, 28, 28] uint8 on white 255, labels [n].
Person = tuple[str, NDArray[np.uint8], NDArray[Any]]

# json.dumps of 784 floats costs some 0.4 ms an image, joining the 256 possible texts a tenth of it.
PIXEL_TEXTS = [json.dumps(value / 255) for value in range(256)]


def whole(kind: type[D], **fields: Any) -> D:
    """Return the dataset `kind` of which nothing is left out, with the `fields` of its own."""
    kept = {"partition": "writer", "alpha": 0.5, "shards": 2, "classes": None}
    return kind(**{**kept, "fraction": 1.0, "min_images": 0, "seed": 0, **fields})


def write_leaf_shards(
    folder: Path,
    writers: Iterable[Person],
    per_shard: int = 100,
    split: bool = True,
    test_fraction: float = 0.1,
) -> list[Path]:
    """Write `writers` below `folder` byte for byte as LEAF's `json.dump` would.

    Args:
        folder: receives `train/` and `test/`, or `all_data_{k}.json` where nothing is split.
        writers: taken one shard at a time.
        per_shard: writers in a shard.
        split: whether the shards publish a split.
        test_fraction: share of each writer's images, its last ones, that goes to `test/`.

    Returns:
        the files, those of a shard one after the other.
    """
    files: list[Path] = []
    rest = iter(writers)
    while shard := list(islice(rest, per_shard)):
        k = len(files) // 2 if split else len(files)
        if not split:
            files.append(_write_shard(folder / f"all_data_{k}.json", shard))
            continue
        cuts = [len(labels) - round(len(labels) * test_fraction) for _, _, labels in shard]
        tenths = round(10 * (1 - test_fraction))
        for half in ("train", "test"):
            part = [
                (name, images[:cut], labels[:cut])
                if half == "train"
                else (name, images[cut:], labels[cut:])
                for (name, images, labels), cut in zip(shard, cuts, strict=True)
            ]
            file = folder / half / f"all_data_{k}_niid_0_keep_0_{half}_{tenths}.json"
            files.append(_write_shard(file, part))
    return files


def _write_shard(file: Path, writers: Sequence[Person]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        users = json.dumps([name for name, _, _ in writers])
        counts = json.dumps([len(labels) for _, _, labels in writers])
        stream.write(f'{{"users": {users}, "num_samples": {counts}, "user_data": {{')
        for place, (name, images, labels) in enumerate(writers):
            rows = (map(PIXEL_TEXTS.__getitem__, image.tobytes()) for image in images)
            x = ", ".join(f"[{', '.join(row)}]" for row in rows)
            y = json.dumps([int(label) for label in labels])
            stream.write(f'{", " if place else ""}{json.dumps(name)}: {{"x": [{x}], "y": {y}}}')
        stream.write("}}")
    return file


def qmnist_writers() -> Iterator[Person]:
    """Yield the 539 writers of MNIST's training set, inverted to dark ink on white paper."""
    with np.load(REAL_DATA / "qmnist_train_writers.npz") as file:
        images, labels, owner = file["images"], file["labels"], file["writer"]
        names = file["writer_names"]
    # The images are sorted by writer, so a writer is a range of rows.
    edges = np.searchsorted(owner, np.arange(len(names) + 1))
    for name, start, stop in zip(names, edges[:-1], edges[1:], strict=True):
        yield str(name), 255 - images[start:stop], labels[start:stop]


def main() -> None:
    """Write the QMNIST writers out as LEAF shards."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.handwriting",
        description="Write the 539 QMNIST writers out as LEAF shards of 100 writers.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="receives train/ and test/")
    folder: Path = parser.parse_args().folder
    if not REAL_DATA.is_dir():
        parser.error(f"the QMNIST writers are not at {REAL_DATA}")
    files = write_leaf_shards(folder, qmnist_writers())
    size = sum(file.stat().st_size for file in files)
    print(f"{len(files)} files, {size / 1e6:.0f} MB, in {folder}")


if __name__ == "__main__":
    main()

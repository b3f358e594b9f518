"""What is kept of a dataset: classes, a fraction, writers with enough images; views of a store."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from femfed import UserError
from femfed.data.glyphs import Glyphs
from femfed.data.source import Dataset, Published, labels_of
from femfed.data.store import Columns, Handwriting, View, WriterStore, stored, viewed
from tests.handwriting import whole

WRITERS = 20


def hand(index: int, published: int | None, apart: bool = False) -> Handwriting:
    """Writer i has 10 + i images; image k of them is all k and labelled (i + k) % 62."""
    n = 10 + index
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None], (n, 28, 28))
    labels = (index + np.arange(n)) % 62
    return Handwriting(f"w{index:02}", index // 10, index % 10, images, labels, published, apart)


@pytest.fixture
def everything(tmp_path: Path) -> WriterStore:
    """Twenty writers; the even ones publish a split after their fourth image."""
    hands = [hand(index, None if index % 2 else 4) for index in range(WRITERS)]
    return stored(tmp_path / "cache", {"dataset": "test"}, lambda: hands)


def select(everything: WriterStore, **kept: Any) -> WriterStore:
    return whole(Glyphs, writers=None, **kept).select(everything)


def test_nothing_left_out_is_the_store_itself(everything: WriterStore) -> None:
    assert select(everything) is everything
    assert select(everything, classes=["digits", "capitals", "small"]) is everything


def test_classes_keep_the_images_with_these_labels(everything: WriterStore) -> None:
    kept = select(everything, classes="0-9")

    # Writer 9 begins with a 9, has no other digit, and publishes no split.
    assert kept.names == everything.names[:10]
    assert kept.labels[kept.rows_of(9)].tolist() == [9]
    writer = kept.writer(2, 0.1, seed=0)
    assert writer.labels.tolist() == list(range(2, 10))
    assert writer.images[:, 0, 0].tolist() == list(range(8))
    assert (writer.train.tolist(), writer.test.tolist()) == ([0, 1, 2, 3], [4, 5, 6, 7])
    # Writer 8 has a digit only among the images of its training split.
    assert kept.train_examples[[7, 8]].tolist() == [-1, 2]
    assert kept.offsets[-1] == sum(range(1, 11))


def test_scattered_rows_are_copied_and_rows_in_sequence_are_not(everything: WriterStore) -> None:
    scattered = select(everything, classes=[11, 13, 15])
    together = select(everything, min_images=12)

    writer = scattered.writer(scattered.names.index("w10"), 0.0, seed=0)  # labels 10, 11, 12, ...
    assert writer.images[:, 0, 0].tolist() == [1, 3, 5]
    assert not np.shares_memory(writer.images, scattered.images)
    assert np.shares_memory(together.writer(0, 0.1, 0).images, together.images)
    assert together.names == everything.names[2:]
    assert (
        together.writer(0, 0.1, 0).labels.tolist() == everything.writer(2, 0.1, 0).labels.tolist()
    )


def test_a_fraction_is_of_the_images_and_of_whole_writers(everything: WriterStore) -> None:
    kept = select(everything, fraction=0.3, seed=1)
    images, all_images = kept.offsets[-1], everything.offsets[-1]

    assert 0.3 * all_images <= images < 0.3 * all_images + 10 + WRITERS
    assert list(kept.names) == sorted(kept.names)
    sizes = dict(zip(everything.names, everything.examples.tolist(), strict=True))
    assert [sizes[name] for name in kept.names] == kept.examples.tolist()
    assert kept.names != select(everything, fraction=0.3, seed=2).names
    assert kept.names == select(everything, fraction=0.3, seed=1).names


def test_a_view_shares_the_images_of_its_store_and_is_made_once(
    everything: WriterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = select(everything, classes="a-j")
    monkeypatch.setattr(Dataset, "_select", None)
    again = select(everything, classes=list(range(36, 46)))

    assert again.folder == first.folder != everything.folder
    assert again.images.filename == everything.images.filename
    assert {path.name for path in first.folder.iterdir()} == {"rows.i32", "index.json"}
    assert WriterStore.open(first.folder).labels[first.rows].min() == 36


def test_a_view_of_a_view_names_rows_of_the_store(everything: WriterStore) -> None:
    digits = select(everything, classes="digits")

    def reversed_rows() -> View:
        columns = Columns()
        columns.copy(digits, 1, len(digits.rows_of(1)), -1)
        return columns, digits.rows_of(1)[::-1]

    view = viewed(digits, {"order": "reversed"}, reversed_rows)

    assert view.images.filename == everything.images.filename
    assert view.writer(0, 0.0, 0).labels.tolist() == list(range(9, 0, -1))


def test_apart_stays_apart(tmp_path: Path) -> None:
    hands = [hand(index, None, apart=index == 2) for index in range(4)]
    store = stored(tmp_path, {"dataset": "test"}, lambda: hands)

    assert store.apart.tolist() == [False, False, True, False]
    assert select(store, min_images=12).apart.tolist() == [True, False]


def test_what_differs_from_the_published_counts_is_said(
    everything: WriterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = whole(Glyphs, writers=None)
    assert dataset.remarks(everything) == []

    monkeypatch.setattr(Glyphs, "published", Published(writers=20, images=391))
    (line,) = dataset.remarks(everything)
    assert line.startswith("390 images, where synthetic writers")
    assert line.endswith("is published with 391")

    hands = [
        hand(0, None),
        hand(1, None, apart=True),
        Handwriting("w", 0, 2, hand(0, 0).images[:0], np.empty(0)),
    ]
    some = stored(tmp_path, {"dataset": "some"}, lambda: hands)
    lines = dataset.remarks(some)
    assert [line.split(",")[0] for line in lines] == [
        "1 writers without images are left out", "1 writers", "10 images"
    ]  # fmt: skip


CLASSES = {
    None: range(62),
    "digits": range(10),
    "capitals": range(10, 36),
    "small": range(36, 62),
    "a-j": range(36, 46),
    "A": [10],
    "7": [7],
    7: [7],
    "36": [36],
    ("digits", "A-C", 61): [*range(10), 10, 11, 12, 61],
    ("x", "x"): [59],
}


@pytest.mark.parametrize("classes", CLASSES, ids=str)
def test_classes_are_words_characters_ranges_and_labels(classes: Any) -> None:
    assert labels_of(classes) == frozenset(CLASSES[classes])


@pytest.mark.parametrize("classes", ["vowels", "j-a", 62, -1, "", [], ["digits", "é"], 1.5, "a-"])
def test_what_is_no_class_is_refused(classes: Any) -> None:
    with pytest.raises(UserError, match=r"dataset\.classes="):
        whole(Glyphs, writers=None, classes=classes)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"partition": "random"}, "partition=random; expected writer, iid, dirichlet or shards"),
        ({"alpha": 0.0}, r"alpha=0\.0; expected above 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"shards": 0}, "shards=0; expected at least 1"),
        ({"fraction": 0.0}, r"fraction=0\.0; expected above 0 and at most 1"),
        ({"fraction": 1.1}, r"fraction=1\.1"),
        ({"min_images": -1}, "min_images=-1; expected at least 0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(kept: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset\.{said}"):
        whole(Glyphs, writers=None, **kept)


def test_a_selection_that_leaves_nobody_is_refused(everything: WriterStore) -> None:
    with pytest.raises(UserError, match=r"no writer has 1000 images of dataset\.classes=None"):
        select(everything, min_images=1000)
    assert not list(everything.folder.parent.glob("*view*"))

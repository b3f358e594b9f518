"""Synthetic writers: the same everywhere, like FEMNIST's in number and look, each with a hand."""

from pathlib import Path

import numpy as np
import pytest

from femfed.data.glyphs import Glyphs, alphabet, draw_labels, draw_writer
from femfed.data.store import CHARACTERS, CLASSES, Bytes
from tests.handwriting import whole

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def writers() -> list[tuple[Bytes, Bytes]]:
    """Labels and images of twelve writers."""
    return [draw_writer(0, writer) for writer in range(12)]


def test_a_writer_is_a_function_of_seed_and_writer(writers: list[tuple[Bytes, Bytes]]) -> None:
    labels, images = draw_writer(0, 7)

    assert np.array_equal(labels, writers[7][0])
    assert np.array_equal(images, writers[7][1])
    assert not np.array_equal(labels[:50], writers[8][0][:50])
    assert not np.array_equal(labels[:50], draw_writer(1, 7)[0][:50])


def test_more_writers_leave_the_first_as_they_are(tmp_path: Path) -> None:
    few = whole(Glyphs, writers=None, seed=5).convert(tmp_path, 3)
    many = whole(Glyphs, writers=10, seed=5).convert(tmp_path, 3)

    assert (len(few), len(many)) == (3, 10)
    assert few.names == many.names[:3] == ("g0000_00", "g0000_01", "g0000_02")
    assert np.array_equal(few.labels, many.labels[: few.offsets[-1]])
    assert np.array_equal(few.images, many.images[: few.offsets[-1]])
    assert few.writer(1, 0.1, seed=0).images.shape[1:] == (28, 28)


def test_seeds_have_stores_of_their_own(tmp_path: Path) -> None:
    stores = [whole(Glyphs, writers=None, seed=seed).convert(tmp_path, 1) for seed in (0, 1, 0)]

    assert stores[0].folder == stores[2].folder != stores[1].folder


def test_writers_stand_in_shards_of_a_hundred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = np.zeros(1, np.uint8), np.full((1, 28, 28), 255, np.uint8)
    monkeypatch.setattr("femfed.data.glyphs.draw_writer", lambda seed, writer: blank)

    store = whole(Glyphs, writers=None, seed=0).convert(tmp_path, 102)

    assert store.names[101] == "g0001_01"
    assert (store.numbers[101], store.subject_numbers[101]) == (1, 1)


def test_writers_write_as_much_as_femnists() -> None:
    texts = [draw_labels(0, writer) for writer in range(2000)]
    counts = np.array([len(text) for text in texts])
    shares = np.bincount(np.concatenate(texts), minlength=CLASSES) / counts.sum()

    assert counts.mean() == pytest.approx(227, abs=10)
    assert counts.std() == pytest.approx(89, abs=8)
    assert 10 <= counts.min() <= 20
    assert shares[:10].sum() == pytest.approx(0.5, abs=0.02)
    assert shares.min() > 0.001  # every character occurs,
    assert shares[10:].max() > 8 * shares[10:].min()  # some letters far more often


def test_every_character_has_allographs() -> None:
    shapes = alphabet()

    assert set(shapes.label) == set(range(CLASSES))
    # Moving all control points moves the shape, bent or not.
    np.testing.assert_allclose(shapes.straight.sum(axis=2), 1, atol=1e-5)
    np.testing.assert_allclose(shapes.bend.sum(axis=2), 0, atol=1e-5)


def test_an_allograph_passes_through_its_points() -> None:
    shapes = alphabet()
    first = int(np.flatnonzero(shapes.label == CHARACTERS.index("L"))[0])  # 09 00 50

    drawn = (shapes.straight + shapes.bend)[first] @ shapes.controls[first]

    assert drawn[0] == pytest.approx([0, 9])
    assert drawn[-1] == pytest.approx([5, 0])
    assert np.hypot(*drawn.T).min() < 0.1
    assert np.abs(drawn.prod(axis=1)).max() < 0.1  # 14 units along the axes: no point is off both


def test_images_look_like_femnists(writers: list[tuple[Bytes, Bytes]]) -> None:
    images = np.concatenate([images for _, images in writers])
    ink = 1 - images / 255.0
    rows, columns = np.nonzero((ink > 0.5).any(axis=0))

    assert images.dtype == np.uint8
    assert (ink.sum(axis=(1, 2)) > 2).all()  # no empty image
    assert (ink[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()  # white to the corners
    assert ink.mean() == pytest.approx(0.0367, abs=0.006)
    assert np.median(images) == 255
    assert rows.mean() == pytest.approx(13.5, abs=1)
    assert columns.mean() == pytest.approx(13.5, abs=1)


def test_a_writer_keeps_to_one_hand(writers: list[tuple[Bytes, Bytes]]) -> None:
    """The nearest other image of the same character is the writer's own, far beyond chance."""
    digits = [(i, label, image) for i, (labels, images) in enumerate(writers)
              for label, image in zip(labels, images, strict=True) if label < 10]  # fmt: skip
    by = np.array([writer for writer, _, _ in digits])
    label = np.array([label for _, label, _ in digits])
    pixels = np.stack([image for _, _, image in digits]).reshape(len(digits), -1) / 255.0
    distance = (pixels**2).sum(1)[:, None] + (pixels**2).sum(1) - 2 * pixels @ pixels.T
    distance[(label[:, None] != label) | np.eye(len(digits), dtype=bool)] = np.inf

    own = (by[distance.argmin(axis=1)] == by).mean()

    assert own > 2 / len(writers)

"""`python -m femfed.data`: the numbers are right and the sheet shows what is in the store."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from femfed.data.overview import overview, sheet, table
from femfed.data.store import CLASSES, Handwriting, WriterStore, stored

ROOT = Path(__file__).parents[1]


@pytest.fixture
def store(tmp_path: Path) -> WriterStore:
    """Writer 0 has ten zeros and an A, writer 1 five zeros and five A, all of one grey each."""
    hands = [
        Handwriting("a", 0, 0, np.full((11, 28, 28), 10, np.uint8), np.array([0] * 10 + [10])),
        Handwriting("b", 0, 1, np.full((10, 28, 28), 20, np.uint8), np.array([0, 10] * 5)),
        Handwriting("c", 0, 2, np.full((90, 28, 28), 30, np.uint8), np.full(90, 61)),
    ]
    return stored(tmp_path, {"dataset": "test"}, lambda: hands)


def test_the_numbers(store: WriterStore) -> None:
    some = overview(store, np.array([0, 1]))

    assert (some.writers, some.images) == (2, 21)
    assert some.per_writer == pytest.approx((10.5, 0.5, 10, 10.1, 10.5, 10.9, 11))
    assert some.labels_per_writer == (2.0, 2.0, 2.0)
    assert np.flatnonzero(some.classes).tolist() == [0, 10]
    # All: 15/21 zeros; the writers: 10/11 and 5/10. The distance is that of the zeros' shares.
    assert some.skew == pytest.approx((10 / 11 - 15 / 21 + 15 / 21 - 1 / 2) / 2)
    assert 0 < some.skew_of_chance < 0.3


def test_the_table_says_them(store: WriterStore) -> None:
    lines = dict(table("some variant", overview(store, np.arange(3))))

    assert lines["variant"] == "some variant"
    assert lines["images"] == "111"
    assert "3 of 62" in lines["classes"]
    assert "small 81.1 %" in lines["classes"]


def test_the_sheet_has_a_row_a_writer_and_a_column_a_class(store: WriterStore) -> None:
    cells = sheet(store, np.array([2, 0])).reshape(2, 28, CLASSES, 28)

    assert (cells[0, :, 61] == 30).all()
    assert (cells[1, :, [0, 10]] == 10).all()
    cells[0, :, 61] = cells[1, :, 0] = cells[1, :, 10] = 255
    assert (cells == 255).all()


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "femfed.data", f"cache={folder / 'cache'}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_command_prints_a_table_and_draws_the_sheet(tmp_path: Path) -> None:
    done = run(tmp_path, "clients=4", "clients_per_round=4", "dataset.partition=iid")

    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line[0] != " ")
    assert lines["writers"] == "4"
    assert lines["partition"] == "iid"
    image = matplotlib.image.imread(tmp_path / "outputs" / "glyphs_iid.png")
    assert image.shape[0] > 4 * 28
    assert image.shape[1] > CLASSES * 28
    assert image[..., 0].min() < 0.2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("dataset=leaf",), "dataset.path"),
        (("dataset.partitoin=iid",), "did you mean dataset.partition?"),
        (("dataset.alpha=0", "dataset.partition=dirichlet"), "dataset.alpha=0.0"),
        (("clients=0",), "clients=0"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = run(tmp_path, *arguments)

    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_the_end_is_quiet_when_the_reader_has_gone(tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m femfed.data clients=4 clients_per_round=4 cache=c | true"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )

    assert done.stderr == ""
    assert (tmp_path / "outputs" / "glyphs_writer.png").exists()

"""A sweep side by side: grouped by all but the seed, best first, drawn."""

import csv
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from femfed.report.__main__ import main
from femfed.report.comparison import compare, read, table
from femfed.report.files import ROUND_COLUMNS


def a_run(sweep: Path, name: str, accuracies: list[float | None], finished: bool = True) -> None:
    """Write the tables of a run that was evaluated where there is an accuracy."""
    folder = sweep / name
    folder.mkdir(parents=True)
    with (folder / "rounds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROUND_COLUMNS)
        writer.writeheader()
        for number, accuracy in enumerate(accuracies, start=1):
            known = {"test_accuracy": accuracy, "unseen_accuracy": 0.5, "accuracy_worst_tenth": 0.2}
            writer.writerow({"round": number, **(known if accuracy is not None else {})})
    if finished:
        (folder / "summary.json").write_text("{}")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    a_run(tmp_path, "rounds=4,seed=0,strategy=fedavg", [None, 0.3, None, 0.62])
    a_run(tmp_path, "rounds=4,seed=1,strategy=fedavg", [None, 0.5, None, 0.58])
    a_run(tmp_path, "rounds=4,seed=0,strategy=krum", [None, 0.1, None, 0.65])
    a_run(tmp_path, "rounds=4,seed=2,strategy=krum", [None, 0.1], finished=False)
    return tmp_path


def test_runs_that_differ_in_their_seed_are_one_group(sweep: Path) -> None:
    fedavg, krum = read(sweep)

    assert (fedavg.name, krum.name) == ("fedavg", "krum")
    assert fedavg.rounds.tolist() == [2, 4]
    assert fedavg.accuracy.tolist() == [[30, 62], [50, pytest.approx(58)]]
    assert len(krum.accuracy) == 1


def test_rounds_are_counted_to_what_every_seed_reaches(sweep: Path) -> None:
    fedavg, krum = read(sweep)

    assert fedavg.rounds_to(50) == 3.0  # seed 0 in round 4, seed 1 in round 2
    assert fedavg.rounds_to(60) is None
    assert krum.rounds_to(60) == 4.0


def test_the_table_is_best_first_and_exact(sweep: Path) -> None:
    lines = table(read(sweep)).splitlines()

    assert lines[0].endswith("rounds to 50 % | rounds to 60 % |")
    assert lines[2] == "| krum | 1 | 65.0 | 50.0 | 20.0 | 4 | 4 |"
    assert lines[3] == "| fedavg | 2 | 60.0 ± 2.8 | 50.0 ± 0.0 | 20.0 ± 0.0 | 3 | - |"


def test_table_and_picture_are_written(sweep: Path) -> None:
    written = compare(sweep)

    assert [path.name for path in written] == ["comparison.md", "comparison.png"]
    picture = matplotlib.image.imread(sweep / "comparison.png")
    blue = (picture[..., 2] > 0.6) & (picture[..., 0] < 0.1)
    assert blue.sum() > 100
    half = picture.shape[1] // 2
    assert blue[:, :half].any()
    assert blue[:, half:].any()


@pytest.mark.parametrize("groups", [1, 7, 27])
def test_any_number_of_groups_is_drawn(tmp_path: Path, groups: int) -> None:
    for place in range(groups):
        for seed in (0, 1):
            a_run(tmp_path, f"seed={seed},strategy=s{place}", list(np.linspace(0.1, 0.9, 5)))

    assert len(compare(tmp_path)) == 2
    assert len((tmp_path / "comparison.md").read_text().splitlines()) == 2 + groups


def test_a_single_run_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path) == []
    a_run(tmp_path, "seed=0", [0.5])
    assert compare(tmp_path) == []

    assert main([str(tmp_path)]) == 2
    assert "no two finished runs" in capsys.readouterr().err
    assert main([]) == 2


def test_the_command_prints_the_table(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep)]) == 0
    assert "| krum | 1 |" in capsys.readouterr().out

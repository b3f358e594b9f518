"""Runs side by side: grouped by their configs, aligned by round, best first, drawn."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import yaml

from femfed.report.__main__ import main
from femfed.report.comparison import compare, read, table
from femfed.report.files import ROUND_COLUMNS
from tests.test_resume import TINY, typed

ROOT = Path(__file__).parents[1]
CONFIG: dict[str, Any] = {
    "strategy": {"_target_": "femfed.strategies.fedavg.FedAvg"},
    "model": {"_target_": "femfed.models.CNN"},
    "dataset": {"_target_": "femfed.data.glyphs.Glyphs", "path": None},
    "seed": 0,
    "rounds": 4,
    "cache": "/somewhere",
    "engine": {"kind": "inline", "workers": None},
    "evaluate": {"every": 2},
    "local": {"learning_rate": 0.1, "epochs": 1},
}


def tables(folder: Path, accuracies: list[float | None], first: int = 1) -> None:
    """Write the tables of a run that was evaluated where there is an accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rounds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROUND_COLUMNS)
        writer.writeheader()
        for number, accuracy in enumerate(accuracies, start=first):
            known = {"test_accuracy": accuracy, "unseen_accuracy": 0.5, "accuracy_worst_tenth": 0.2}
            writer.writerow({"round": number, **(known if accuracy is not None else {})})
    (folder / "summary.json").write_text("{}")


def a_run(sweep: Path, name: str, accuracies: list[float | None], finished: bool = True) -> None:
    """Write a run of which its folder's name alone says what it was."""
    tables(sweep / name, accuracies)
    if not finished:
        (sweep / name / "summary.json").unlink()


def configured(folder: Path, accuracies: list[float | None], **changes: Any) -> Path:
    """Write a run with a config: `CONFIG` with changes, `local__epochs=2` for local.epochs."""
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = config
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    tables(folder, accuracies, first=0)
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


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


def test_an_accuracy_that_round_0_has_takes_no_rounds(tmp_path: Path) -> None:
    configured(tmp_path / "a", [0.3, 0.2, 0.9])

    (group,) = read(tmp_path)

    assert (group.rounds_to(20), group.rounds_to(50)) == (0.0, 2.0)


def test_the_table_is_best_first_and_exact(sweep: Path) -> None:
    lines = table(read(sweep)).splitlines()

    assert lines[0].endswith("rounds to 50 % | rounds to 60 % |")
    assert lines[2] == "| krum | 1 | 65.0 | 50.0 | 20.0 | 4 | 4 |"
    assert lines[3] == "| fedavg | 2 | 60.0 ± 2.8 | 50.0 ± 0.0 | 20.0 ± 0.0 | 3 | - |"


def test_the_mean_of_writers_stands_beside_the_accuracy(tmp_path: Path) -> None:
    for name, text in (("a", "2,0.5,0.25\n"), ("b", "2,0.75,0.5\n")):
        configured(tmp_path / name, [], local__epochs=name)
        (tmp_path / name / "rounds.csv").write_text("round,test_accuracy,accuracy_mean\n" + text)

    lines = table(read(tmp_path)).splitlines()

    assert lines[0].startswith("|  | seeds | accuracy | mean of writers | unseen writers |")
    assert lines[2].startswith("| local.epochs=b | 1 | 75.0 | 50.0 | - | - |")


# groups


@pytest.mark.parametrize("places", [("0", "1", "2", "3"), ("x/1", "x/y/2", "z,a=b", "1 (copy)")])
def test_groups_are_those_of_the_configs_wherever_the_runs_lie(
    tmp_path: Path, places: tuple[str, ...]
) -> None:
    for place, (rate, seed) in zip(places, [(0.1, 0), (0.1, 1), (0.3, 0), (0.3, 1)], strict=True):
        accuracies = [0.0, rate + seed / 10]
        configured(tmp_path / place, accuracies, local__learning_rate=rate, seed=seed)

    slow, fast = read(tmp_path)

    assert (slow.name, fast.name) == ("local.learning_rate=0.1", "local.learning_rate=0.3")
    assert sorted(slow.accuracy[:, -1]) == pytest.approx([10, 20])
    assert sorted(fast.accuracy[:, -1]) == pytest.approx([30, 40])


def test_several_folders_are_compared_together_and_a_run_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = configured(tmp_path / "a" / "run", [0.0, 0.5])
    second = configured(tmp_path / "b" / "deep" / "run", [0.0, 0.7], seed=1, cache="/elsewhere")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "link").symlink_to(second)
    folders = [str(first), str(tmp_path / "b"), str(tmp_path / "c"), str(tmp_path / "a")]

    assert main(folders) == 0

    out = capsys.readouterr().out
    assert "| all runs | 2 | 60.0 ± 14.1 |" in out
    assert "Not compared" not in out
    assert (first / "comparison.md").exists()


def test_a_run_that_was_made_longer_is_compared_at_the_same_round(tmp_path: Path) -> None:
    """By round, not by place: seed 1 has been evaluated in rounds 1 and 5 besides."""
    configured(tmp_path / "0", [0.0, None, 0.2, None, 0.4], rounds=4)
    configured(tmp_path / "1", [0.0, 0.9, 0.3, None, 0.5, 0.9, 0.9], rounds=6, seed=1)

    (group,) = read(tmp_path)

    assert group.rounds.tolist() == [0, 2, 4]
    assert group.accuracy.tolist() == [[0, 20, 40], [0, 30, 50]]


def test_seeds_that_were_evaluated_at_other_intervals_share_what_they_can(tmp_path: Path) -> None:
    configured(tmp_path / "0", [0.0, None, 0.2, None, 0.4, None, 0.6], evaluate__every=2)
    configured(tmp_path / "1", [0.0, None, None, 0.3, None, None, 0.7], evaluate__every=3, seed=1)

    (group,) = read(tmp_path)

    assert group.rounds.tolist() == [0, 6]
    assert group.accuracy.tolist() == [[0, 60], [0, 70]]


def test_a_sweep_over_rounds_is_told_apart(tmp_path: Path) -> None:
    for rounds in (2, 10):
        for seed in (0, 1):
            accuracies = list(np.linspace(0, rounds / 20, rounds + 1))
            configured(tmp_path / f"{rounds}{seed}", accuracies, rounds=rounds, seed=seed)

    groups = read(tmp_path)

    assert [group.name for group in groups] == ["rounds=2", "rounds=10"]
    assert [group.accuracy.shape for group in groups] == [(2, 3), (2, 11)]
    assert "| seeds | after round | accuracy |" in table(groups)


def test_a_repeated_run_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        configured(tmp_path / place, [0.0, 0.5], seed=seed)

    assert main([str(tmp_path)]) == 0

    out = capsys.readouterr().out
    assert "| all runs | 2 | 50.0 ± 0.0 |" in out
    assert "- b: it repeats a: the same config and seed" in out


def test_names_hold_what_differs_and_nothing_else(tmp_path: Path) -> None:
    prox = {"_target_": "femfed.strategies.fedprox.FedProx"}
    for place, strategy in enumerate([{**prox, "mu": 0.1}, {**prox, "mu": 1.0}, None]):
        changes = {"strategy": strategy} if strategy else {}
        configured(tmp_path / str(place), [0.0, 0.5], **changes, engine__workers=place)

    names = [group.name for group in read(tmp_path)]

    assert names == ["fedavg", "fedprox, strategy.mu=0.1", "fedprox, strategy.mu=1.0"]


def test_names_from_strangers_are_escaped(tmp_path: Path) -> None:
    paths = ["/d/a|b<script>`x`[i](u)*_", "/d/x\n| forged | 9 |\x1b[31m", "/d/" + "z" * 500]
    for place, path in enumerate(paths):
        configured(tmp_path / str(place), [0.0, 0.5], dataset__path=path)

    compare(tmp_path)

    text = (tmp_path / "comparison.md").read_text()
    assert len(text.splitlines()) == 2 + len(paths)
    assert r"dataset.path=/d/a\|b\<script\>\`x\`\\x5bi\](u)\*\_ |" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 200


# runs that are left out


def damaged(folder: Path, how: str) -> None:
    table = folder / "rounds.csv"
    if how == "missing":
        table.unlink()
    elif how == "a folder":
        table.unlink()
        table.mkdir()
    elif how == "a pipe":
        table.unlink()
        os.mkfifo(table)
    elif how == "no evaluation":
        table.write_text("round,test_accuracy\n1,\n")
    elif how == "summary":
        (folder / "summary.json").write_text("[")
    elif how == "config":
        (folder / ".hydra" / "config.yaml").write_text("{")
    elif how == "aliases":
        lines = ["a0: &a0 [x]", *(f"a{n + 1}: &a{n + 1} [{f'*a{n},' * 9}]" for n in range(30))]
        (folder / ".hydra" / "config.yaml").write_text("\n".join(lines))
    elif how == "unfinished":
        (folder / "summary.json").unlink()
        (folder / "simulate.log").write_text("noise\nerror: the run diverged\x1b\n")
    else:
        table.write_bytes(
            {
                "empty": b"",
                "binary": bytes(range(256)),
                "other columns": b"round,colour\n1,2\n",
                "a word": b"round,test_accuracy\n1,0.5\n2,half\n",
                "percent": b"round,test_accuracy\n1,50\n",
                "short": b"round,test_accuracy\n1,0.5\n2\n",
                "too long": b"round,test_accuracy\n1,0.5,7,8\n",
                "NUL": b"round,test_accuracy\n1,0.\x005\n",
                "huge": b"round,test_accuracy\n1," + b"9" * 200_000,
            }[how]
        )


DAMAGES = {
    "missing": "rounds.csv is missing",
    "a folder": "rounds.csv is no file",
    "a pipe": "rounds.csv is no file",
    "no evaluation": "rounds.csv has no evaluated round",
    "summary": "summary.json is damaged",
    "config": ".hydra/config.yaml is damaged",
    "aliases": ".hydra/config.yaml is damaged",
    "unfinished": r"it is not finished: round 4 of 4; error: the run diverged\\x1b",
    "empty": "rounds.csv is empty",
    "binary": "rounds.csv is damaged",
    "other columns": "rounds.csv has no column test_accuracy",
    "a word": "rounds.csv is damaged in line 3",
    "percent": "rounds.csv is damaged in line 2",
    "short": "rounds.csv is damaged in line 3",
    "too long": "rounds.csv is damaged in line 2",
    "NUL": "rounds.csv is damaged in line 2",
    "huge": "rounds.csv is damaged",
}


def test_a_run_that_cannot_be_compared_is_listed_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        configured(tmp_path / f"good {seed}", [0.0, 0.5], seed=seed)
    for how in DAMAGES:
        damaged(configured(tmp_path / how, [0.0, None, 0.5, None, 0.6], seed=how), how)

    assert main([str(tmp_path)]) == 0

    out = capsys.readouterr().out
    assert "| all runs | 2 | 50.0 ± 0.0 |" in out
    for how, reason in DAMAGES.items():
        assert f"\n- {how}: {reason}" in out


def test_failures_that_left_no_folder_are_listed(tmp_path: Path) -> None:
    configured(tmp_path / "good", [0.0, 0.5])

    compare(tmp_path, failed={tmp_path / "gone": "clients=0; expected at least 1\n# x"})

    text = (tmp_path / "comparison.md").read_text()
    assert "| all runs | 1 | 50.0 |" in text
    assert text.splitlines()[-1] == r"- gone: clients=0; expected at least 1\\n# x"


def test_a_sweep_goes_on_after_a_crash_and_lists_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from femfed.results import Results

    on_round = Results.on_round

    def crash(self: Results, finished: Any) -> None:
        on_round(self, finished)
        if finished.number == 1 and "crash" in crashes:
            crashes.remove("crash")
            raise ValueError("a bug\nerror: forged")

    crashes = ["crash"]
    monkeypatch.setattr(Results, "on_round", crash)
    paths = [f"cache={tmp_path}/cache", f"hydra.sweep.dir={tmp_path}/sweep"]
    paths.append("hydra.sweep.subdir=deep/${hydra.job.num}")

    code, _, err = typed(monkeypatch, "-m", *TINY, "rounds=1", "seed=0,1,2,-1", *paths)

    assert code == 2
    assert "Traceback" in err
    lines = [line for line in err.splitlines() if "forged" in line and line.startswith("error: ")]
    assert "ValueError: a bug\\nerror: forged; no finished round is lost" in lines[-1]
    text = (tmp_path / "sweep" / "comparison.md").read_text()
    assert "| all runs | 2 |" in text
    assert "- deep/0: ValueError: a bug\\\\nerror: forged; no finished round is lost" in text
    assert "- deep/3: seed=-1; expected at least 0" in text
    assert main([str(tmp_path / "sweep")]) == 0
    again = capsys.readouterr().out
    assert "- deep/0: it is not finished: round 1 of 1; error: ValueError: a bug" in again


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["file"], "file is no folder"),
        (["nowhere"], "nowhere is not there"),
        (["--all"], "unknown option --all"),
        (["empty"], "empty holds no two finished runs; expected"),
        (["one"], "one holds no two finished runs; expected"),
        (["bad"], r"bad holds no two finished runs \(run: rounds.csv is missing\); expected"),
        (["blocked"], "Is a directory"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("empty").mkdir()
    configured(Path("one/run"), [0.5])
    damaged(configured(Path("bad/run"), [0.5]), "missing")
    for seed in (0, 1):
        configured(Path("blocked") / str(seed), [0.0, 0.5], seed=seed)
    Path("blocked/comparison.md").mkdir()

    assert main(arguments) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(said, line)


def test_the_end_is_quiet_when_the_reader_has_gone(sweep: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"'{sys.executable}' -m femfed.report . | true"
    done = subprocess.run(
        command, shell=True, cwd=sweep, env=environment, capture_output=True, text=True
    )

    assert done.stderr == ""


# the picture


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


@pytest.mark.parametrize("path", ["/data/" + "long" * 12, "/data/이몽룡/🐙\t", "a b " * 10])
def test_long_titles_stay_over_their_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    for place, (rate, epochs) in enumerate([(0.1, 1), (0.01, 1), (0.1, 10), (0.01, 10)]):
        changes = {"local__learning_rate": rate, "local__epochs": epochs}
        configured(tmp_path / str(place), [0.0, 0.5], **changes, dataset__path=path + str(place))

    compare(tmp_path)

    (figure,) = drawn
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title("left")]
    boxes = [axes._left_title.get_window_extent() for axes in figure.axes]  # type: ignore[attr-defined]
    assert len(boxes) == 4
    for place, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])


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

"""The report: tables that read back exactly, plots of every odd run, lines to the letter."""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from femfed.report.events import Events
from femfed.report.files import (
    CLIENT_COLUMNS,
    ROUND_COLUMNS,
    WRITER_COLUMNS,
    Row,
    RunFiles,
    replacing,
)
from femfed.report.plots import _apart, plot_curves, plot_writers
from femfed.report.progress import Progress, _sparkline

EVALUATED = [name for name in ROUND_COLUMNS if name.startswith(("test", "accuracy", "unseen"))]


def a_round(number: int, **values: float | None) -> dict[str, float | int | str | None]:
    row: dict[str, float | int | str | None] = dict.fromkeys(ROUND_COLUMNS, 0.5)
    return {**row, "round": number, "clients": 10, "seconds_total": 2.0, **values}


def a_client(**values: float | int | str | None) -> dict[str, float | int | str | None]:
    return {**dict.fromkeys(CLIENT_COLUMNS, 1), **values}


def writers(seen: int, unseen: int, accuracy: float | None = None) -> Iterator[Row]:
    for i in range(seen + unseen):
        exact = (i % 11) / 10 if accuracy is None else accuracy
        role, client = ("seen", i) if i < seen else ("unseen", None)
        row: Row = {"writer": f"f{i:04}_00", "number": i // 100, "subject_number": i % 100}
        row = {**row, "role": role, "client": client, "examples": 1 + i % 300}
        yield {**row, "test_loss": 1.0, "test_accuracy": exact}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# files


@pytest.mark.parametrize("value", [0.1 + 0.2, 1 / 3, 1e-7, 1e22, -0.0, math.inf, math.nan])
def test_a_float_reads_back_exactly(tmp_path: Path, value: float) -> None:
    RunFiles(tmp_path).append_round(a_round(1, test_loss=value, unseen_loss=None))

    (row,) = read(tmp_path / "rounds.csv")

    assert tuple(row) == ROUND_COLUMNS
    assert repr(float(row["test_loss"])) == repr(value)
    assert (row["round"], row["unseen_loss"]) == ("1", "")


def test_a_resumed_run_appends_under_one_header(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.append_round(a_round(1))
    files.append_clients([a_client(client=3, writer='f"1,2'), a_client(client=4)])
    with (tmp_path / "clients.csv").open("a") as file:
        file.write("2,5,f00")  # killed in the middle of a line

    resumed = RunFiles(tmp_path)
    resumed.rewind(1, resumed.check(1, {}))
    resumed.append_clients([a_client(client=5)])

    rows = read(tmp_path / "clients.csv")
    assert [row["client"] for row in rows] == ["3", "4", "5"]
    assert rows[0]["writer"] == 'f"1,2'


def test_wrong_columns_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    short = a_client()
    del short["seconds"], short["bytes_up"]

    with pytest.raises(ValueError, match=r"rounds.csv has no column colour, size"):
        files.append_round({**a_round(1), "colour": 1, "size": 2})
    with pytest.raises(ValueError, match=r"a row of clients.csv lacks seconds, bytes_up"):
        files.append_clients([a_client(), short])

    assert list(tmp_path.iterdir()) == []


def test_a_table_of_an_older_version_gets_the_newer_columns(tmp_path: Path) -> None:
    names = [
        name for name in ROUND_COLUMNS if name not in ("accuracy_mean", "unseen_accuracy_mean")
    ]
    old = "".join(f"{number}{',0.5' * (len(names) - 1)}\n" for number in (1, 2, 3))
    (tmp_path / "rounds.csv").write_text(f"{','.join(names)}\n{old}")
    files = RunFiles(tmp_path)

    kept = files.rewind(2, files.check(2, {}))
    files.append_round(a_round(3, accuracy_mean=0.25))

    assert [(row["round"], row["accuracy_mean"]) for row in kept] == [(1, None), (2, None)]
    rows = read(tmp_path / "rounds.csv")
    assert [tuple(row) for row in rows] == [ROUND_COLUMNS] * 3
    assert [row["accuracy_mean"] for row in rows] == ["", "", "0.25"]
    assert [row["seconds_total"] for row in rows] == ["0.5", "0.5", "2.0"]


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rounds.csv").write_text("round,colour\n1,2\n")

    with pytest.raises(ValueError, match="round,colour; expected round,train_loss"):
        RunFiles(tmp_path).check(1, {})


def test_a_summary_is_json_whatever_its_numbers(tmp_path: Path) -> None:
    RunFiles(tmp_path).write_summary({"test_loss": math.nan, "seconds": {"total": math.inf}})

    text = (tmp_path / "summary.json").read_text()

    assert json.loads(text) == {"test_loss": None, "seconds": {"total": None}}
    assert "NaN" not in text


def test_whole_files_are_replaced_or_left(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.write_summary({"test_accuracy": 0.1 + 0.2})
    files.write_writers(writers(1, 1))

    with pytest.raises(TypeError):
        files.write_summary({"bad": object()})
    with pytest.raises(ValueError, match="lacks writer"):
        files.write_writers([*writers(1, 1), {}])
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "summary.json") as file:
        file.write(b"{")
        raise OSError("full")

    assert json.loads((tmp_path / "summary.json").read_text()) == {"test_accuracy": 0.1 + 0.2}
    rows = read(tmp_path / "writers.csv")
    assert tuple(rows[0]) == WRITER_COLUMNS
    assert [(row["role"], row["client"]) for row in rows] == [("seen", "0"), ("unseen", "")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.json", "writers.csv"]


# events


def test_events_hold_every_number_under_its_tag(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.append_round(a_round(1, unseen_loss=None, test_loss=math.nan))
    events.append_round(a_round(2, unseen_accuracy=None, test_loss=math.nan))

    (path,) = (tmp_path / "tensorboard").iterdir()
    content = path.read_bytes()
    for tag in ("accuracy/test", "accuracy/p10", "accuracy/worst_tenth", "loss/train"):
        assert content.count(tag.encode()) == 2, tag
    for tag in (
        "accuracy/mean_unseen",
        "seconds/train",
        "bytes/up",
        "cohort/clients",
        "cohort/examples",
    ):
        assert content.count(tag.encode()) == 2, tag
    assert content.count(b"accuracy/unseen") == content.count(b"loss/unseen") == 1
    assert b"loss/test" not in content


# plots


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([a_round(n) for n in range(1, 31)], id="30 rounds"),
        pytest.param([a_round(1)], id="1 round"),
        pytest.param([a_round(0, train_loss=None, train_accuracy=None)], id="none yet"),
        pytest.param(
            [a_round(n, **dict.fromkeys(EVALUATED if n % 5 else [], None)) for n in range(1, 31)],
            id="evaluation every 5 rounds",
        ),
        pytest.param([a_round(n, **dict.fromkeys(EVALUATED)) for n in (1, 2)], id="never"),
        pytest.param(
            [a_round(n, test_loss=math.nan, train_loss=math.inf) for n in (1, 2)], id="diverged"
        ),
        pytest.param([a_round(n, **dict.fromkeys(EVALUATED, 0.0)) for n in (1, 2)], id="zero"),
        pytest.param([a_round(n) for n in (1, 2, 2)], id="a round written twice"),
    ],
)
def test_curves_of_any_run(tmp_path: Path, rows: list[Row]) -> None:
    files = RunFiles(tmp_path)
    for row in rows:
        files.append_round(row)

    path = plot_curves(tmp_path, "FedAvg, SYNTHETIC glyphs, " + 10 * "many settings, $x ")

    assert path == tmp_path / "curves.png"
    assert size(path) == (1800, 750)  # 7.2 x 3 inches of 250 dots
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "rounds.csv"]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(list(writers(90, 10)), id="100"),
        pytest.param(list(writers(1, 1)), id="2"),
        pytest.param(list(writers(2, 0)), id="none unseen"),
        pytest.param(list(writers(3237, 360)), id="3,597"),
        pytest.param(list(writers(50, 5, accuracy=0.0)), id="constant 0"),
        pytest.param(list(writers(50, 5, accuracy=1.0)), id="constant 1"),
        pytest.param(list(writers(2, 0, accuracy=math.nan)), id="NaN"),
        pytest.param([], id="nobody"),
    ],
)
def test_writers_of_any_run(tmp_path: Path, rows: list[Row]) -> None:
    RunFiles(tmp_path).write_writers(rows)

    path = plot_writers(tmp_path, "FedAvg, SYNTHETIC glyphs")

    assert path == tmp_path / "writers.png"
    assert size(path) == (1800, 750)


def test_labels_move_apart() -> None:
    # 0.50 and 0.52 are a group around 0.51; a lone 0.99 stays, a pair at 1.0 is kept inside.
    assert _apart([0.1, 0.50, 0.52], gap=0.1) == pytest.approx([0.1, 0.46, 0.56])
    assert _apart([0.99], gap=0.1) == [0.99]
    assert _apart([1.0, 1.0], gap=0.1) == pytest.approx([0.85, 0.95])


def test_only_plots_import_matplotlib() -> None:
    code = "import sys, femfed.report.files, femfed.report.events, femfed.report.progress as p;"
    code += "sys.exit('matplotlib' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# progress


class Clock:
    """A clock that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_to_the_letter() -> None:
    stream, clock = StringIO(), Clock()
    row = a_round(1, test_loss=2.1134, test_accuracy=0.451, accuracy_p10=0.302, accuracy_p90=0.589)
    unevaluated = a_round(2, train_loss=1.5, **dict.fromkeys(EVALUATED))

    with Progress(30, "a title", live=False, list_clients=False, stream=stream, clock=clock) as p:
        p.status("starting 2 workers")
        p.round(a_round(0, test_loss=4.1, test_accuracy=0.01, accuracy_p10=None, clients=0), [])
        p.clients_done(5, 10)
        p.status("evaluating")  # within a round: nothing in a pipe
        clock.now = 130.0
        p.round({**row, "unseen_accuracy": 0.43, "seconds_total": 1.02}, [])
        p.message("a worker was lost")
        clock.now = 132.0
        p.round(unevaluated, [])

    # left: 29 rounds of 1.02 s = 29.58 s; then 28 of the 2 s between the first two ends.
    # clients/s: 10 / 1.02 = 9.80; 10 / 2.
    assert stream.getvalue().splitlines() == [
        "a title",
        "starting 2 workers",
        "round  0/30  loss 4.100  accuracy 1.0 %  unseen 50.0 %",
        "round  1/30  loss 2.113  accuracy 45.1 %  writers p10-p90 30.2-58.9 %  unseen 43.0 %"
        "  9.8 clients/s  0:00:30 left",
        "a worker was lost",
        "round  2/30  train loss 1.500  5.0 clients/s  0:00:56 left",
    ]


def test_clients_are_listed_as_the_homework_did() -> None:
    stream = StringIO()
    client = a_client(
        number=30, subject_number=60, examples=180, train_loss=2.25, train_accuracy=0.5
    )

    with Progress(1, "a title", live=False, list_clients=True, stream=stream) as progress:
        progress.round(a_round(1), [client, {**client, "train_loss": None}])

    assert stream.getvalue().splitlines()[2:] == [
        "number : 30, subject number : 60, examples : 180, loss : 2.250, accuracy : 50.0 %",
        "number : 30, subject number : 60, examples : 180, accuracy : 50.0 %",
    ]


def test_live_shows_the_round() -> None:
    clock = Clock()
    console = Console(file=StringIO(), force_terminal=True, width=100, color_system=None)
    progress = Progress(
        30, "a title", live=True, list_clients=False, stream=StringIO(), clock=clock
    )

    console.print(progress)  # before the first round
    clock.now = 103.0
    progress.round(a_round(3, test_accuracy=0.451, accuracy_p10=0.302, accuracy_p90=0.589), [])
    clock.now = 108.0
    progress.clients_done(7, 10)
    with console.capture() as capture:
        console.print(progress)

    lines = capture.get().splitlines()
    # 27 rounds of 2 s, of which 5 s have gone since: 49 s.
    for part in ("3/30", "clients 7/10", "45.1 %", "30.2-58.9 %", "0:00:49 left", "5.0 clients/s"):
        assert part in capture.get()
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt])
def test_live_leaves_its_last_state(
    monkeypatch: pytest.MonkeyPatch, failure: type[BaseException] | None
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = StringIO()

    try:
        with Progress(2, "a title", live=True, list_clients=True, stream=stream) as progress:
            progress.status("starting 2 workers")
            progress.round(a_round(1), [a_client(number=30, subject_number=60)])
            progress.message("a [note] :smile:")
            if failure:
                raise failure
            progress.round(a_round(2), [])
    except KeyboardInterrupt:
        pass

    shown = stream.getvalue()
    assert "number : 30, subject number : 60" in shown
    assert "a [note] :smile:" in shown
    last = shown[shown.rindex("a title") :]
    assert ("1/2" in last and "stopped" in last) if failure else ("2/2" in last and "done" in last)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = StringIO()

    with Progress(1, "a title", live=True, list_clients=False, stream=stream) as progress:
        progress.round(a_round(1), [])

    assert stream.getvalue().splitlines()[1].startswith("round 1/1  loss 0.500")


def test_a_sparkline_is_thinned_and_ends_on_the_last_value() -> None:
    assert _sparkline([], 4) == ""
    assert _sparkline([0.3], 4) == "▁"
    assert _sparkline([0.0, 0.5, 1.0], 4) == "▁▅█"  # round(3.5) is 4, the fifth block
    assert _sparkline([0, 0, 1, 1, 2, 2, 7, 7], 4) == "▁▂▃█"  # every second one

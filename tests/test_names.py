r"""Names from data: one line of harmless characters wherever they are shown."""

import csv
import io
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from femfed import one_line, printable
from femfed.report.files import CLIENT_COLUMNS, ROUND_COLUMNS, RunFiles, rows_of
from femfed.report.plots import plot_curves
from femfed.report.progress import Progress
from femfed.report.sheet import draw_sheet

HOSTILE = "f\n\x1b[31m[red]\x00\u202e\udc80error: x"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("f0027_29", "f0027_29"),
        ("이몽룡 Ångström 🐙", "이몽룡 Ångström 🐙"),
        ("a\nerror: b\r\t", r"a\nerror: b\r\t"),
        ("\x1b[31mred\x1b[0m\x07\x7f\x9b", r"\x1b[31mred\x1b[0m\x07\x7f\x9b"),
        ("a\x00b", r"a\x00b"),
        ("\u202eevil\u2066\u2028", r"\u202eevil\u2066\u2028"),
        ("\udc80", r"\udc80"),
        ("[red]a[/red] [1]", r"\x5bred]a\x5b/red] [1]"),
        ("a\\nb", r"a\\nb"),
        ("", "''"),
        (7, "7"),
    ],
)
def test_printable_name(name: object, shown: str) -> None:
    assert printable(name) == shown


@pytest.mark.parametrize("name", ["a" * 10**6, "\x1b" * 10**6, "b" * 79 + "\n", "c" * 81])
@pytest.mark.parametrize("most", [12, 80])
def test_printable_name_of_any_length_is_short(name: str, most: int) -> None:
    shown = printable(name, most)

    assert most - 14 < len(shown) <= most
    assert shown.isprintable()
    assert shown.startswith((name[0], r"\x1b"))
    assert "..." in shown


def test_printable_keeps_a_name_of_just_the_length() -> None:
    assert printable("ab" * 40) == "ab" * 40


def test_one_line_keeps_what_is_harmless() -> None:
    assert one_line("no run in 'a\\b' [red] ± 한") == "no run in 'a\\b' [red] ± 한"
    assert one_line("a\nerror: \x1b[2J\udc80") == r"a\nerror: \x1b[2J\udc80"


# tables and figures


NAMES = [
    *("=1+2", "+1", "-1", "@SUM(A1)", "'=1", "''@x", "'quoted", "\t=1", "-", "0.5", "-0.5", ""),
    *('f"1,2', "a\nb", "\x1b[31m", "[red]", "이몽룡 🐙", "a\x00b", "\u202e"),
]


def test_a_table_neutralises_formulas_and_reads_back_exactly(tmp_path: Path) -> None:
    rows = [{**dict.fromkeys(CLIENT_COLUMNS, -0.5), "round": 1, "writer": name} for name in NAMES]
    RunFiles(tmp_path).append_clients(rows)
    content = (tmp_path / "clients.csv").read_bytes()

    assert [row["writer"] for row in rows_of(content)] == NAMES
    raw = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    assert not [row for row in raw if re.match(r"[=+\-@\t\r]", row["writer"])]
    assert {row["train_loss"] for row in raw} == {"-0.5"}

    files = RunFiles(tmp_path)  # of a resumed run
    files.rewind(1, files.check(1, {}) | {"rounds.csv": b""})
    assert (tmp_path / "clients.csv").read_bytes() == content


def test_half_a_character_does_not_end_a_run(tmp_path: Path) -> None:
    RunFiles(tmp_path).append_clients([{**dict.fromkeys(CLIENT_COLUMNS, 1), "writer": "a\udc80"}])

    (row,) = rows_of((tmp_path / "clients.csv").read_bytes())
    assert row["writer"] == r"a\udc80"


def test_a_contact_sheet_of_any_names_is_drawn_without_a_warning(tmp_path: Path) -> None:
    names = [*NAMES, HOSTILE, "x" * 10**5]
    pixels = np.full((28 * len(names), 28 * 62), 128, np.uint8)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = draw_sheet(tmp_path / "a.png", f"title {HOSTILE} 한", names, pixels, "store 1")

    with Image.open(path) as image:
        assert image.size[0] < 28 * 62 + 400


def test_a_contact_sheet_replaces_none_of_another_source(tmp_path: Path) -> None:
    pixels = np.full((28, 28 * 62), 128, np.uint8)
    (tmp_path / "a-2.png").write_text("a user's own")

    drawn = [
        draw_sheet(tmp_path / "a.png", "title", ["w"], pixels, source).name
        for source in ("store 1", "store 1", "store 2", "store 2")
    ]

    assert drawn == ["a.png", "a.png", "a-3.png", "a-3.png"]
    assert (tmp_path / "a-2.png").read_text() == "a user's own"


def test_curves_with_any_title_are_drawn_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "rounds.csv").write_text(f"{','.join(ROUND_COLUMNS)}\n{'1,' * 22}1\n")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_curves(tmp_path, f"{HOSTILE} 이몽룡 🐙\t")


@pytest.mark.parametrize("live", [False, True])
def test_the_display_shows_names_and_obeys_none(
    monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()

    with Progress(1, f"title {HOSTILE}", live, list_clients=True, stream=stream) as progress:
        progress.message(f"round 1 without client 1 (writer {printable(HOSTILE)}): x")

    assert "\x1b[31m" not in stream.getvalue()
    assert "\nerror:" not in stream.getvalue()
    assert "\x00" not in stream.getvalue()
    assert r"f\n\x1b[31m\x5bred]\x00" in stream.getvalue()

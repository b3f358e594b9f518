r"""Names from data: one line of harmless characters wherever they are shown."""

import pytest

from femfed import one_line, printable

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

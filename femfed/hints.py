"""Unknown keys: which key of this command line a word of another framework stands for."""

import difflib
import functools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[1] / "conf"
CLOSE = 0.7  # how like a key the last part of a misspelt one is, of 1
MOST_SUGGESTIONS = 3


@functools.cache
def words() -> dict[str, str]:
    """Return the words of other frameworks and the keys that they stand for."""
    about: Any = OmegaConf.load(CONF / "words.yaml")
    return {word.lower(): str(key) for key, each in about["keys"].items() for word in each.split()}


@functools.cache
def remarks() -> dict[str, str]:
    """Return the words that no key stands for, and the way to their subject."""
    about: Any = OmegaConf.load(CONF / "words.yaml")
    return {word.lower(): each.remark for each in about.remarks for word in each.words.split()}


def spellings_of(key: str) -> Iterable[str]:
    """Yield an unknown key in the spelling of `words`, then its last part alone."""
    plain = re.sub(r"[\s-]+", "_", key.strip("-+~ ").lower())
    yield plain.replace(".", "_")
    yield plain.rpartition(".")[2]


def for_option(name: str) -> str:
    """Return the half sentence that leads from `--name` to a key; empty if none is known."""
    for word in spellings_of(name):
        if word in words():
            return f"keys have no dashes, {words()[word]}=VALUE"
        if word in remarks():
            return remarks()[word]
    return ""


def suggestion(key: str, known: Collection[str], elsewhere: Mapping[str, Collection[str]]) -> str:
    """Return the half sentence that leads from an unknown key to the right one; maybe empty.

    Args:
        key: as typed.
        known: the keys that this command line accepts.
        elsewhere: other keys -> the choices of their group that have them.
    """
    if key.replace("/", ".") in known:
        return f"did you mean {key.replace('/', '.')}?"
    if "/" in key:
        return ""
    group, _, last = key.rpartition(".")
    for word in spellings_of(key):
        target = words().get(word, "")
        if target in known or target == "hydra.run.dir":
            return f"did you mean {target}?"
        if target in elsewhere:
            return f"did you mean {target}, which {owners(target, elsewhere[target])}?"
        if word in remarks():
            return remarks()[word]
    same = list[str]()
    for keys in (known, elsewhere):
        ends: dict[str, list[str]] = {}
        for each in sorted(keys):
            ends.setdefault(each.rpartition(".")[2].lower(), []).append(each)
        if close := difflib.get_close_matches(last.lower(), ends, n=1, cutoff=CLOSE):
            same = ends[close[0]]
            break
    found = [each for each in same if each.rpartition(".")[0] == group] or same
    if not found or len(found) > MOST_SUGGESTIONS:
        return ""
    if found[0] in elsewhere:
        return f"did you mean {found[0]}, which {owners(found[0], elsewhere[found[0]])}?"
    return f"did you mean {' or '.join(found)}?"


def owners(key: str, choices: Collection[str]) -> str:
    """Return which choices of its group have a key: `strategy=fedprox has`."""
    verb = "has" if len(choices) == 1 else "have"
    return f"{key.split('.')[0]}={', '.join(sorted(choices))} {verb}"


def closest(name: str, options: Iterable[str]) -> str | None:
    """Return the option that a misspelt one was probably meant to be."""
    plain = {re.sub(r"\W|_", "", option).lower(): option for option in options}
    close = difflib.get_close_matches(re.sub(r"\W|_", "", name).lower(), plain, n=1, cutoff=CLOSE)
    return plain[close[0]] if close else None

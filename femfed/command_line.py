"""The command line, from the words as typed to what Hydra's grammar accepts.

Options come first, paths are quoted, and a sweep's fixed keys stay out of the names of its folders.
"""

import hashlib
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException

from femfed import UserError
from femfed.hints import for_option

# Hydra's options; --experimental-rerun is not among them: it runs code from a file.
FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc"),
)
VALUED: dict[str, tuple[str, ...]] = {  # option -> its values, if they are few
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--package": (),
    "--config-path": (),
    "--config-name": (),
    "--config-dir": (),
}
SHORT = {"-c": "--cfg", "-i": "--info", "-p": "--package"}
SHORT |= {"-cp": "--config-path", "-cn": "--config-name", "-cd": "--config-dir"}
FOLDERS = ("--config-path", "--config-dir")
NAME_BYTES = 100  # of a sweep's folder; file systems take 255
HASH_DIGITS = 8
KEY = re.compile(r"(\+\+?|~)?[a-z_$][\w$-]*([./][\w$-]+)*(@[\w.:$-]*)?", re.ASCII | re.IGNORECASE)
FUNCTION = re.compile(r"(choice|shuffle|sort|tag|glob)\(.*\)", re.DOTALL)  # of Hydra's grammar
ELEMENT = re.compile(r"""'(?:\\.|[^'\\])*'(?=,|$)|"(?:\\.|[^"\\])*"(?=,|$)|[^,]+""")


@dataclass(frozen=True)
class CommandLine:
    """A command line, taken apart.

    Attributes:
        options: Hydra's, each with its value.
        overrides: `key=value` each.
        sweep: whether it asks for a sweep.
    """

    options: tuple[tuple[str, ...], ...] = ()
    overrides: tuple[str, ...] = ()
    sweep: bool = False

    def value_of(self, option: str) -> str | None:
        """Return the last value of an option; None if it is not given."""
        found = [each[1] for each in self.options if each[0] == option and len(each) == 2]
        return found[-1] if found else None

    def has(self, *options: str) -> bool:
        """Whether one of the options is given."""
        return any(each[0] in options for each in self.options)


def parse(arguments: Sequence[str]) -> CommandLine:
    """Take a command line apart; options may stand anywhere.

    Raises:
        UserError: an option is not known or has no value, or an override is not `key=value`.
    """
    options, overrides, rest = list[tuple[str, ...]](), list[str](), list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            overrides.append(word)
            continue
        name, equals, value = word.partition("=")
        option = _option(name)
        if option in FLAGS:
            if equals:
                raise UserError(f"{word}: {name} takes no value; expected {name} alone")
            options.append((option,))
            continue
        follows = bool(rest) and not rest[0].startswith("-")
        if not equals and follows and (option != "--info" or "=" not in rest[0]):
            equals, value = "=", rest.pop(0)
        choices = VALUED[option]
        if not equals and option == "--info":
            value = "all"
        elif not equals:
            expected = " or ".join(choices) or "a value"
            raise UserError(f"{name} has no value; expected {name} with {expected}")
        if choices and value not in choices:
            raise UserError(f"{name}={value}; expected {', '.join(choices)}")
        if option in FOLDERS:
            value = expanded(name, value)
            if not Path(value).is_dir():
                raise UserError(f"{name}={value} is no folder; expected one with config groups")
        options.append((option, value))
    _check_overrides(overrides)
    multirun = re.compile(r"\+*hydra\.mode=['\"]?multirun['\"]?", re.IGNORECASE)
    sweep = any(option[0] in ("-m", "--multirun") for option in options)
    sweep = sweep or any(multirun.fullmatch(override) for override in overrides)
    return CommandLine(tuple(options), tuple(overrides), sweep)


def _option(name: str) -> str:
    """Return an option's long name; of the flags, the name as given."""
    names = [*FLAGS, *VALUED, *SHORT]
    begun = [each for each in names if name.startswith("--") and each.startswith(name)]
    if name in names or len(begun) == 1:
        full = name if name in names else begun[0]
        return SHORT.get(full, full)
    if name == "--experimental-rerun":
        raise UserError(f"{name} runs code from a file; to go on with a run, resume=DIR")
    hint = for_option(name) or "python simulate.py --help lists the keys"
    raise UserError(f"unknown option {name}; {hint}")


def _check_overrides(overrides: Sequence[str]) -> None:
    """Check that every word is `key=value`, not a part of one between spaces."""
    for index, override in enumerate(overrides):
        key, equals, value = override.partition("=")
        before = overrides[index - 1] if index else ""
        after = overrides[index + 1] if index + 1 < len(overrides) else ""
        if key.startswith("~") and not equals:
            continue
        words = [override]
        if equals and not key and before and "=" not in before:  # a = 1, a =1
            words = [before, override] + ([after] if not value else [])
        elif not equals and before.endswith("="):  # a= 1
            words = [before, override]
        elif not equals and not after.startswith("="):
            shown = override if override.strip() else repr(override)
            raise UserError(f"{shown}: there is no =; expected key=value")
        if len(words) > 1 or key != key.strip():
            joined = "".join(word.strip() for word in words).replace(" ", "")
            raise UserError(f"{' '.join(words)}: there is a space beside =; expected {joined}")


def expanded(key: str, path: str) -> str:
    """Return a path as typed, absolute, `~` replaced by the home.

    Raises:
        UserError: it is empty, or there is no such home.
    """
    if not path.strip():
        raise UserError(f"{key}= has no value; expected {key}=DIR")
    if "\0" in path:
        raise UserError(f"{key}={path!r} holds a NUL; expected {key}=DIR")
    full = os.path.expanduser(path)
    if full.startswith("~") and not Path(full).exists():
        raise UserError(f"{key}={path}: there is no such home; expected {key}=DIR")
    return str(Path(full).absolute())


def quoted(text: str) -> str:
    """Return a text that Hydra's grammar takes as it stands."""
    return QuotedString(text, Quote.single).with_quotes()


def unquoted(value: str) -> str:
    """Return the text of a value that is quoted for Hydra; any other as it stands."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        try:
            text = OverridesParser.create().parse_override(f"key={value}").value()
        except HydraException:
            return value
        return text if isinstance(text, str) else value
    return value


def paths_quoted(overrides: Sequence[str], keys: Collection[str], sweep: bool) -> list[str]:
    """Return the overrides with every path absolute and quoted.

    A comma is a part of the path. In a sweep it separates paths, unless the whole is there.

    Args:
        overrides: `key=value` each.
        keys: those whose values are paths.
        sweep: whether `key=a,b` is a sweep.

    Raises:
        UserError: a path is empty or in a home that is not there.
    """
    result = []
    for override in overrides:
        name, equals, value = override.partition("=")
        key = name.lstrip("+")
        left = not equals or key not in keys or value == "null" or "${" in value
        if left or (sweep and FUNCTION.fullmatch(value)):
            result.append(override)
            continue
        whole = expanded(key, unquoted(value))
        parts = [unquoted(part) for part in ELEMENT.findall(value)]
        if len(parts) > 1 and not key.startswith("hydra.") and not os.path.lexists(whole):
            paths = [expanded(key, part) for part in parts]
            if sweep:
                result.append(f"{name}={','.join(map(quoted, paths))}")
                continue
            if all(map(os.path.lexists, paths)):
                raise UserError(f"{override}: {len(parts)} paths; to sweep over them, add -m")
        result.append(f"{name}={quoted(whole)}")
    return result


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Return the overrides as Hydra's grammar reads them.

    Raises:
        UserError: it cannot read one.
    """
    parser, result = OverridesParser.create(), []
    for override in overrides:
        if not KEY.fullmatch(override.partition("=")[0]):
            raise UserError(f"{override}: {_cause(override)}")
        try:
            result.append(parser.parse_override(override))
        except Exception:  # Hydra's and ANTLR's, of many kinds
            raise UserError(f"{override}: {_cause(override)}") from None
        if result[-1].value_type is None and not result[-1].is_delete():
            raise UserError(f"{override}: there is no value; expected key=value")
    return result


def _cause(override: str) -> str:
    """Return why Hydra's grammar cannot read an override, and the way out."""
    key, _, value = override.partition("=")
    bare = re.sub(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", "", value)
    if not KEY.fullmatch(key):
        return f"{key or '='} is no key; expected key=value, such as clients=100"
    for opened, closed in ("[]", "()", "{}"):
        if bare.count(opened) > bare.count(closed):
            return f"{opened} is not closed; expected {closed} at its end"
        if bare.count(opened) < bare.count(closed):
            return f"{closed} has no {opened} before it"
    if any(quote in bare for quote in "'\""):
        return "a quote is not closed; expected it in pairs"
    if re.search(r"^,|,,|,$", bare):
        return "there is no value beside a comma; expected key=a,b"
    return "the value is not understood; expected a number, a word or a list, as in key=[1,2]"


def check_grammar(overrides: Sequence[str]) -> None:
    """Check that Hydra's grammar reads every override.

    Raises:
        UserError: it cannot read one.
    """
    parsed(overrides)


def swept_groups(overrides: Sequence[Override], groups: Collection[str]) -> set[str]:
    """Return the groups of which a sweep takes more than one choice."""
    return {
        each.key_or_group
        for each in overrides
        if each.is_sweep_override() and each.key_or_group in groups
    }


def _values(override: Override, groups: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Return the values that a key is swept over; None if it is not or they are endless.

    Args:
        override: of the key.
        groups: the config groups and their choices.

    Raises:
        UserError: the sweep's function takes other arguments.
    """
    if not override.is_sweep_override() or not override.is_discrete_sweep():
        return None
    value = override.value()
    if isinstance(value, Glob):
        return list(value.filter(list(groups.get(override.key_or_group, ()))))
    try:
        return [str(each) for each in override.sweep_string_iterator()]
    except (ValueError, HydraException) as error:
        raise UserError(f"{override.input_line}: {error}; expected range(FROM,TO,STEP)") from None


def for_sweep(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the overrides of a sweep, so that a key one choice lacks ends that choice's runs only.

    `hydra.job.config.override_dirname.exclude_keys` is set to the keys that are not swept, so that
    `run_name` leaves them out.

    Args:
        overrides: `key=value` each.
        groups: the config groups and their choices.

    Raises:
        UserError: an override cannot be read, has no values, or sweeps over one value twice.
    """
    read = parsed(overrides)
    for each in read:
        values = _values(each, groups)
        if values is not None and not values:
            raise UserError(f"{each.input_line} has no values; expected one or more")
        if twice := [value for value in values or () if (values or []).count(value) > 1]:
            raise UserError(f"{each.input_line} sweeps over {twice[0]} twice; expected it once")
    swept = swept_groups(read, groups)
    open_groups = set(groups) if "experiment" in swept else swept
    result = []
    for override, each in zip(overrides, read, strict=True):
        below = each.key_or_group.split(".")[0] in open_groups and "." in each.key_or_group
        plain = not override.startswith(("+", "~"))
        result.append(f"++{override}" if below and plain else override)
    own = {each.key_or_group: each for each in read if not each.is_hydra_override()}
    fixed = sorted(key for key, each in own.items() if not each.is_sweep_override())
    exclude = "hydra.job.config.override_dirname.exclude_keys"
    if any(each.key_or_group == exclude for each in read):
        return result
    return [*result, f"{exclude}=[{','.join(map(quoted, fixed))}]"]


def number_of_runs(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> int:
    """Return how many runs a sweep has.

    Args:
        overrides: `key=value` each.
        groups: the config groups and their choices.
    """
    last = {each.key_or_group: each for each in parsed(overrides)}  # of a key given twice
    return math.prod(len(_values(each, groups) or [""]) for each in last.values())


def swept_values(overrides: Sequence[str], fixed: Collection[str]) -> list[tuple[str, str]]:
    """Return the keys that a run of a sweep does not share with all others, and their values.

    Args:
        overrides: of the run.
        fixed: the keys that are not swept.
    """
    own = [each for each in parsed(overrides) if each.key_or_group not in fixed]
    pairs = []
    for each in own:
        value = each.value()
        text = value if isinstance(value, str) else str(each.input_line).partition("=")[2]
        pairs.append((each.key_or_group, text))
    return sorted(pairs)


def run_name(overrides: Sequence[str], fixed: Collection[str]) -> str:
    """Return the name of a run's folder in its sweep: the swept keys and values.

    It has at most `NAME_BYTES`; characters that a shell or a path would take apart are replaced. A
    hash of the values tells names apart that came to be the same.

    Args:
        overrides: of the run.
        fixed: the keys that are not swept.
    """
    pairs = swept_values(overrides, fixed)
    if not pairs:
        return "run"
    full = ",".join(f"{key}={value}" for key, value in pairs)
    if re.fullmatch(r"\w[\w.=,+-]*", full) and len(full.encode()) <= NAME_BYTES:
        return full
    shown = [(key, value.rstrip("/").rpartition("/")[2]) for key, value in pairs]
    digits = hashlib.sha256(full.encode(errors="surrogateescape")).hexdigest()[:HASH_DIGITS]
    for keys in ([key for key, _ in shown], [key.rpartition(".")[2] for key, _ in shown]):
        values = [re.sub(r"[^\w.,+-]+", "_", value).strip("_") for _, value in shown]
        name = ",".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        name = re.sub(r"[^\w.=,+-]+", "_", name)
        if len(name.encode()) < NAME_BYTES - HASH_DIGITS:
            break
    cut = name.encode()[: NAME_BYTES - HASH_DIGITS - 1].decode(errors="ignore")
    return f"{cut}-{digits}"

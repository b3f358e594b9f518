"""The schema of conf/: types, ranges and one line of help per key; and from a config to objects."""

import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from femfed import UserError, command_line
from femfed.command_line import CommandLine
from femfed.hints import CONF as CONF
from femfed.hints import closest, owners, suggestion

MOST = 1_000_000  # of anything that is counted: beyond, it is a slip of the keyboard
NOTHING_TYPED = CommandLine()
GROUPS = ("dataset", "model", "strategy")  # whose choices have keys of their own


def _key(
    help: str,
    low: float | None = None,
    high: float | None = None,
    below: bool = False,
    path: bool = False,
) -> Any:
    """Declare a key: its help and the range of its value.

    Args:
        help: one line.
        low: the smallest value.
        high: the largest value.
        below: whether `high` itself is excluded.
        path: whether the value is a path, which is taken as typed and kept absolute.
    """
    bounds = {"help": help, "low": low, "high": high, "below": below, "path": path}
    return field(default=MISSING, metadata=bounds)


@dataclass
class LocalConfig:
    """How a client trains."""

    epochs: int = _key("passes over a client's images each round", 1, MOST)
    batch_size: int = _key("images a step; the last short batch is trained on too", 1, MOST)
    learning_rate: float = _key("client learning rate of SGD", 0)
    momentum: float = _key("client momentum, starts at zero every round", 0, 1, below=True)
    weight_decay: float = _key("client weight decay", 0)


@dataclass
class EvaluateConfig:
    """When and on what the global model is evaluated."""

    every: int = _key("rounds between evaluations; round 0 and the last are always evaluated", 1)
    test_fraction: float = _key(
        "share of a writer's images held out, where the dataset publishes no split",
        0,
        1,
        below=True,
    )
    unseen_fraction: float = _key("share of all writers that never train", 0, 1, below=True)


@dataclass
class EngineConfig:
    """Where clients run."""

    kind: str = _key("ray (Flower's Ray-backed engine) or inline (this process)")
    workers: int | None = _key(
        "worker processes, one thread each; null is one per core, fewer under a quota", 1
    )
    bundle: int | None = _key("clients a message; null lets the workers take turns", 1)
    wire: str = _key("reference (shared files) or value (inside the Flower messages)")


@dataclass
class CheckpointConfig:
    """When a run is saved."""

    every: int = _key("rounds between checkpoints; the last two rounds are always saved", 1)


@dataclass
class Config:
    """The whole config."""

    dataset: Any = MISSING
    model: Any = MISSING
    strategy: Any = MISSING
    engine: EngineConfig = field(default_factory=EngineConfig)
    clients: int = _key("writers in the federation", 1, MOST)
    clients_per_round: int = _key("writers in a cohort", 1, MOST)
    rounds: int = _key("rounds to run", 1, MOST)
    failure_rate: float = _key(
        "probability that a drawn client does not complete a round", 0, 1, below=True
    )
    seed: int = _key("seed of everything random", 0)
    precision: str = _key("float32, or bfloat16 for the clients' activations and products")
    local: LocalConfig = field(default_factory=LocalConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    on_client_error: str = _key("stop the run, or drop the client from its round")
    stop_on_divergence: bool = _key("end a run whose loss or weights leave all bounds")
    resume: str | None = _key("folder of a run to go on with", path=True)
    list_clients: bool = _key("print every round's clients: number and subject number")
    cache: str = _key("folder of the converted datasets", path=True)


CHOICES = {
    "engine.kind": ("ray", "inline"),
    "engine.wire": ("reference", "value"),
    "precision": ("float32", "bfloat16"),
    "on_client_error": ("stop", "drop"),
}
MAY_CHANGE = (
    *("rounds", "engine", "checkpoint", "evaluate.every", "stop_on_divergence", "on_client_error"),
    *("list_clients", "dataset.path", "cache", "resume"),
)
CONFIG_BYTES = 2**18  # at most, of a run's config: femfed writes a few thousand
CONFIG_DEPTH = 32  # at most: femfed writes 4
INTERPOLATION = re.compile(r"(?<!\\)\$\{(?!oc\.select:local\.[a-z_]+,[0-9.]+\})")  # but conf/'s own


def register() -> None:
    """Make the schema known to Hydra as `schema`, `${fresh:...}` and `${run_name:...}`."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("fresh", _fresh, replace=True)
    OmegaConf.register_new_resolver("run_name", command_line.run_name, replace=True)


_fresh_folders: dict[str, str] = {}  # asked for -> made


def _fresh(path: str) -> str:
    """Make a folder that was not there: two runs of the same second are not to share one."""
    if path not in _fresh_folders:
        number, made = 1, Path(path)
        made.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                made.mkdir()
                break
            except FileExistsError:
                number += 1
                made = Path(f"{path}-{number}")
        _fresh_folders[path] = str(made)
    return _fresh_folders[path]


def path_keys() -> set[str]:
    """Return the keys whose values are paths.

    Of the schema those that say so, of the groups every key named `path`.
    """
    keys = {entry.name for entry in dataclasses.fields(Config) if entry.metadata.get("path")}
    for path in CONF.glob("*/*.yaml"):
        if re.search(r"^path:", path.read_text(encoding="utf-8"), re.MULTILINE):
            keys.add(f"{path.parent.name}.path")
    return keys | {"hydra.run.dir", "hydra.sweep.dir"}


def make_paths_absolute(cfg: DictConfig, folder: Path) -> None:
    """Make every path of a config absolute, wherever it was given, and replace `~`.

    Args:
        cfg: the config, which is changed.
        folder: that relative paths start from.

    Raises:
        UserError: a path is empty or in a home that is not there.
    """
    for key in sorted(path_keys()):
        path = OmegaConf.select(cfg, key)
        if isinstance(path, str):
            OmegaConf.update(cfg, key, str(folder / command_line.expanded(key, path)))


def groups(line: CommandLine) -> dict[str, list[str]]:
    """Return the config groups and their choices, those of a user's --config-dir as well."""
    found: dict[str, list[str]] = {}
    for top in (CONF, line.value_of("--config-dir")):
        for path in sorted(Path(top).glob("*/*.yaml")) if top else ():
            found.setdefault(path.parent.name, []).append(path.stem)
    return found


def for_hydra(line: CommandLine) -> list[str]:
    """Return a command line in the words of Hydra's grammar.

    Raises:
        UserError: an override cannot be read.
    """
    options = [word for option in line.options for word in option]
    overrides = command_line.paths_quoted(line.overrides, path_keys(), line.sweep)
    command_line.check_grammar(overrides)
    check_choices(overrides, line)
    if line.sweep:
        overrides = command_line.for_sweep(overrides, groups(line))
    return [*options, *overrides]


def check_choices(overrides: Sequence[str], line: CommandLine) -> None:
    """Check that a group is given one name, and that a key of Hydra's own is one.

    Raises:
        UserError: it is not.
    """
    options = groups(line)
    for each in command_line.parsed(overrides):
        typed, key = str(each.input_line), each.key_or_group
        if each.is_delete():
            continue
        value = each.value()
        if key in options and each.package is None:
            names = ", ".join(options[key])
            if typed.startswith("+"):
                raise UserError(f"{typed}: a choice of {key} takes no +; expected {key}=NAME")
            if value is None or isinstance(value, bool | list | dict):
                raise UserError(f"{typed}; expected {key}=NAME with one of: {names}")
        kind: Any = HydraConf
        for part in key.split(".")[1:] if key.startswith("hydra.") else ():
            if not dataclasses.is_dataclass(kind):
                break
            kinds = {entry.name: entry.type for entry in dataclasses.fields(kind)}
            if part not in kinds:
                raise UserError(f"unknown key {key}; {part} is no key of Hydra's")
            kind = kinds[part]


def runs_of(line: CommandLine) -> int:
    """Return how many runs the sweep of a command line has."""
    overrides = command_line.paths_quoted(line.overrides, path_keys(), line.sweep)
    return command_line.number_of_runs(overrides, groups(line))


@dataclass(frozen=True)
class Place:
    """The place of a run in its sweep.

    Attributes:
        number: ` (run 3 of 27)`; empty if it is no sweep's.
        values: the swept keys and their values.
    """

    number: str = ""
    values: tuple[tuple[str, str], ...] = ()

    @property
    def prefix(self) -> str:
        """What an error line of the run begins with."""
        if not self.number:
            return ""
        values = ", ".join(f"{key}={value}" for key, value in self.values)
        return f"{values}{self.number}: ".lstrip()

    def values_beside(self, *keys: str) -> str:
        """Return the swept values of all but some keys, for a title that names those."""
        return "".join(f", {key}={value}" for key, value in self.values if key not in keys)


def place_in_sweep(runs: int | None) -> Place:
    """Return the place of Hydra's current job in its sweep.

    Args:
        runs: of the sweep's command line; its sweeper may add some.
    """
    about: Any = HydraConfig.get()
    if about.mode is not RunMode.MULTIRUN:
        return Place()
    fixed = about.job.config.override_dirname.exclude_keys
    values = command_line.swept_values(about.overrides.task, fixed)
    basic = about.sweeper._target_.endswith(".BasicSweeper") and not about.sweeper.params
    total = f" of {runs}" if basic and runs is not None else ""
    return Place(f" (run {about.job.num + 1}{total})", tuple(values))


def compose(line: CommandLine | Sequence[str]) -> DictConfig:
    """Return the checked config of a command line of `simulate.py`.

    Args:
        line: taken apart, or its overrides alone.

    Raises:
        UserError: the command line is not understood, or a value is out of range.
    """
    if not isinstance(line, CommandLine):
        line = CommandLine(overrides=tuple(line))
    quoted = command_line.paths_quoted(line.overrides, path_keys(), sweep=False)
    command_line.check_grammar(quoted)
    check_choices(quoted, line)
    try:
        cfg = _compose(quoted, line)
        make_paths_absolute(cfg, Path.cwd())
        check(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        said = explain(error, line).replace("to sweep over it, add -m", "expected one value")
        raise UserError(said) from None
    return cfg


def _compose(overrides: Sequence[str], line: CommandLine) -> DictConfig:
    register()
    search = list[str]()
    if folder := line.value_of("--config-dir"):
        source = command_line.quoted(f"file://{folder}")
        search = [f"hydra.searchpath=[{source}]"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", [*overrides, *search])


def in_place(arguments: list[str]) -> list[str]:
    """Return a command line whose `resume=DIR` makes Hydra run in DIR.

    Raises:
        UserError: there is no run in DIR.
    """
    given = [argument for argument in arguments if argument.lstrip("+").startswith("resume=")]
    if not given:
        return arguments
    path = given[-1].lstrip("+").removeprefix("resume=")
    folder = Path(os.path.expanduser(path)).absolute()
    if not folder.exists():  # but quoted for Hydra
        folder = Path(os.path.expanduser(command_line.unquoted(path))).absolute()
    if not (folder / ".hydra" / "config.yaml").is_file():
        raise UserError(
            f"resume={path}: no run in {folder}; expected the folder of a run, outputs/DATE/TIME"
        )
    if {"-m", "--multirun"} & set(arguments):
        raise UserError(f"resume={path} with -m; expected one run to go on with at a time")
    if any(argument.lstrip("+").startswith("hydra.run.dir=") for argument in arguments):
        raise UserError(f"resume={path} with hydra.run.dir; expected resume=DIR alone")
    quoted = command_line.quoted(str(folder))
    found = [f"resume={quoted}", f"hydra.run.dir={quoted}"]
    for argument in arguments:
        if argument not in given:
            # A dataset's own key: only the resumed run knows which dataset it has.
            found.append("++" * argument.startswith("dataset.path=") + argument)
    return found


def resumed(
    cfg: DictConfig, choices: dict[str, Any], overrides: Sequence[str], folder: Path
) -> tuple[DictConfig, dict[str, Any]]:
    """Return the config of the run in `folder` and its choices of groups.

    What of `MAY_CHANGE` the command line gives is taken from there; `save` keeps it for the next
    time.

    Args:
        cfg: of the command line.
        choices: of the command line.
        overrides: the command line.
        folder: of the run.

    Raises:
        UserError: the command line would change what the run computes.
    """
    config, about = (folder / ".hydra" / name for name in ("config.yaml", "hydra.yaml"))
    written = _read(config, interpolations=False)
    own_choices, came_from = _choices(about)
    try:
        own: Any = OmegaConf.merge(OmegaConf.structured(Config), written)
    except OmegaConfBaseException as error:
        raise UserError(f"{config}: {explain(error)}") from None
    if missing := sorted(OmegaConf.missing_keys(own)):
        raise UserError(f"{config} lacks {missing[0]}; expected what the run wrote; put that back")
    for each in ("dataset.path", "cache"):
        path = OmegaConf.select(own, each)
        if isinstance(path, str) and path and path[0] not in "~/":  # of an earlier femfed
            OmegaConf.update(own, each, str(came_from / path))
    known: Any = OmegaConf.create(OmegaConf.to_container(own))
    for override in overrides:
        key = re.split(r"[=@]", override.lstrip("+~"))[0]
        changed = [each for each in MAY_CHANGE if f"{key}.".startswith(f"{each}.")]
        if changed:
            OmegaConf.update(own, key, OmegaConf.select(cfg, key), force_add=True)
            continue
        given = OmegaConf.select(cfg, key)
        if isinstance(given, DictConfig):  # a group, of which some keys may change
            given = given.copy()
            OmegaConf.set_struct(given, False)
            for each in MAY_CHANGE:
                if each.startswith(f"{key}."):
                    name = each.removeprefix(f"{key}.")
                    OmegaConf.update(given, name, OmegaConf.select(known, each), force_add=True)
        same = choices.get(key) == own_choices.get(key) and given == OmegaConf.select(known, key)
        if not same:
            raise UserError(
                f"{override} would change what the resumed run computes; expected no more than "
                f"{', '.join(MAY_CHANGE)}"
            )
    return own, own_choices


def _read(path: Path, interpolations: bool) -> Any:
    """Read the YAML that a run wrote: plain values in dictionaries and lists, of a small size.

    Args:
        path: of the file.
        interpolations: whether values may have some, which the caller leaves alone.

    Raises:
        UserError: it is something else. Aliases and interpolations could stand for any number of
            values, and femfed writes none.
    """
    expected = "expected what the run wrote; put that back"
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes; {expected}")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > CONFIG_DEPTH:  # the reader takes quadratic time and Python's stack
                raise UserError(f"{path} is nested too deeply; {expected}")
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path} has the alias *{event.anchor}; {expected}")
            value = getattr(event, "value", None)
            if value and not interpolations and INTERPOLATION.search(value):
                raise UserError(
                    f"{path} has the interpolation {value[:80]!r}; expected a value; put that there"
                )
        return OmegaConf.load(path)
    except UserError:
        raise
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read: {said}; {expected}") from None


def _choices(path: Path) -> tuple[dict[str, Any], Path]:
    """Return the groups that a run chose and where it was started, from its `hydra.yaml`.

    Raises:
        UserError: it names none for the strategy or the model, or something that is no name.
    """
    runtime: Any = OmegaConf.to_container(OmegaConf.create({"read": _read(path, True)}))
    for key in ("read", "hydra", "runtime"):
        runtime = runtime.get(key) if isinstance(runtime, dict) else None
    found = runtime.get("choices") if isinstance(runtime, dict) else None
    choices = {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
    for group in ("dataset", "strategy", "model"):
        name = choices.get(group)
        if not isinstance(name, str) or not re.fullmatch(r"[\w.@+/-]{1,100}", name):
            raise UserError(
                f"{path} has hydra.runtime.choices.{group}={str(name)[:50]!r}; expected the name "
                f"of a file in conf/{group}; put back what the run wrote"
            )
    return choices, Path(str(runtime.get("cwd") or Path.cwd()))


def deciding(cfg: DictConfig) -> dict[str, str]:
    """Return what of a config decides what a run computes: its keys and values as text."""
    found: dict[str, str] = {}

    def add(prefix: str, node: Any) -> None:
        if any(f"{prefix}.".startswith(f"{each}.") for each in MAY_CHANGE):
            return
        if isinstance(node, dict):
            for key, value in node.items():
                add(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            found[prefix] = str(node)

    add("", OmegaConf.to_container(cfg, resolve=True))
    return found


def save(cfg: DictConfig, folder: Path) -> None:
    """Write the config of the run in `folder`, which `resumed` reads."""
    partial = folder / ".hydra" / "config.yaml.new"
    partial.unlink(missing_ok=True)
    kept: Any = OmegaConf.to_container(cfg, resolve=True)
    kept["resume"] = None
    OmegaConf.save(kept, partial)
    partial.replace(folder / ".hydra" / "config.yaml")


def save_new(cfg: DictConfig, folder: Path) -> None:
    """Write the config of a new run, and what Hydra knows of it, as Hydra itself would.

    Hydra would do it before anybody has looked whether the folder is another run's.
    """
    (folder / ".hydra").mkdir(exist_ok=True)
    about: Any = HydraConfig.instance().cfg
    OmegaConf.save(about, folder / ".hydra" / "hydra.yaml")
    OmegaConf.save(about.hydra.overrides.task, folder / ".hydra" / "overrides.yaml")
    save(cfg, folder)  # last: a run that has one can be resumed


def check(cfg: DictConfig) -> None:
    """Check every value of the schema against its range.

    Raises:
        UserError: a value is out of range, naming the key, the value and the range.
    """
    _check(Config, cfg, "", cfg)
    for group in GROUPS:
        if OmegaConf.is_missing(cfg, group) or not isinstance(cfg[group], DictConfig):
            raise UserError(f"{group} has no value; expected {group}=NAME, as in conf/{group}")
    for key, choices in CHOICES.items():
        if (value := OmegaConf.select(cfg, key)) not in choices:
            raise UserError(f"{key}={value}; expected {' or '.join(choices)}")
    if cfg.clients_per_round > cfg.clients:
        raise UserError(
            f"clients_per_round={cfg.clients_per_round} is more than clients={cfg.clients}; "
            f"expected clients_per_round <= clients"
        )


def _check(schema: type, node: DictConfig, prefix: str, cfg: DictConfig) -> None:
    names = {entry.name for entry in dataclasses.fields(schema)}
    if lacking := sorted(names - set(map(str, node))):
        raise UserError(f"{prefix}{lacking[0]} has no value; expected {prefix}{lacking[0]}=VALUE")
    if surplus := sorted(set(map(str, node)) - names):
        raise UserError(unknown(f"{prefix}{surplus[0]}", cfg))
    for entry in dataclasses.fields(schema):
        name = f"{prefix}{entry.name}"
        if entry.name in GROUPS:
            continue
        value = node[entry.name]
        if isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
            _check(entry.type, value, f"{name}.", cfg)
        low, high = entry.metadata.get("low"), entry.metadata.get("high")
        if value is None or (low is None and high is None):
            continue
        above = low is None or value >= low
        under = high is None or (value < high if entry.metadata["below"] else value <= high)
        if not (above and under and value < float("inf")):
            limit = f"at least {low:g}"
            if high is not None:
                limit += f" and {'below' if entry.metadata['below'] else 'at most'} {high:g}"
            raise UserError(f"{name}={value}; expected {limit} ({entry.metadata['help']})")


def make(node: DictConfig, group: str) -> Any:
    """Make the frozen dataclass of femfed that a config group's `_target_` names.

    Raises:
        UserError: the target is not femfed's, or a value has the wrong type or is out of range.
    """
    target = str(node.get("_target_"))
    module, _, name = target.rpartition(".")
    try:
        if not module.startswith("femfed."):
            raise ImportError
        made = getattr(importlib.import_module(module), name)
        if not (isinstance(made, type) and dataclasses.is_dataclass(made)):
            raise ImportError
        if made.__module__ != module:  # imported there from elsewhere
            raise ImportError
        if not _is_of(made, group):
            raise ImportError
    except (ImportError, AttributeError):
        raise UserError(
            f"{group}._target_={target} is no {group}; expected a dataclass of femfed, as in "
            f"conf/{group}/*.yaml"
        ) from None
    schema = OmegaConf.structured(made)
    OmegaConf.set_readonly(schema, False)
    given = {key: value for key, value in node.items() if key != "_target_"}
    if surplus := sorted(set(map(str, given)) - set(schema)):
        raise UserError(unknown(f"{group}.{surplus[0]}", OmegaConf.create({group: node})))
    try:
        fields = OmegaConf.to_container(OmegaConf.merge(schema, given), throw_on_missing=True)
    except ValidationError as error:
        raise UserError(f"{group}.{explain(error)}") from None
    except OverflowError as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{group}: {said}; expected numbers of a sensible size") from None
    except MissingMandatoryValue as error:
        raise UserError(f"{group}.{error.full_key} has no value; expected one") from None
    assert isinstance(fields, dict)  # a dataclass's
    return made(**{str(k): tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _is_of(made: type, group: str) -> bool:
    """Whether a class is of a group: it has the base of a published one, or what a model has."""
    targets = {str(OmegaConf.load(path)._target_) for path in (CONF / group).glob("*.yaml")}
    own = f"{made.__module__}.{made.__name__}"
    if own in targets:
        return True
    if group == "model":  # a model has no base: it is whatever can be built
        return all(hasattr(made, name) for name in ("build", "parameters"))
    module, _, name = min(targets).rpartition(".")
    base = getattr(importlib.import_module(module), name).__mro__
    roots = [each for each in base[1:] if each.__module__.startswith("femfed.")]
    return (
        bool(roots)
        and issubclass(made, roots[-1])
        and made is not roots[-1]
        and (not inspect.isabstract(made))
    )


PLUGINS = {  # of Hydra: choice of a group -> the package that brings it
    "hydra/launcher": {
        "joblib": "hydra-joblib-launcher",
        "ray": "hydra-ray-launcher",
        "rq": "hydra-rq-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
    },
    "hydra/sweeper": {
        "optuna": "hydra-optuna-sweeper",
        "ax": "hydra-ax-sweeper",
        "nevergrad": "hydra-nevergrad-sweeper",
    },
    "hydra/job_logging": {"colorlog": "hydra-colorlog"},
    "hydra/hydra_logging": {"colorlog": "hydra-colorlog"},
}


def explain(error: Exception, line: CommandLine = NOTHING_TYPED) -> str:
    """Return what Hydra or OmegaConf say of a user's mistake as one line with a way out.

    Args:
        error: theirs.
        line: the command line, in whose groups unknown keys are looked for.
    """
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and cause.__cause__:
        cause = cause.__cause__
    text = str(error) or str(cause)
    key = str(getattr(cause, "full_key", None) or "")
    if in_file := re.search(r"(\w+) raised while composing config:.*?full_key: (\S+)", text, re.S):
        kind, key = in_file.groups()
        if kind in ("ConfigKeyError", "ConfigAttributeError"):
            return unknown(key, _context(line))
    if missing := re.search(r"Could not find '(hydra/[^/']+|[^/']+)/([^']*)'", text):
        offered = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return _no_choice(missing[1], missing[2], groups(line).get(missing[1], offered))
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return unknown(key, _context(line))
    if key in ("hydra.run.dir", "hydra.sweep.dir") and (refused := _os_error(cause)):
        place = Path(refused.filename or "outputs").absolute()
        return f"{place}: {refused.strerror}; give another folder, {key}=DIR"
    if isinstance(cause, OmegaConfBaseException) and key:
        return f"{key}: {str(cause).splitlines()[0]}"
    if "does not support sweep type" in text:
        return "this sweeper cannot sweep over an interval; expected key=a,b or key=range(0,5)"
    if text.startswith("Ambiguous value"):
        return f"{text.splitlines()[0]}; to sweep over it, add -m"
    said = " ".join(part.strip() for part in text.splitlines() if "https:" not in part)
    return said or f"Hydra cannot read this command line ({type(error).__name__})"


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the refusal of the system that an error of OmegaConf's came of, if one did."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _no_choice(group: str, name: str, options: Sequence[str]) -> str:
    """Return the line that says that a group has no such choice, and which there are."""
    if package := PLUGINS.get(group, {}).get(name):
        return f"{group}={name} is not installed; pip install {package}"
    hint = f"; did you mean {group}={close}?" if (close := closest(name, options)) else ""
    return f"{group}={name} is not there; expected one of: {', '.join(options)}{hint}"


def _context(line: CommandLine) -> DictConfig:
    """Return the config of a command line's groups, without the keys that may be unknown."""
    known = groups(line)
    choices = [each for each in line.overrides if each.partition("=")[0] in known]
    for tried in (choices, []):
        try:
            return _compose(tried, line)
        except (HydraException, OmegaConfBaseException, ValueError):  # a ValueError within a job
            continue
    return OmegaConf.create()


def unknown(key: str, cfg: DictConfig) -> str:
    """Return the line that says that there is no such key, and which was probably meant.

    Args:
        key: as typed.
        cfg: a config with the groups that the command line chooses.
    """
    parent, _, last = key.rpartition(".")
    known = set(_keys(Config, ""))
    elsewhere: dict[str, list[str]] = {}
    chosen = ""
    for group in GROUPS:
        node = cfg.get(group)
        if not isinstance(node, DictConfig):
            continue
        known |= {f"{group}.{name!s}" for name in node}
        alike = list[str]()
        for path in sorted((CONF / group).glob("*.yaml")):
            other: Any = OmegaConf.load(path)
            if other.get("_target_") == node.get("_target_"):
                alike.append(path.stem)
            for name in other:
                elsewhere.setdefault(f"{group}.{name!s}", []).append(path.stem)
        if key.startswith(f"{group}."):
            chosen = f"{group}={alike[0]}" if len(alike) == 1 else f"this {group}"
    known.add("experiment")
    known = {name for name in known if not name.endswith("_target_")} - {key}
    elsewhere = {name: choices for name, choices in elsewhere.items() if name not in known}
    if key in elsewhere:
        return f"{chosen} has no {last}; {owners(key, elsewhere[key])}"
    if parent.count(".") == 1 and isinstance(OmegaConf.select(cfg, parent), DictConfig):
        return f"unknown key {key}; to add it, write +{key}=VALUE"
    hint = suggestion(key, known, elsewhere) or "python simulate.py --help lists the keys"
    return f"unknown key {key}; {hint}"


def _keys(schema: type, prefix: str) -> list[str]:
    keys = []
    for entry in dataclasses.fields(schema):
        keys.append(prefix + entry.name)
        if isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
            keys += _keys(entry.type, f"{prefix}{entry.name}.")
    return keys

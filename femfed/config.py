"""The schema of conf/: types, ranges and one line of help per key; and from a config to objects."""

import dataclasses
import difflib
import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from femfed import UserError

MOST = 1_000_000  # of anything that is counted: beyond, it is a slip of the keyboard
CONF = Path(__file__).resolve().parents[1] / "conf"


def _key(
    help: str, low: float | None = None, high: float | None = None, below: bool = False
) -> Any:
    """Declare a key: its help and the range of its value (`below`: high itself is excluded)."""
    bounds = {"help": help, "low": low, "high": high, "below": below}
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
    workers: int | None = _key("worker processes, one thread each; null is one per core", 1)
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
    resume: str | None = _key("folder of a run to go on with")
    list_clients: bool = _key("print every round's clients: number and subject number")
    cache: str = _key("folder of the converted datasets")


CHOICES = {
    "engine.kind": ("ray", "inline"),
    "engine.wire": ("reference", "value"),
    "precision": ("float32", "bfloat16"),
    "on_client_error": ("stop", "drop"),
}
MAY_CHANGE = ("rounds", "engine", "checkpoint", "list_clients", "cache", "resume")


def register() -> None:
    """Make the schema known to Hydra as `schema`, and `${fresh:...}`."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("fresh", _fresh, replace=True)


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


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the checked config of a command line of `simulate.py`.

    Raises:
        UserError: the command line is not understood, or a value is out of range.
    """
    register()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("config", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from None
    check(cfg)
    return cfg


def in_place(arguments: list[str]) -> list[str]:
    """Return a command line whose `resume=DIR` makes Hydra run in DIR.

    Raises:
        UserError: there is no run in DIR.
    """
    given = [argument for argument in arguments if argument.lstrip("+").startswith("resume=")]
    if not given:
        return arguments
    path = given[-1].lstrip("+").removeprefix("resume=").strip("'\"")
    folder = Path(os.path.expanduser(path)).absolute()
    if not (folder / ".hydra" / "config.yaml").is_file():
        raise UserError(
            f"resume={path}: no run in {folder}; expected the folder of a run, outputs/DATE/TIME"
        )
    if {"-m", "--multirun"} & set(arguments):
        raise UserError(f"resume={path} with -m; expected one run to go on with at a time")
    quoted = "'" + str(folder).replace("\\", "\\\\").replace("'", "\\'") + "'"
    others = [argument for argument in arguments if argument not in given]
    return [*others, f"resume={quoted}", f"hydra.run.dir={quoted}"]


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
    own: Any = OmegaConf.merge(
        OmegaConf.structured(Config), OmegaConf.load(folder / ".hydra" / "config.yaml")
    )
    about: Any = OmegaConf.load(folder / ".hydra" / "hydra.yaml")
    own_choices = dict(about.hydra.runtime.choices)
    for override in overrides:
        key = re.split(r"[=@]", override.lstrip("+~"))[0]
        if key.split(".")[0] in MAY_CHANGE:
            OmegaConf.update(own, key, OmegaConf.select(cfg, key))
        elif choices.get(key) != own_choices.get(key) or (
            OmegaConf.select(cfg, key) != OmegaConf.select(own, key)
        ):
            raise UserError(
                f"{override} would change what the resumed run computes; expected no more than "
                f"{', '.join(MAY_CHANGE)}"
            )
    return own, own_choices


def save(cfg: DictConfig, folder: Path) -> None:
    """Write the config of the run in `folder`, which `resumed` reads."""
    partial = folder / ".hydra" / "config.yaml.new"
    OmegaConf.save(OmegaConf.merge(cfg, {"resume": None}), partial)
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
    if surplus := sorted(set(map(str, cfg)) - set(_keys(Config, ""))):
        raise UserError(unknown(surplus[0]))
    _check(Config, cfg, "")
    for key, choices in CHOICES.items():
        if (value := OmegaConf.select(cfg, key)) not in choices:
            raise UserError(f"{key}={value}; expected {' or '.join(choices)}")
    if os.path.expanduser(cfg.cache).startswith("~"):
        raise UserError(f"cache={cfg.cache}: there is no such home; expected cache=DIR")
    if cfg.clients_per_round > cfg.clients:
        raise UserError(
            f"clients_per_round={cfg.clients_per_round} is more than clients={cfg.clients}; "
            f"expected clients_per_round <= clients"
        )


def _check(schema: type, node: DictConfig, prefix: str) -> None:
    for entry in dataclasses.fields(schema):
        name = f"{prefix}{entry.name}"
        value = node[entry.name]
        if isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
            _check(entry.type, value, f"{name}.")
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
    except (ImportError, AttributeError):
        raise UserError(
            f"{group}._target_={target}; expected a dataclass of femfed, as in conf/{group}/*.yaml"
        ) from None
    schema = OmegaConf.structured(made)
    OmegaConf.set_readonly(schema, False)
    given = {key: value for key, value in node.items() if key != "_target_"}
    if surplus := sorted(set(map(str, given)) - set(schema)):
        raise UserError(unknown(f"{group}.{surplus[0]}"))
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


def explain(error: Exception) -> str:
    """Return what Hydra or OmegaConf say of a user's mistake as one line with a way out."""
    cause = error.__cause__ or error
    key = str(getattr(cause, "full_key", None) or "")
    text = str(error) or str(cause)
    if missing := re.search(r"Could not find '([\w/]+)/(\w+)'", text):
        group, name = missing.groups()
        options = ", ".join(path.stem for path in sorted((CONF / group).glob("*.yaml")))
        return f"{group}={name} is not there; expected one of: {options}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return unknown(key)
    if isinstance(cause, ValidationError):
        return f"{key}: {str(cause).splitlines()[0]}"
    if text.startswith("Ambiguous value"):
        return f"{text.splitlines()[0]}; to sweep over it, add -m"
    return " ".join(line.strip() for line in text.splitlines() if "https:" not in line)


def unknown(key: str) -> str:
    """Return the line that says that there is no such key, and which was probably meant."""
    known = _keys(Config, "")
    known += [f"dataset.{name!s}" for name in OmegaConf.load(CONF / "config.yaml").dataset]
    for path in CONF.glob("*/*.yaml"):
        known += [f"{path.parent.name}.{name!s}" for name in OmegaConf.load(path)]
    for path in CONF.glob("*/*.yaml"):
        for name, value in OmegaConf.load(path).items():
            if isinstance(value, DictConfig) and key.startswith(f"{path.parent.name}.{name!s}."):
                return f"unknown key {key}; to add it, write +{key}=VALUE"
    close = difflib.get_close_matches(key, sorted(set(known)), n=1)
    hint = f"did you mean {close[0]}?" if close else "python simulate.py --help lists the keys"
    return f"unknown key {key}; {hint}"


def _keys(schema: type, prefix: str) -> list[str]:
    keys = []
    for entry in dataclasses.fields(schema):
        keys.append(prefix + entry.name)
        if isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
            keys += _keys(entry.type, f"{prefix}{entry.name}.")
    return keys

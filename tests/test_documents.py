"""What the documents say is so: every command composes, both READMEs say the same."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from femfed import config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
EXPERIMENTS = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
COMMAND = re.compile(r"^[ #`|]*(?:.*`)?python simulate\.py ((?:[^`#\n(]|\(\*\))*)", re.MULTILINE)


def commands(path: Path) -> list[str]:
    """Return the arguments of every `python simulate.py` in a document, `...` left out."""
    found = [match.strip() for match in COMMAND.findall(path.read_text())]
    return [command for command in found if command and "..." not in command]


def of_a_run(command: str) -> bool:
    """Whether it is about a run that only its user has."""
    return "resume=" in command


ALL = sorted({c for path in [*DOCUMENTS, *EXPERIMENTS] for c in commands(path) if not of_a_run(c)})


@pytest.mark.parametrize("command", ALL)
def test_a_command_of_the_documents_composes(command: str) -> None:
    arguments = [part for part in shlex.split(command) if part not in ("-m", "--help")]
    first = [part.replace("glob(*)", "fedavg") for part in arguments]
    swept = [re.sub(r"=([^,=]*),.*", r"=\1", part) for part in first]
    done = subprocess.run(
        [sys.executable, "simulate.py", *swept, "--cfg", "job"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_there_are_commands_to_test() -> None:
    assert len(ALL) > 8
    assert "strategy=fedprox clients=100" in ALL


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_begins_with_its_command_and_runs(path: Path, tmp_path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert second.startswith(f"# python simulate.py experiment={path.stem} ")
    tiny = ["clients=4", "clients_per_round=2", "rounds=1", "local.epochs=1", "dataset.writers=5"]
    tiny += ["dataset.fraction=1", "dataset.min_images=0"]
    paths = [f"cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run", "engine=inline"]
    done = subprocess.run(
        [sys.executable, "simulate.py", f"experiment={path.stem}", *tiny, *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# What the authors' scripts set; the links stand in the files.
PUBLISHED = {
    "adaptive_fedavg": {
        "clients": 3400, "clients_per_round": 10, "rounds": 1500, "local.epochs": 1,
        "local.batch_size": 20, "local.learning_rate": 0.1, "local.momentum": 0,
        "evaluate.unseen_fraction": 0, "dataset.fraction": 1, "model.invert": False,
        "model.dropout": 0.25, "strategy._target_": "femfed.strategies.fedavg.FedAvg",
    },
    "fedjax": {
        "clients": 3400, "clients_per_round": 10, "rounds": 1000, "local.epochs": 1,
        "local.batch_size": 10, "local.learning_rate": 0.1, "local.momentum": 0,
        "evaluate.unseen_fraction": 0, "dataset.fraction": 1, "model.invert": False,
        "model.dropout": 0.25, "strategy._target_": "femfed.strategies.fedavg.FedAvg",
    },
    "leaf_paper": {
        "clients_per_round": 3, "rounds": 2000, "local.epochs": 1, "local.batch_size": 10,
        "local.learning_rate": 0.004, "local.momentum": 0, "evaluate.every": 20,
        "evaluate.unseen_fraction": 0, "dataset.fraction": 0.05, "dataset.min_images": 100,
        "model.invert": False, "model.units": 2048,
        "strategy._target_": "femfed.strategies.fedavg.FedAvg",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_experiment_has_the_settings_of_the_authors_script(name: str) -> None:
    cfg = config.compose([f"experiment={name}"])
    assert {key: OmegaConf.select(cfg, key) for key in PUBLISHED[name]} == PUBLISHED[name]
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    assert re.search(r"https://github\.com/\S+/blob/[0-9a-f]{40}/", text)


def test_both_readmes_give_the_same_commands_and_keys() -> None:
    english, korean = (ROOT / name for name in ("README.md", "README.ko.md"))
    assert commands(english) == commands(korean)
    keys = re.compile(r"^\| `([^`]+)`", re.MULTILINE)
    assert keys.findall(english.read_text()) == keys.findall(korean.read_text())


def test_every_benchmark_named_is_there() -> None:
    named = {n for path in DOCUMENTS for n in re.findall(r"-m (benchmarks\.\w+)", path.read_text())}
    assert named
    for name in named:
        assert importlib.util.find_spec(name), name


def test_every_link_leads_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path}: {target}"

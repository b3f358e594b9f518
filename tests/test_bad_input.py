"""Every mistake a user can make at the command line: one clear line, exit code 2, nothing left."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import simulate

SHARD = {
    "users": ["f0001_00", "f0002_01"],
    "num_samples": [2, 1],
    "user_data": {
        "f0001_00": {"x": [[1.0] * 784, [0.5] * 784], "y": [0, 61]},
        "f0002_01": {"x": [[0.0] * 784], "y": [7]},
    },
}


def broken(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Return a function that writes a shard with one thing wrong."""

    def write(path: Path) -> None:
        shard = json.loads(json.dumps(SHARD))
        change(shard)
        path.write_text(json.dumps(shard))

    return write


def person(shard: dict) -> dict:
    return shard["user_data"]["f0001_00"]


COMMANDS = {
    "roundz=3": ["unknown key roundz", "did you mean rounds?"],
    "local.learning_rat=1": ["unknown key local.learning_rat", "local.learning_rate?"],
    "strategy.proximal=1": ["unknown key strategy.proximal", "strategy.proximal_mu?"],
    "+colour=red": ["unknown key colour"],
    "+strategy.colour=red": ["unknown key strategy.colour"],
    "strategy=flower strategy.rule.num_malicious_nodes=1": ["+strategy.rule.num_malicious_nodes="],
    "strategy=flower strategy.rule._target_=os.system": ["os.system", "flwr.serverapp.strategy"],
    "dataset.partition=random": ["dataset.partition=random", "dirichlet"],
    "dataset.partitoin=iid": ["did you mean dataset.partition?"],
    "dataset.classes=vowels": ["dataset.classes=vowels", "a-j"],
    "dataset.fraction=0": ["dataset.fraction=0.0", "above 0"],
    "dataset=tff": ["dataset.path"],
    "dataset=fedscale": ["dataset.path"],
    "dataset=qmnist": ["dataset.path"],
    "dataset=femnist dataset.path=/nowhere": ["/nowhere"],
    "failure_rate=1": ["failure_rate=1", "below 1"],
    "strategy=fedpro": ["strategy=fedpro", "fedavg", "fedprox"],
    "model=resnet": ["model=resnet", "leaf_cnn"],
    "dataset=mnist": ["dataset=mnist", "glyphs", "leaf"],
    "rounds=0": ["rounds=0", "at least 1"],
    "rounds=-1": ["rounds=-1", "at least 1"],
    "model=null": ["Config group override must be a string"],
    "seed=${nowhere}": ["nowhere"],
    "local.batch_size=1000000000000": ["local.batch_size", "at most"],
    "strategy=fedprox strategy.proximal_mu=" + 400 * "9": ["strategy"],
    "rounds=many": ["rounds", "many", "Integer"],
    "rounds=2.5": ["rounds", "2.5"],
    "rounds=null": ["rounds"],
    "rounds": ["rounds"],
    "seed=-1": ["seed=-1", "at least 0"],
    "clients=0": ["clients=0", "at least 1"],
    "clients_per_round=0": ["clients_per_round=0", "at least 1"],
    "clients_per_round=101": ["clients_per_round=101", "clients=100"],
    "local.learning_rate=-0.1": ["local.learning_rate=-0.1", "at least 0"],
    "local.learning_rate=nan": ["local.learning_rate=nan"],
    "local.learning_rate=inf": ["local.learning_rate=inf"],
    "local.momentum=1": ["local.momentum=1.0", "below 1"],
    "local.weight_decay=-1": ["local.weight_decay=-1"],
    "local.epochs=0": ["local.epochs=0", "at least 1"],
    "local.batch_size=0": ["local.batch_size=0", "at least 1"],
    "local=fast": ["local"],
    "evaluate.every=0": ["evaluate.every=0", "at least 1"],
    "evaluate.test_fraction=1": ["evaluate.test_fraction=1.0", "below 1"],
    "evaluate.unseen_fraction=1.5": ["evaluate.unseen_fraction=1.5"],
    "checkpoint.every=0": ["checkpoint.every=0"],
    "engine.workers=0": ["engine.workers=0", "at least 1"],
    "engine.bundle=0": ["engine.bundle=0", "at least 1"],
    "engine.kind=cloud": ["engine.kind=cloud", "ray or inline"],
    "precision=float16": ["precision=float16", "float32 or bfloat16"],
    "precision=bfloat16 model=2nn": ["precision=bfloat16", "dense layers only", "float32"],
    "engine.wire=post": ["engine.wire=post", "reference or value"],
    "model.dropout=1": ["model.dropout=1", "0 <= rate < 1"],
    "model.dropout=lots": ["model.dropout", "lots"],
    "model._target_=os.system": ["model._target_=os.system", "femfed"],
    "strategy=fedavg,fedprox": ["strategy", "-m"],
    "strategy=fedprox strategy.proximal_mu=-1": ["strategy.proximal_mu=-1", "at least 0"],
    "strategy=fedprox strategy.proximal_mu=nan": ["strategy.proximal_mu=nan"],
    "dataset.writers=50": ["clients=100", "50 writers"],
    "dataset=leaf": ["dataset.path"],
    "dataset=leaf dataset.path=/nowhere/at/all": ["/nowhere/at/all"],
}

SHARDS = {
    "cut off": (lambda path: path.write_text(json.dumps(SHARD)[:9000]), ["byte"]),
    "not JSON": (lambda path: path.write_text("users: none"), ["byte 0"]),
    "empty file": (lambda path: path.write_text(""), ["cut off after 0 bytes"]),
    "no users": (broken(lambda s: s.pop("users")), ["users"]),
    "label 62": (broken(lambda s: person(s).update(y=[0, 62])), ["f0001_00", "62", "61"]),
    "label -1": (broken(lambda s: person(s).update(y=[-1, 3])), ["f0001_00", "-1"]),
    "783 pixels": (broken(lambda s: person(s)["x"][1].pop()), ["f0001_00", "783", "784"]),
    "pixel 255": (broken(lambda s: person(s)["x"][1].__setitem__(5, 255.0)), ["f0001_00", "255"]),
    "one label short": (broken(lambda s: person(s)["y"].pop()), ["f0001_00"]),
    "nobody": (
        lambda p: p.write_text('{"users": [], "num_samples": [], "user_data": {}}'),
        ["no images"],
    ),
}


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    """Type the command in this process; return its one line of error."""
    paths = [f"cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", ["simulate.py", *overrides, *paths])
    monkeypatch.setattr(simulate, "exit_codes", [])
    monkeypatch.setattr(simulate, "composed", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # pytest holds the descriptors
    stderr = io.StringIO()
    with pytest.raises(SystemExit) as exit, contextlib.redirect_stderr(stderr):
        simulate.main()
    assert exit.value.code == 2, stderr.getvalue()
    (line,) = stderr.getvalue().splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "run").exists()
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_that_cannot_be_meant(command, tmp_path, monkeypatch) -> None:
    line = refused(tmp_path, monkeypatch, *command.split())
    for part in COMMANDS[command]:
        assert part in line


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_that_is_not_femnist(name, tmp_path, monkeypatch) -> None:
    write, parts = SHARDS[name]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "all_data_0.json")
    overrides = [
        "dataset=leaf",
        f"dataset.path={tmp_path}/data",
        "clients=2",
        "clients_per_round=1",
    ]
    line = refused(tmp_path, monkeypatch, *overrides)
    for part in parts:
        assert part in line
    assert list((tmp_path / "cache").iterdir()) == []

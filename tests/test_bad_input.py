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
from femfed.data.__main__ import main as describe

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
    "strategy.proximal=1": ["unknown key strategy.proximal", "proximal_mu, which strategy=fedprox"],
    "strategy=fedprox strategy.proximal=1": ["did you mean strategy.proximal_mu?"],
    "strategy.proximal_mu=1": ["strategy=fedavg has no proximal_mu; strategy=fedprox has"],
    "dataset.path=/tmp": ["dataset=glyphs has no path", "leaf"],
    "+evaluate.evry=1": ["unknown key evaluate.evry; did you mean evaluate.every?"],
    "++evaluate.fraction=0.1": ["unknown key evaluate.fraction"],
    "+checkpoint.keep=5": ["unknown key checkpoint.keep"],
    "+engine.gpus=1": ["unknown key engine.gpus", "engine.workers=N"],
    "+local.optimizer=adam": ["unknown key local.optimizer", "SGD"],
    "+dataset.foo=1": ["unknown key dataset.foo"],
    "++model.foo=1": ["unknown key model.foo"],
    "+local.deep.er=1": ["unknown key local.deep"],
    "local.lr=0.1": ["did you mean local.learning_rate?"],
    "--lr 0.1": ["unknown option --lr", "local.learning_rate=VALUE"],
    "--num-clients-per-round=3": ["clients_per_round=VALUE"],
    "--foo": ["unknown option --foo", "--help"],
    "-x": ["unknown option -x"],
    "--experimental-rerun x": ["--experimental-rerun", "resume=DIR"],
    "--config-dir /nowhere": ["--config-dir=/nowhere is no folder"],
    "--cfg nothing": ["--cfg=nothing; expected job, hydra, all"],
    "--multirun=yes": ["--multirun takes no value"],
    "clients = 10": ["space beside =", "clients=10"],
    "clients =10": ["space beside =", "clients=10"],
    "clients= 10": ["space beside =", "clients=10"],
    "strategy=fedprox strategy.mu=1": ["did you mean strategy.proximal_mu?"],
    "strategy.mu=1": ["strategy.proximal_mu, which strategy=fedprox has"],
    "server_lr=1": ["strategy.server_learning_rate, which strategy=fedadagrad, fedadam"],
    "strategy=FedProx": ["did you mean strategy=fedprox?"],
    "dataset.classes=[a,b": ["dataset.classes=[a,b: [ is not closed"],
    "dataset.classes='a": ["a quote is not closed"],
    "dataset.classes=a)": [") has no ( before it"],
    "cache=": ["cache= has no value", "cache=DIR"],
    "dataset=leaf dataset.path=~nobody-of-that-name/d": ["there is no such home"],
    "hydra/launcher=joblib": ["hydra/launcher=joblib", "pip install hydra-joblib-launcher"],
    "hydra/sweeper=optuna": ["pip install hydra-optuna-sweeper"],
    "-m hydra/launcher=joblib seed=0,1": ["pip install hydra-joblib-launcher"],
    "-m seed=0,0": ["seed=0,0 sweeps over 0 twice"],
    "-m rounds=1,many": ["rounds", "many", "Integer"],
    "-m strategy=fedavg,fedpro": ["strategy=fedpro is not there", "strategy=fedprox?"],
    "=10": ["= is no key"],
    "-m seed=interval(0,1)": ["sweep over an interval", "range(0,5)"],
    "dataset._target_=femfed.strategies.fedavg.FedAvg": ["is no dataset; expected"],
    "strategy._target_=femfed.strategies.base.Strategy": ["is no strategy; expected"],
    "model._target_=femfed.data.leaf.Leaf": ["is no model; expected"],
    "dataset._target_=femfed.data.source.Dataset": ["is no dataset; expected"],
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
    "model=null": ["model=null; expected model=NAME with one of: 2nn, cnn"],
    "strategy=[fedavg]": ["expected strategy=NAME with one of: bulyan"],
    "+strategy=fedprox": ["takes no +; expected strategy=NAME"],
    "experiment=null": ["expected experiment=NAME"],
    "~clients": ["clients has no value"],
    "~local": ["local has no value"],
    "~strategy": ["strategy has no value; expected strategy=NAME"],
    "+dataset.path=3": ["dataset=glyphs has no path"],
    "+hydra.nope=1": ["unknown key hydra.nope"],
    "+hydra.job.nope=1": ["unknown key hydra.job.nope"],
    "evaluate/every=2": ["did you mean evaluate.every?"],
    "strategy=/etc/passwd": ["strategy=/etc/passwd is not there; expected one of: bulyan"],
    "hydra/launcher=nope": ["expected one of: basic"],
    "evaluate..every=2": ["evaluate..every is no key"],
    "클라이언트=3": ["클라이언트 is no key"],
    "clients==3": ["the value is not understood"],
    "seed=${seed}": ["seed: Recursive interpolation detected"],
    "-m seed=range(0,0)": ["seed=range(0,0) has no values"],
    "-m seed=range(0,1,0)": ["seed=range(0,1,0): range() arg 3"],
    "-m strategy=glob(nope*)": ["has no values"],
    "-m seed=0,1 hydra.sweep.dir=/dev/null/x": ["/dev/null/x", "give another hydra.sweep.dir"],
    "-m hydra.sweeper.max_batch_size=0 seed=1,2": ["AssertionError"],
    "-m seed=0,,1": ["there is no value beside a comma"],
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

# Words of other frameworks -> the key or the remark that they lead to.
WORDS = {
    "lr": "local.learning_rate",
    "fraction_fit": "clients_per_round=N",
    "C": "clients_per_round=N",
    "num_clients": "mean clients?",
    "num_rounds": "mean rounds?",
    "num-server-rounds": "mean rounds?",
    "min_fit_clients": "mean clients_per_round?",
    "clients_per_training_round": "mean clients_per_round?",
    "optimizer": "SGD",
    "epochs": "mean local.epochs?",
    "E": "mean local.epochs?",
    "batch_size": "mean local.batch_size?",
    "B": "mean local.batch_size?",
    "lr_decay": "the same in every round",
    "algorithm": "mean strategy?",
    "mu": "strategy.proximal_mu, which strategy=fedprox has",
    "momentum": "mean local.momentum?",
    "every": "mean checkpoint.every or evaluate.every?",
    "data_dir": "dataset.path, which dataset=fedscale",
    "output_dir": "mean hydra.run.dir?",
    "gpu": "engine.workers=N",
}
PATHS = (
    "/data/run=3", "/data/femnist (1)", "/home/학생/데이터", "/home/müller/d", "/data/a#1",
    "/data/R&D", "/data/kim's", '/data/"x"', "/data/{x}", "/data/a,b", "/data/[1]",
    "/data/a: b", "/data/$x", "/data/back\\slash", "/data/end\\", "/data/100%", "/data/@!;*?",
    "/data/ end ",
)  # fmt: skip

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


def test_words_of_other_frameworks_lead_to_ours(tmp_path, monkeypatch) -> None:
    for word, part in WORDS.items():
        line = refused(tmp_path, monkeypatch, f"{word}=1")
        assert f"unknown key {word}" in line
        assert part in line


def test_a_path_is_taken_as_typed(tmp_path, monkeypatch) -> None:
    for path in PATHS:
        line = refused(tmp_path, monkeypatch, "dataset=leaf", f"dataset.path={path}")
        assert f"dataset.path={path} does not exist" in line


def test_a_path_may_be_quoted_for_hydra_and_begin_with_the_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere/of/mine")
    for typed in ("~/leaf", "'~/leaf'", '"~/leaf"'):
        line = refused(tmp_path, monkeypatch, "dataset=leaf", f"dataset.path={typed}")
        assert "dataset.path=/nowhere/of/mine/leaf does not exist" in line


DESCRIBED = {  # by python -m femfed.data
    "-m seed=0": "-m: one dataset is described",
    "--foo": "unknown option --foo",
    "--config-dir /nowhere": "--config-dir=/nowhere is no folder",
    "seed=0,1": "expected one value",
    "dataset.classes=[a,b": "[ is not closed",
    "strategy.proximal_mu=1": "strategy=fedavg has no proximal_mu",
    "dataset=leaf dataset.path=/data/run=3": "dataset.path=/data/run=3 does not exist",
    "evaluate.unseen_fraction=${nope}": "evaluate.unseen_fraction",
    "~clients": "clients has no value",
}


@pytest.mark.parametrize("command", DESCRIBED)
def test_a_dataset_that_cannot_be_described(command, tmp_path, capsys) -> None:
    assert describe([*command.split(), f"cache={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert DESCRIBED[command] in line


def test_a_users_config_dir_may_stand_anywhere_and_is_checked(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    yaml = tmp_path / "mine" / "experiment" / "mine.yaml"
    yaml.write_text("# @package _global_\nlocal:\n  optimizer: adam\n")
    for command in (
        ["experiment=mine", "--config-dir", f"{tmp_path}/mine"],
        ["--config-dir", f"{tmp_path}/mine", "experiment=mine"],
        [f"--config-dir={tmp_path}/mine", "experiment=mine"],
    ):
        assert "unknown key local.optimizer" in refused(tmp_path, monkeypatch, *command)
    line = refused(tmp_path, monkeypatch, "experiment=mien", "--config-dir", f"{tmp_path}/mine")
    assert "homework" in line
    assert "did you mean experiment=mine?" in line


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

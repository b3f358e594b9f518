"""Sweeps as a user types them: their folders, their titles, and what one failing run leaves."""

import json
import sys
from pathlib import Path

import pytest

from tests.test_resume import typed

TINY = ["clients=4", "clients_per_round=2", "rounds=1", "model=logistic", "engine=inline"]
TINY += ["dataset.writers=5", "evaluate.unseen_fraction=0.2"]
MOST_BYTES = 100


def swept(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str
) -> tuple[int, str, str, set[str]]:
    """Type a sweep in this process; return exit code, stdout, stderr and the runs' folders."""
    paths = [f"cache={folder}/cache", f"hydra.sweep.dir={folder}/sweep"]
    if any(argument.startswith("hydra.sweep.dir=") for argument in arguments):
        paths = paths[:1]
    code, out, err = typed(monkeypatch, "-m", *TINY, *paths, *arguments)
    runs = {str(path.parent.relative_to(folder)) for path in folder.rglob("summary.json")}
    return code, out, err, runs


def test_only_the_runs_that_lack_a_key_fail_and_say_which_they_are(tmp_path, monkeypatch) -> None:
    strategies = "strategy=fedavg,fedprox"
    code, out, err, runs = swept(monkeypatch, tmp_path, strategies, "strategy.proximal_mu=0.1")
    assert code == 2
    assert err == (
        "error: strategy=fedavg (run 1 of 2): strategy=fedavg has no proximal_mu; "
        "strategy=fedprox has\n"
    )
    assert runs == {"sweep/strategy=fedprox"}
    assert "fedprox, logistic, 4 clients, seed 0 (run 2 of 2)" in out


def test_overrides_may_stand_on_both_sides_of_the_option(tmp_path, monkeypatch) -> None:
    code, out, err, runs = swept(monkeypatch, tmp_path, "seed=0", "--multirun", "seed=3,4")
    assert (code, err) == (0, "")
    assert runs == {"sweep/seed=3", "sweep/seed=4"}
    assert "seed 4 (run 2 of 2)" in out


def test_a_long_sweep_has_short_names_that_are_unique(tmp_path, monkeypatch) -> None:
    fixed = ["local.momentum=0.9", "local.weight_decay=0.0001", "checkpoint.every=5"]
    many = [f"{key}={value},{value}1" for key, value in {
        "dataset.alpha": "0.123456789", "local.learning_rate": "0.00012345678",
    }.items()]  # fmt: skip
    single = [f"evaluate.test_fraction=choice(0.{'1' * 60})", "failure_rate=choice(0.0000000001)"]
    code, _, err, runs = swept(monkeypatch, tmp_path, *fixed, *many, *single)
    assert (code, err) == (0, "")
    assert len(runs) == 4
    for name in runs:
        assert len(Path(name).name.encode()) <= MOST_BYTES
        assert "momentum" not in name
        assert name.count("/") == 1


def test_paths_are_swept_over(tmp_path, monkeypatch) -> None:
    names = ("a", "b,c=d'e", "müller (1)")
    for name in names:
        (tmp_path / name).mkdir()
        users = [f"f{number:04d}_00" for number in range(5)]
        data = {user: {"x": [[1.0] * 784] * 4, "y": [0, 1, 2, 9]} for user in users}
        shard = {"users": users, "num_samples": [4] * 5, "user_data": data}
        (tmp_path / name / "all_data_0.json").write_text(json.dumps(shard))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "TINY", [*TINY[:5], "evaluate.unseen_fraction=0"])
    paths = f'dataset.path=a,"b,c=d\'e",{names[2]}'
    code, out, err, runs = swept(monkeypatch, tmp_path, "dataset=leaf", paths)
    assert (code, err) == (0, "")
    assert len(runs) == 3
    assert {name.rpartition("-")[0] for name in runs} == {
        "sweep/dataset.path=a", "sweep/dataset.path=b,c_d_e", "sweep/dataset.path=müller_1",
    }  # fmt: skip
    assert f"dataset.path={tmp_path}/b,c=d'e (run 2 of 3)" in out


def test_a_users_own_subfolders_and_values_with_commas_work(tmp_path, monkeypatch) -> None:
    own = "hydra.sweep.subdir=${hydra.job.num}"
    code, _, err, runs = swept(monkeypatch, tmp_path, "model=2nn", "model.units=[2,3],[4]", own)
    assert (code, err) == (0, "")
    assert runs == {"sweep/0", "sweep/1"}
    folder = f"hydra.sweep.dir={tmp_path}/again"
    code, _, err, runs = swept(monkeypatch, tmp_path, "model=2nn", "model.units=[2,3],[4]", folder)
    assert (code, err) == (0, "")
    assert len([name for name in runs if name.startswith("again/model.units=2,3-")]) == 1

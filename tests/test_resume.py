"""Killed or ended, a run goes on: the same bits and tables, or a line that says why not."""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simulate
from benchmarks import faults
from femfed import UserError, checkpoint
from femfed.client import LocalTraining
from femfed.engine import ray as ray_engine
from femfed.engine.inline import InlineEngine
from femfed.engine.memory import Memories, Uncached
from femfed.engine.wire import AT, left_by_the_dead
from femfed.folder import how_to_resume
from femfed.local import DivergedError
from femfed.report.files import CLIENT_COLUMNS, ROUND_COLUMNS, RunFiles
from tests.test_engine import a_job, finish, same, store  # noqa: F401  # a fixture
from tests.test_simulate import contents

TINY = [
    "clients=4",
    "clients_per_round=2",
    "evaluate.unseen_fraction=0.34",
    "evaluate.every=1",
    "dataset.writers=6",
    "model=logistic",
    "engine=inline",
]


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Type `python simulate.py` in this process; return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["simulate.py", *arguments])
    monkeypatch.setattr(simulate, "exit_codes", [])
    monkeypatch.setattr(simulate, "finished", [])
    monkeypatch.setattr(simulate, "failures", {})
    monkeypatch.setattr(simulate, "sweeps", set())
    monkeypatch.setattr(simulate, "composed", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # pytest holds the descriptors
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.raises(SystemExit) as exit,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        simulate.main()
    return int(exit.value.code or 0), out.getvalue(), err.getvalue()


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> None:
    paths = [f"cache={folder.parent}/cache", f"hydra.run.dir={folder}"]
    code, out, err = typed(monkeypatch, *TINY, *overrides, *paths)
    assert code == 0, out + err


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    code, _, err = typed(monkeypatch, *arguments)
    (line,) = err.splitlines()
    assert (code, line[:7]) == (2, "error: ")
    return line


def resume(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> str:
    code, out, err = typed(monkeypatch, f"resume={folder}", *overrides)
    assert code == 0, out + err
    return out


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of five rounds of SCAFFOLD, which has state and client state."""
    folder = tmp_path_factory.mktemp("finished") / "five"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, folder, "rounds=5", "strategy=scaffold")
    return folder


@pytest.fixture
def five(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of that run for one test to change."""
    return shutil.copytree(finished_run, tmp_path / "five")


def unfinished(folder: Path) -> None:
    """Make a finished run look as if it had been killed in its last round."""
    for name in ("summary.json", "model.keras", "writers.csv", "curves.png", "writers.png"):
        (folder / name).unlink()


def of_an_earlier_femfed(folder: Path) -> None:
    """Make checkpoints know neither tables nor client states, and states have no checksum."""
    for path in sorted((folder / "checkpoint").iterdir()):
        saved = checkpoint.load(path)
        about = {name: saved.about[name] for name in ("dataset", "tensorflow", "numpy")}
        checkpoint.save(path.parent, replace(saved, about=about, clients=None))
    for path in (folder / "memory").glob("*.npy"):
        np.save(path, np.load(path))


# by hand and by SIGKILL


def test_a_longer_run_is_the_shorter_one_gone_on(
    five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, tmp_path / "three", "rounds=3", "strategy=scaffold")

    said = resume(monkeypatch, tmp_path / "three", "rounds=5")

    assert "goes on from round 3" in said
    assert faults.result(tmp_path / "three") == faults.result(five)
    summary = json.loads((tmp_path / "three" / "summary.json").read_text())
    assert summary["rounds"] == 5


def test_a_run_ended_in_its_last_round_runs_it_again(
    five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = faults.result(five)
    unfinished(five)

    assert "goes on from round 4" in resume(monkeypatch, five)
    assert faults.result(five) == expected


def test_nothing_but_checkpoints_is_left_beside_them(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ["round_000004.npz", "round_000005.npz"]
    assert sorted(path.name for path in (five / "checkpoint").iterdir()) == two
    unfinished(five)
    for name in (".round_000005.npz.123", ".spare"):  # of a process that was killed
        (five / "checkpoint" / name).write_bytes(b"half")

    resume(monkeypatch, five)

    assert sorted(path.name for path in (five / "checkpoint").iterdir()) == two


def test_a_run_without_a_checkpoint_starts_again(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = faults.result(five)
    unfinished(five)
    shutil.rmtree(five / "checkpoint")

    assert "goes on from round 0" in resume(monkeypatch, five)
    assert faults.result(five) == expected


@pytest.mark.parametrize("damage", ["half", "empty", "a byte"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    five: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    expected = faults.result(five)
    newest = five / "checkpoint" / "round_000005.npz"
    content = newest.read_bytes()
    middle = len(content) // 4  # among the weights
    newest.write_bytes(
        {
            "half": content[:middle],
            "empty": b"",
            "a byte": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        }[damage]
    )
    (five / "summary.json").unlink()

    said = resume(monkeypatch, five, "rounds=6")

    assert "round_000005.npz is damaged" in said
    assert "goes on from round 4" in said
    rows = faults.result(five)["rounds.csv"]
    assert isinstance(rows, list)
    assert rows[:6] == expected["rounds.csv"]
    assert len(rows) == 7


@pytest.mark.parametrize(
    "strategy", ["fedavg", "fedadam", "scaffold"], ids=lambda strategy: strategy
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, strategy: str) -> None:
    """One `kill -9` each; `benchmarks.faults` does as many as wanted, on Ray as well."""
    overrides = [*TINY, "rounds=8", "local.epochs=20", f"strategy={strategy}"]
    cache = tmp_path / "cache"
    faults.finish(faults.start(tmp_path / "undisturbed", cache, *overrides))

    said = faults.killed_and_resumed(tmp_path / "killed", cache, 3, 0.05, overrides)

    assert said.startswith("goes on from round")
    assert faults.result(tmp_path / "killed") == faults.result(tmp_path / "undisturbed")


# tables and events


def test_rewinding_cuts_both_tables(five: Path) -> None:
    files = RunFiles(five)

    rows = files.rewind(2, files.check(2, {}))

    assert [row["round"] for row in rows] == [0, 1, 2]
    with (five / "clients.csv").open() as file:
        assert [row["round"] for row in csv.DictReader(file)] == ["1", "1", "2", "2"]
    with pytest.raises(ValueError, match="lacks rounds up to 4"):
        files.check(4, {})


def test_every_point_of_tensorboard_is_there_once(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorflow.compat.v1.train import summary_iterator

    def steps() -> list[int]:
        files = (five / "tensorboard").iterdir()
        events = [event for file in files for event in summary_iterator(str(file))]
        values = [(e.step, v.tag) for e in events for v in e.summary.value]
        return sorted(step for step, tag in values if tag == "accuracy/test")

    assert steps() == [0, 1, 2, 3, 4, 5]
    resume(monkeypatch, five, "rounds=7")
    assert steps() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_run_without_round_0_goes_on_without_it(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of versions before round 0 was evaluated."""
    expected: Any = faults.result(five)
    table = five / "rounds.csv"
    header, _, *rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join([header, *rows]))
    of_an_earlier_femfed(five)
    unfinished(five)

    assert "goes on from round 4" in resume(monkeypatch, five)

    result: Any = faults.result(five)
    assert result["rounds.csv"] == expected["rounds.csv"][1:]
    assert result["weights_sha256"] == expected["weights_sha256"]


# what may not change


@pytest.mark.parametrize(
    "override",
    ["strategy=fedavg", "seed=1", "local.learning_rate=0.2", "clients=5", "experiment=homework",
     "evaluate.test_fraction=0.5", "model=cnn", "failure_rate=0.1"],
)  # fmt: skip
def test_what_would_change_the_run_is_refused_by_name(
    five: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    before = faults.result(five)

    line = refused(monkeypatch, f"resume={five}", "rounds=7", override)

    assert f"{override} would change what the resumed run computes" in line
    assert faults.result(five) == before


def test_what_the_run_began_with_may_be_repeated(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_again = ["strategy=scaffold", "clients=4", "model=logistic", "engine=inline"]
    assert "goes on from round 5" in resume(monkeypatch, five, *same_again, "rounds=6")


def test_a_finished_run_says_how_to_go_on(five: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "expected rounds=6 or more" in refused(monkeypatch, f"resume={five}")
    assert "expected rounds=6 or more" in refused(monkeypatch, f"resume={five}", "rounds=4")
    assert (five / "summary.json").exists()


def test_what_is_refused_leaves_the_runs_config_alone(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(five)
    assert {f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")} <= set(before)
    monkeypatch.setattr(ray_engine, "available_memory", lambda: 2**30)

    for override in ("rounds=4", "rounds=0", "checkpoint.every=0", "engine.kind=cloud", "seed=1"):
        refused(monkeypatch, f"resume={five}", override)
    elsewhere = [f"cache={five.parent}/cache", f"hydra.run.dir={five}", "local.learning_rate=0.5"]
    assert "holds a run already" in refused(monkeypatch, *TINY, *elsewhere)
    memory = refused(monkeypatch, f"resume={five}", "rounds=8", "engine=ray", "engine.workers=9")
    assert "expected at most" in memory

    after = contents(five)
    del before["simulate.log"], after["simulate.log"]  # to which libraries may print
    assert after == before


def test_what_is_refused_leaves_the_log_of_a_run_and_of_a_user_alone(
    five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs" / "simulate.log"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    before = (five / "simulate.log").read_bytes()

    refused(monkeypatch, f"resume={five}", "rounds=4")
    refused(monkeypatch, *TINY, f"hydra.run.dir={theirs.parent}", "clients=0")

    assert (five / "simulate.log").read_bytes() == before
    assert theirs.read_text() == "mine"


def test_more_rounds_are_kept_once_the_workers_start(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: InlineEngine) -> None:
        raise OSError("no room for another process")

    with monkeypatch.context() as patch:
        patch.setattr(InlineEngine, "__enter__", stopped)
        code, _, err = typed(monkeypatch, f"resume={five}", "rounds=8")
    assert (code, "no finished round is lost: " in err) == (1, True)

    assert "goes on from round 5" in resume(monkeypatch, five)

    assert checkpoint.rounds(five / "checkpoint")[-1] == 8


def test_memories_of_another_run_and_halves_of_them_go(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = five / "memory"
    foreign = (
        memory / "client_000000_round_000009.npy",
        memory / ".client_000001_round_000006.npy.9",
    )
    for path in foreign:
        path.write_bytes(b"not this run's")

    resume(monkeypatch, five, "rounds=8")

    assert not any(path.exists() for path in foreign)
    assert Memories(memory).versions(4, 9).max() == 8


def test_a_rare_checkpoint_is_told_and_the_last_rounds_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = tmp_path / "rare"
    run(monkeypatch, rare, "rounds=5", "checkpoint.every=100")
    assert checkpoint.rounds(rare / "checkpoint") == [4, 5]
    assert how_to_resume(rare, 5, 100).startswith("goes on from round 4: python simulate.py")
    unfinished(rare)
    assert "goes on from round 4" in resume(monkeypatch, rare)
    for path in (rare / "checkpoint").iterdir():
        path.unlink()
    assert how_to_resume(rare, 5, 100).startswith("goes on from round 0: ")
    assert how_to_resume(tmp_path, 5, 100) == ""


@pytest.mark.parametrize("override", ["clients=0", "dataset=leaf"])
def test_a_refused_run_removes_only_what_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    theirs = tmp_path / "logs" / "tensorboard" / "events"
    theirs.parent.mkdir(parents=True)
    theirs.touch()

    refused(monkeypatch, *TINY[:3], override, f"hydra.run.dir={tmp_path / 'logs'}")

    assert list((tmp_path / "logs").iterdir()) == [theirs.parent]
    assert theirs.exists()


def test_a_cache_in_nobodys_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["cache='~nobody-of-that-name/cache'", f"hydra.run.dir={tmp_path / 'run'}"]
    assert "there is no such home" in refused(monkeypatch, *TINY, *paths)
    assert not (tmp_path / "run").exists()


def test_both_tables_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    files = RunFiles(tmp_path)
    files.rewind(0, files.check(0, {}))
    files.append_round(dict.fromkeys(ROUND_COLUMNS, 1))
    files.append_clients([dict.fromkeys(CLIENT_COLUMNS, 1)])

    files.sync()

    names = ("rounds.csv", "clients.csv")
    assert {(tmp_path / name).stat().st_ino for name in names} <= set(synced)


def test_no_run_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no run in" in refused(monkeypatch, f"resume={tmp_path}/nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_sweep_is_not_resumed(five: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "one run to go on with" in refused(monkeypatch, "-m", f"resume={five}", "rounds=6,7")


def test_a_folder_of_a_sweep_is_resumed(
    five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "seed=0,strategy=sca'ffold"
    five.rename(odd)

    assert "goes on from round 5" in resume(monkeypatch, odd, "rounds=6")


def test_another_dataset_is_noticed(
    five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = five / "checkpoint" / "round_000005.npz"
    saved = checkpoint.load(kept)
    checkpoint.save(kept.parent, replace(saved, about={**saved.about, "dataset": "other-12"}))

    line = refused(monkeypatch, f"resume={five}", "rounds=6")

    assert "began with the dataset store other-12" in line


def test_another_version_is_told(five: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = five / "checkpoint" / "round_000005.npz"
    saved = checkpoint.load(kept)
    checkpoint.save(kept.parent, replace(saved, about={**saved.about, "tensorflow": "1.0"}))

    assert "begun with tensorflow 1.0, resumed with" in resume(monkeypatch, five, "rounds=6")


def test_a_folder_has_one_process(five: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulate.owned(five):
        assert "another process is running" in refused(monkeypatch, f"resume={five}", "rounds=6")
    assert (five / ".hydra" / "config.yaml").exists()


# what a resume builds on is what was written


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a run of six rounds comes to that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "six"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, folder, "rounds=6", "strategy=scaffold")
    return faults.result(folder)


def newest_state(folder: Path, round: int) -> Path:
    """Return the file of a client that took part in a round."""
    return sorted((folder / "memory").glob(f"client_*_round_{round:06d}.npy"))[0]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


LAST = {  # what the newest checkpoint counts on and the one before does not
    "a state is missing": lambda run: newest_state(run, 5).unlink(),
    "a number of a state": lambda run: flip(newest_state(run, 5), -8),
    "a state's header": lambda run: flip(newest_state(run, 5), 3),
    "half a state": lambda run: edit(newest_state(run, 5), lambda content: content[:9000]),
    "an older state": lambda run: shutil.copy(newest_state(run, 4), newest_state(run, 5)),
    "a digit of rounds.csv": lambda run: edit(run / "rounds.csv", last_digit),
    "a digit of clients.csv": lambda run: edit(run / "clients.csv", last_digit),
    "half of rounds.csv's last row": lambda run: edit(run / "rounds.csv", lambda all: all[:-40]),
}


def last_digit(table: bytes) -> bytes:
    """Change the last digit but those of the seconds: the round's number of the last row."""
    before, _, row = table.rstrip(b"\n").rpartition(b"\n")
    return before + b"\n" + row.replace(b"5,", b"6,", 1) + b"\n"


@pytest.mark.parametrize("damage", LAST)
def test_damage_to_what_the_newest_checkpoint_counts_on_costs_a_round(
    five: Path, six: dict[str, object], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    LAST[damage](five)

    said = resume(monkeypatch, five, "rounds=6")

    assert str(five) in said
    assert "tries the checkpoint before" in said
    assert "goes on from round 4" in said
    assert faults.result(five) == six


EARLIER = {  # what both checkpoints count on
    "all client states": (lambda run: shutil.rmtree(run / "memory"), "memory/client_"),
    "a digit of rounds.csv": (
        lambda run: edit(run / "rounds.csv", lambda all: all.replace(b"\n2,", b"\n7,")),
        "rounds.csv is not what the run wrote up to round 5",
    ),
    "a digit of clients.csv": (
        lambda run: edit(run / "clients.csv", lambda all: all.replace(b"\n2,", b"\n7,")),
        "clients.csv is not what the run wrote up to round 5",
    ),
    "half of rounds.csv": (
        lambda run: edit(run / "rounds.csv", lambda all: all[: len(all) // 2]),
        "rounds.csv is not what the run wrote",
    ),
    "the config's seed": (
        lambda run: edit(
            run / ".hydra" / "config.yaml", lambda all: all.replace(b"\nseed: 0", b"\nseed: 7")
        ),
        "is of a run with seed=0, where this run's config has 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", EARLIER)
def test_damage_to_what_all_checkpoints_count_on_is_named_and_nothing_is_changed(
    five: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    do, named = EARLIER[damage]
    do(five)
    before = contents(five)

    line = refused(monkeypatch, f"resume={five}", "rounds=6")

    assert named in line
    assert "put them back" in line
    after = contents(five)
    del before["simulate.log"], after["simulate.log"]
    assert after == before


@pytest.mark.parametrize("strategy", ["ditto", "fedper", "feddyn"])
def test_lost_client_states_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    run(monkeypatch, tmp_path / "run", "rounds=2", f"strategy={strategy}", "model=2nn")
    shutil.rmtree(tmp_path / "run" / "memory")

    assert "is missing" in refused(monkeypatch, f"resume={tmp_path}/run", "rounds=3")


def test_a_state_that_is_damaged_while_the_run_goes_on_is_named(tmp_path: Path) -> None:
    memories = Memories(tmp_path)
    memories.keep(4, 2, [np.arange(2000, dtype=np.float32)])
    flip(memories.path(4, 2), -8)

    for reader in (memories, Uncached(memories)):
        with pytest.raises(OSError, match=r"client_000004_round_000002\.npy is damaged"):
            reader.recall(4, 2)


def test_tables_that_a_spreadsheet_saved_are_taken(
    five: Path, six: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rounds.csv", "clients.csv"):
        edit(five / name, lambda all: b"\xef\xbb\xbf" + all.replace(b"\n", b"\r\n"))

    assert "goes on from round 5" in resume(monkeypatch, five, "rounds=6")
    assert faults.result(five) == six
    assert b"\r" not in (five / "rounds.csv").read_bytes()


def test_a_lost_table_is_said_and_goes_on_with_the_next_round(
    five: Path, six: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (five / "rounds.csv").unlink()

    said = resume(monkeypatch, five, "rounds=6")

    assert "rounds.csv is lost; it goes on with round 6" in said
    assert "goes on from round 5" in said
    found = faults.result(five)
    rows = found.pop("rounds.csv")
    assert isinstance(rows, list)
    assert [row["round"] for row in rows] == ["6"]
    assert found == {name: value for name, value in six.items() if name != "rounds.csv"}


def test_a_checkpoint_of_another_run_gives_way(
    five: Path, six: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, tmp_path / "other", "rounds=5", "strategy=scaffold", "seed=3")
    shutil.copy(tmp_path / "other/checkpoint/round_000005.npz", five / "checkpoint")
    (five / "checkpoint" / "round_000004 (copy).npz").write_bytes(b"a copy")

    said = resume(monkeypatch, five, "rounds=6")

    assert "round_000005.npz is of a run with seed=3, where this run's config has 0" in said
    assert "goes on from round 4" in said
    assert faults.result(five) == six


def test_a_checkpoint_under_another_name_is_damaged(five: Path) -> None:
    folder = five / "checkpoint"
    shutil.copy(folder / "round_000004.npz", folder / "round_000009.npz")

    with pytest.raises(checkpoint.DamagedError, match="is of round 4"):
        checkpoint.load(folder / "round_000009.npz")


def test_a_checkpoint_that_is_compressed_is_not_unpacked(tmp_path: Path) -> None:
    bomb = tmp_path / "round_000001.npz"
    np.savez_compressed(bomb, about=np.zeros(9, np.uint8))

    with pytest.raises(checkpoint.DamagedError, match="compressed"):
        checkpoint.load(bomb)


def test_a_run_of_an_earlier_femfed_goes_on(
    five: Path, six: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_an_earlier_femfed(five)
    unfinished(five)

    said = resume(monkeypatch, five, "rounds=6")

    assert "is of an earlier femfed and has no checksums" in said
    assert faults.result(five) == six


def test_the_last_rounds_own_evaluation_leaves_the_tables_of_a_longer_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, rounds in (("short", 3), ("long", 5)):
        run(monkeypatch, tmp_path / name, f"rounds={rounds}", "evaluate.every=2")

    said = resume(monkeypatch, tmp_path / "short", "rounds=5")

    assert "drops the evaluation of round 3" in said
    assert faults.result(tmp_path / "short") == faults.result(tmp_path / "long")


def test_what_killed_runs_had_begun_is_removed_everywhere(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = [".clients.csv.29200", ".writers.png.25273", ".model.keras.5162.keras"]
    begun += [".hydra/config.yaml.new", "memory/.client_000001_round_000009.npy.7"]
    begun += ["memory/spare/client_000001_round_000001.npy", "checkpoint/.round_000009.npz.7"]
    (five / "memory" / "spare").mkdir(exist_ok=True)
    for name in begun:
        (five / name).write_bytes(b"half")
    (five / ".mine.csv.1").touch()

    resume(monkeypatch, five, "rounds=6")

    assert [name for name in begun if (five / name).exists()] == []
    assert (five / ".mine.csv.1").exists()


# the run's folder and what is not the run's


@pytest.mark.parametrize(
    "name", ["tensorboard/mine", "memory/client_mine", "model.keras", "summary.json", ".hidden"]
)
def test_a_new_run_in_a_folder_of_the_users_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    monkeypatch.chdir(tmp_path / "mine")

    line = refused(monkeypatch, *TINY, "hydra.run.dir=.")

    assert f"is not empty: it holds {name.partition('/')[0]!r}" in line
    assert contents(tmp_path / "mine") == {name: b"mine"}


LINKS = {
    "rounds.csv": "rounds.csv",
    "memory": "memory",
    "checkpoint": "checkpoint",
    "tensorboard": "tensorboard",
    "the config's folder": ".hydra",
    "a state": "memory/client_000000_round_000001.npy",
    "a file to overwrite": "checkpoint/.spare",
    "the log": "simulate.log",
}


@pytest.mark.parametrize("what", LINKS)
def test_links_to_elsewhere_are_refused_and_nothing_there_is_changed(
    five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path, elsewhere = five / LINKS[what], tmp_path / "elsewhere"
    if path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.write_text("mine")
    path.symlink_to(elsewhere)
    before = contents(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()

    line = refused(monkeypatch, f"resume={five}", "rounds=6")

    assert f"{path} is a link" in line
    assert before == (contents(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes())


def test_a_copy_made_of_hard_links_leaves_the_first_run_as_it_is(
    five: Path, six: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(five, tmp_path / "copy", copy_function=os.link)
    before = contents(five)

    resume(monkeypatch, tmp_path / "copy", "rounds=6")

    assert faults.result(tmp_path / "copy") == six
    assert contents(five) == before


def test_a_pipe_in_place_of_a_table_is_refused(five: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (five / "clients.csv").unlink()
    os.mkfifo(five / "clients.csv")

    assert "is a link or no file" in refused(monkeypatch, f"resume={five}", "rounds=6")


LAUGHS = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12))
CONFIGS = {
    "aliases": (".hydra/config.yaml", f"l0: &l0 [ha]\n{LAUGHS}", "alias"),
    "half of it": (".hydra/config.yaml", "clients: [4, {a:", "cannot be read"),
    "nesting": (".hydra/config.yaml", "[" * 50_000, "nested too deeply"),
    "nested keys": (".hydra/config.yaml", "{a: " * 50_000, "nested too deeply"),
    "too much": (".hydra/config.yaml", "#" * 2**20, "bytes"),
    "not text": (".hydra/config.yaml", "\0", "cannot be read"),
    "a list": (".hydra/config.yaml", "[1, 2]", "config.yaml"),
    "nothing": (".hydra/config.yaml", "", "config.yaml"),
    "a surplus key": (".hydra/config.yaml", "surplus: 1", "surplus"),
    "interpolations": (".hydra/config.yaml", "seed: ${clients}${clients}", "interpolation"),
    "no choices": (".hydra/hydra.yaml", "hydra: {runtime: {cwd: /}}", "choices.dataset"),
    "no hydra": (".hydra/hydra.yaml", "[]", "choices.dataset"),
    "a list of choices": (
        ".hydra/hydra.yaml",
        "hydra: {runtime: {choices: {dataset: glyphs, strategy: [a], model: cnn}}}",
        "choices.strategy",
    ),
    "a huge choice": (
        ".hydra/hydra.yaml",
        f"hydra: {{runtime: {{choices: {{dataset: glyphs, strategy: {'a' * 10_000}, model: b}}}}}}",
        "choices.strategy",
    ),
    "an odd choice": (
        ".hydra/hydra.yaml",
        'hydra: {runtime: {choices: {dataset: glyphs, strategy: "a\\e[31m", model: b}}}',
        "choices.strategy",
    ),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_no_run_wrote_is_refused_in_a_line(
    five: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    name, text, named = CONFIGS[what]
    (five / name).write_text(text)

    line = refused(monkeypatch, f"resume={five}", "rounds=6")

    assert named in line
    assert len(line) < 1000


@pytest.mark.parametrize("name", ["b,c=d'e", "ends'", "a b(1) #&{}", "'quoted'", "\ud55c\uae00~"])
def test_a_run_under_any_name_is_resumed(
    five: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    odd = five.rename(five.parent / name)

    assert "goes on from round 5" in resume(monkeypatch, odd, "rounds=6")


def test_options_may_come_after_the_overrides(
    five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)

    assert "goes on from round 5" in resume(monkeypatch, five, "rounds=6", "--config-dir", str(own))


def test_another_run_dir_is_refused(
    five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = f"hydra.run.dir={tmp_path}/other"
    assert "resume=DIR alone" in refused(monkeypatch, f"resume={five}", other)
    assert not (tmp_path / "other").exists()


def test_evaluate_every_and_the_cache_may_change(
    five: Path, six: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume(monkeypatch, five, "rounds=7", "evaluate.every=3", f"cache={tmp_path}/cache2")

    rows = faults.result(five)["rounds.csv"]
    assert isinstance(rows, list)
    assert [bool(row["test_loss"]) for row in rows] == [True] * 8
    written = (five / ".hydra" / "config.yaml").read_text()
    assert f"cache: {tmp_path}/cache2" in written
    assert "every: 3" in written


def test_paths_are_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = typed(
        monkeypatch, *TINY, "rounds=1", "cache=cache", f"hydra.run.dir={tmp_path}/run"
    )
    assert code == 0, out + err
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")

    resume(monkeypatch, tmp_path / "run", "rounds=2")

    assert list((tmp_path / "sub").iterdir()) == []


def test_a_folder_that_is_removed_while_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RunFiles.append_clients

    def removed(self: RunFiles, rows: Any) -> None:
        rows = list(rows)
        if rows and rows[0]["round"] == 2:
            shutil.rmtree(tmp_path / "run")
        append(self, rows)

    monkeypatch.setattr(RunFiles, "append_clients", removed)
    paths = [f"cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]

    code, _, err = typed(monkeypatch, *TINY, "rounds=4", *paths)

    assert code == 2
    (line,) = err.splitlines()
    assert "the folder of the run, was removed while it ran" in line
    assert "room" not in line
    assert not (tmp_path / "run").exists()


def test_there_is_no_advice_to_resume_before_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [f"cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]

    code, _, err = typed(monkeypatch, *TINY, "local.learning_rate=1e30", *paths)

    assert code == 1
    assert "resume=" not in err
    assert not (tmp_path / "run").exists()


# clients that fail


def diverging(monkeypatch: pytest.MonkeyPatch, *clients: int) -> None:
    """Have some clients' training fail, at different places."""
    train, check, delta = LocalTraining.train, LocalTraining.check, LocalTraining.delta
    last: list[int] = []

    def train_or_fail(self: LocalTraining, writer: Any, round: int, client: int, *rest: Any) -> Any:
        last[:] = [client]
        if client in clients[::2]:
            raise DivergedError("training loss is nan")
        return train(self, writer, round, client, *rest)

    def check_or_fail(self: LocalTraining, weight: float) -> None:
        if last[0] in clients[1::2]:
            raise DivergedError("the update reaches nan")
        check(self, weight)

    def delta_or_fail(self: LocalTraining, vector: np.ndarray) -> None:
        if last[0] in clients[1::2]:
            vector[:] = np.nan
            raise DivergedError("the update holds NaN or infinity")
        delta(self, vector)

    monkeypatch.setattr(LocalTraining, "train", train_or_fail)
    monkeypatch.setattr(LocalTraining, "check", check_or_fail)
    monkeypatch.setattr(LocalTraining, "delta", delta_or_fail)


@pytest.mark.parametrize("averages", [True, False])
def test_a_dropped_client_is_left_out_and_counted(
    store: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    averages: bool,
) -> None:
    from femfed.strategies.fedavg import FedAvg
    from femfed.strategies.fedmedian import FedMedian

    strategy = FedAvg() if averages else FedMedian()
    diverging(monkeypatch, 0, 3)
    results = {}
    for name, changes in (("a", {}), ("b", {"bundle": 1}), ("c", {"by_value": True}), ("d", {})):
        if name == "d":  # updates go past the system's cache
            monkeypatch.setattr("femfed.engine.wire.available_memory", lambda: 0)
        job = a_job(store, tmp_path, strategy=strategy, drop=True, **changes)
        results[name] = finish(job, tmp_path)
    weights, rounds = results["a"]

    assert all(same(weights, other) for other, _ in results.values())
    assert all(not {0, 3} & set(r.cohort.tolist()) for r in rounds)
    assert any(r.failed for r in rounds)
    assert all(len(r.cohort) + r.failed == 5 for r in rounds)
    assert all(len(r.trained.outcomes) == len(r.cohort) for r in rounds)


def test_everybody_dropped_is_a_round_without_news(
    store: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    diverging(monkeypatch, *[c for client in range(7) for c in (client, 99)])
    job = a_job(store, tmp_path, drop=True)
    weights, rounds = finish(job, tmp_path)

    assert same(weights, job.model.build(1).get_weights())
    assert [r.failed for r in rounds] == [5, 5, 5]


def test_dropped_clients_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverging(monkeypatch, 1)
    paths = [f"cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]

    code, out, _ = typed(monkeypatch, *TINY, "rounds=3", "on_client_error=drop", *paths)

    assert code == 0
    assert "without client 1 (writer g0000_0" in out
    with (tmp_path / "run" / "rounds.csv").open() as file:
        failed = [int(row["failed"]) for row in csv.DictReader(file)]
    assert sum(failed) == out.count("without client 1")


def test_a_diverging_run_is_stopped_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [f"cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]
    rate = [*TINY, "rounds=9", "local.learning_rate=400", *paths]

    code, _, err = typed(monkeypatch, *rate)

    assert code == 1
    assert "the run diverged: round" in err
    assert "try a smaller local.learning_rate" in err


def test_an_error_in_mid_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = LocalTraining.train

    def train_or_fail(self: LocalTraining, writer: Any, round: int, *rest: Any) -> Any:
        if round == 3:
            raise DivergedError("training loss is nan")
        return train(self, writer, round, *rest)

    paths = [f"cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]
    with monkeypatch.context() as patch:
        patch.setattr(LocalTraining, "train", train_or_fail)
        code, _, err = typed(patch, *TINY, "rounds=4", *paths)

    assert code == 1
    (line,) = err.splitlines()
    assert "no finished round is lost: python simulate.py resume=" in line
    assert "goes on from round 2" in resume(monkeypatch, tmp_path / "run", "on_client_error=drop")


# lost workers


def test_who_was_being_trained_by_the_dead(tmp_path: Path) -> None:
    for pid, client in ((os.getpid(), 1), (4194305, 2), (4194306, -1)):  # beyond the largest pid
        np.array([client]).tofile(tmp_path / f"{AT}{pid}")

    assert left_by_the_dead(tmp_path) == [2]
    assert left_by_the_dead(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [f"{AT}{os.getpid()}"]


def test_a_worker_that_nobody_waited_for_is_dead(tmp_path: Path) -> None:
    worker = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    np.array([3]).tofile(tmp_path / f"{AT}{worker.pid}")
    worker.stdout.read()  # returns when it ends
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # and leaves it unburied

    assert Path(f"/proc/{worker.pid}").exists()
    assert left_by_the_dead(tmp_path) == [3]
    worker.communicate()


def test_a_writer_that_kills_its_worker_three_times_is_named(
    store: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    from femfed.engine.apps import ClientError, Run

    job = a_job(store, tmp_path)
    run = Run(job, [], {}, lambda _: None, lambda *_: None, lambda _: None)

    def lose(client: int) -> None:
        np.array([client]).tofile(tmp_path / f"{AT}4194305")
        run.blame(tmp_path)

    for client in (2, 3, 2):
        lose(client)
    run.lost.clear()  # a round was finished
    for client in (2, 2):
        lose(client)
    with pytest.raises(ClientError, match=r"client 2 \(writer w2.*ended the worker .* 3 times"):
        lose(2)


def test_too_little_memory_is_told_before_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "available_memory", lambda: 4 * 2**30)

    ray_engine.RayEngine(3, by_value=False, parameters=1_206_590)
    with pytest.raises(UserError, match=r"64 workers need about .* GiB.*engine\.workers=4"):
        ray_engine.RayEngine(64, by_value=False, parameters=1_206_590)
    monkeypatch.setattr(ray_engine, "available_memory", lambda: 2**30)
    with pytest.raises(UserError, match=r"at most 0 workers: .*engine=inline"):
        ray_engine.RayEngine(1, by_value=False, parameters=6_603_710)
